"""Tensors by name: no two under one name, and what a file says of the modules that they belong to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from numpy.typing import NDArray

from jaxrnn.checkpoint.errors import CheckpointError

_ValueT = TypeVar("_ValueT")


class CannotRun(Exception):
    """The original of a module cannot be called with an input and first states."""


class Origin(NamedTuple):
    """What a recurrent module is in the library that wrote the file.

    Attributes:
        title: the class there, such as "flax.linen.GRUCell".
        usual: the arguments of our constructor that fit the usual settings there, if the file does not say them.
        run: call the original. It takes the input, of shape (time, batch, features), and the first states, each of
            shape (layers * directions, batch, features) as in torch. It returns the output and the last states. A cell
            has no first axis, and returns the states alone. It raises ImportError if the library is not installed, and
            `CannotRun` if the original cannot be called in this way.
        exact: whether it computes in float64.
        runs_code: whether it runs code of the file.
    """

    title: str
    usual: Mapping[str, Any]
    run: Callable[[NDArray[Any], Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]
    exact: bool = True
    runs_code: bool = False


class Described(dict[str, Any]):
    """Tensors by name, and what their file says beside them.

    Attributes:
        said: by the prefix of a recurrent module ("encoder.lstm."), the arguments of its constructor in torch that the
            file says and weights do not: nonlinearity, batch_first, dropout. Or "cell", the `jaxrnn.Cell` of a module
            with activations that torch does not have.
        modules: the paths of torch's modules, as its state dicts say them: also of those without tensors. By default
            those that `tensors` has.
        origins: by the prefix of a recurrent module, what it is in another library.
        in_training: by the prefix of a recurrent module, what that library does with it in training alone, and how to
            do the same here.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        said: Mapping[str, Mapping[str, Any]] = {},
        modules: Iterable[str] | None = None,
        origins: Mapping[str, Origin] = {},
        in_training: Mapping[str, tuple[str, ...]] = {},
    ) -> None:
        super().__init__(tensors)
        self.said: dict[str, dict[str, Any]] = {prefix: dict(settings) for prefix, settings in said.items()}
        self.modules: frozenset[str] = frozenset(modules_of(tensors) if modules is None else modules)
        self.origins: dict[str, Origin] = dict(origins)
        self.in_training: dict[str, tuple[str, ...]] = dict(in_training)


def described_as(
    tensors: Mapping[str, Any], before: Mapping[str, Any], rename: Callable[[str], str | None] = lambda prefix: prefix
) -> Described:
    """Tensors with what is known of those that they come from.

    Args:
        tensors: the new ones.
        before: those that they come from.
        rename: the new prefix of a module, from its prefix before; None if it is no longer there. Prefixes end in dots.
    """

    def renamed(known: Mapping[str, _ValueT]) -> dict[str, _ValueT]:
        return {new: each for prefix, each in known.items() if (new := rename(prefix)) is not None}

    modules = [new[:-1] for path in modules_of(before) if (new := rename(f"{path}." * bool(path))) is not None]
    known = renamed(said_of(before)), modules, renamed(origins_of(before)), renamed(in_training_of(before))
    return Described(tensors, *known)


def said_of(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file of these tensors says of modules; nothing if they come from elsewhere."""
    return tensors.said if isinstance(tensors, Described) else {}


def origins_of(tensors: Mapping[str, Any]) -> dict[str, Origin]:
    """What modules are in another library; nothing if the tensors are torch's, or come from elsewhere."""
    return tensors.origins if isinstance(tensors, Described) else {}


def in_training_of(tensors: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What another library does with modules in training alone; nothing if the tensors come from elsewhere."""
    return tensors.in_training if isinstance(tensors, Described) else {}


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
