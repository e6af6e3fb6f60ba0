"""A user's own checkpoint as cases: every recurrent module in it, with its weights, on random and on given inputs."""

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np

from jaxrnn.checkpoint import FoundRNN, find_rnns, load

from .cases import Case
from .locate import Probe

STEPS, BATCH = 16, 4


@dataclasses.dataclass(frozen=True)
class Module(Probe):
    """A module of the user's, whose errors are pooled with nobody else's."""

    @property
    def group(self) -> str:
        return self.name


def cases(path: str, key: str | None, inputs: str | None) -> list[Case]:
    """The cases of a checkpoint.

    Args:
        path, key: as for `jaxrnn.checkpoint.load`.
        inputs: a .npy file of shape (time, batch, features), or (batch, features) for cells, or None. Every module with
            as many features and axes is run on it, too.

    Raises:
        CheckpointError: the file, or what is in it, cannot be used.
        ValueError: there is no recurrent module, or none takes the inputs.
    """
    tensors = load(path, key)
    found = [rnn for rnn in find_rnns(tensors) if rnn.in_torch]
    if not found:
        raise ValueError(f"{path}: no recurrent weights\n`jaxrnn inspect` says what is there")
    given = None if inputs is None else np.load(inputs, allow_pickle=False)
    made = [case for rnn in found for case in _of(rnn, tensors, given)]
    if given is not None and len(made) == len(found):
        sizes = sorted({rnn.input_size for rnn in found})
        raise ValueError(f"{inputs}: no module takes shape {given.shape}\nwanted are (time, batch, {sizes})")
    return made


def _of(rnn: FoundRNN, tensors: dict[str, np.ndarray], given: np.ndarray | None) -> Iterator[Case]:
    kind = rnn.class_name
    if rnn.kind == "RNN":
        kind += "_TANH"  # which no state dict says
    elif rnn.proj_size:
        kind += "_PROJ"
    parameters = {name: tensors[rnn.prefix + name].astype(np.float64) for name in rnn.spec.shapes()}
    name = f"{rnn.prefix.removesuffix('.') or rnn.kind} ({kind})"

    def case(label: str, steps: int | None, batch: int, x: np.ndarray | None) -> Case:
        module = Module(f"{name} on {label}", kind, rnn.arguments, steps, batch, hx=True, dtypes=("float64",))
        random = np.random.RandomState(zlib.crc32(module.name.encode()))
        inputs, results = (
            {name: random.standard_normal(shape) for name, shape in shapes.items()} for shapes in module.shapes()[1:]
        )
        if x is not None:
            inputs["input"] = x.astype(np.float64)
        return dataclasses.replace(module, given=(parameters, inputs, results))

    yield case("random inputs", None if rnn.is_cell else STEPS, BATCH, None)
    if given is not None and given.ndim == (2 if rnn.is_cell else 3) and given.shape[-1] == rnn.input_size:
        yield case("given inputs", None if rnn.is_cell else given.shape[0], given.shape[-2], given)
