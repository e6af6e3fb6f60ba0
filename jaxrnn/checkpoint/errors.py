"""The one exception of everything that reads, checks and loads checkpoints."""

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint, or a set of tensors, that cannot be used.

    The message starts with the file's path, or with the module's class from `jaxrnn.load_state_dict`; then come the
    cause, naming the keys where there are any, and a line with the remedy.
    """


def listed(names: Iterable[object], limit: int = 20) -> str:
    """Names for a message: the first few, and how many more there are."""
    names = list(names)
    text = ", ".join(map(str, names[:limit]))
    return text + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")
