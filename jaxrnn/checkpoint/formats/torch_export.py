"""Files of torch.export.save (.pt2): the weights of an exported program, and the settings in its graph."""

from jaxrnn.checkpoint.errors import CheckpointError
from jaxrnn.checkpoint.formats.reading import Reading
from jaxrnn.checkpoint.formats.torch_archive import TOP, Archive
from jaxrnn.checkpoint.named import Described


def are_its(names: list[str]) -> bool:
    return any(name in TOP or name.endswith("/archive_format") for name in names)


def is_one(archive: Archive) -> bool:
    return are_its(archive.names)


def read(archive: Archive, what: Reading) -> tuple[Described, list[tuple[str, str]]]:
    raise CheckpointError("todo\ntodo")
