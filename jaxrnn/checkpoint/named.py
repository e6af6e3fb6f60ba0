"""Tensors by name: no two under one name, and what a file says of the modules that they belong to."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jaxrnn.checkpoint.errors import CheckpointError

_ValueT = TypeVar("_ValueT")


class Described(dict[str, Any]):
    """Tensors by name, and what their file says beside them.

    Attributes:
        said: by the prefix of a recurrent module ("encoder.lstm."), the arguments of its constructor in torch that the
            file says and weights do not: nonlinearity, batch_first, dropout. Or "cell", the `jaxrnn.Cell` of a module
            with activations that torch does not have.
        modules: the paths of torch's modules, as its state dicts say them: also of those without tensors. By default
            those that `tensors` has.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        said: Mapping[str, Mapping[str, Any]] = {},
        modules: Iterable[str] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.said: dict[str, dict[str, Any]] = {prefix: dict(settings) for prefix, settings in said.items()}
        self.modules: frozenset[str] = frozenset(modules_of(tensors) if modules is None else modules)


def said_of(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file of these tensors says of modules; nothing if they come from elsewhere."""
    return tensors.said if isinstance(tensors, Described) else {}


def modules_of(tensors: Any) -> frozenset[str]:
    """The paths of torch's modules, if tensors are a state dict of torch's or come from one."""
    metadata = getattr(tensors, "_metadata", None)
    paths = metadata if isinstance(metadata, Mapping) else getattr(tensors, "modules", ())
    return frozenset(path for path in paths if isinstance(path, str))


class Names(dict[str, _ValueT]):
    """A dict that refuses a second value for a name. Use it wherever tensors are renamed.

    Args:
        remedy: the line of the message that says what to do.
        kind: what the sources are, for the message.
    """

    def __init__(self, remedy: str, kind: str = "") -> None:
        super().__init__()
        self._remedy, self._kind = remedy, kind
        self._sources: dict[str, str] = {}

    def put(self, name: str, value: _ValueT, source: str) -> None:
        """Add a value.

        Args:
            name: its name here.
            value: the value.
            source: its name where it comes from, for the message.

        Raises:
            CheckpointError: the name is taken; the message shows both sources.
        """
        if name in self:
            raise CheckpointError(
                f"{self._kind}{self._sources[name]} and {source} are both read as {name}\n{self._remedy}"
            )
        self[name] = value
        self._sources[name] = source
