"""Read a pickle by a machine that only builds data.

Python's unpickler calls what a file names. This one cannot: a global is only a name, and a `Vocabulary` says which
names are known and what data their calls make. Any other name is refused, or what it would make is left out.
"""

import contextlib
import pickletools
import struct
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8",
}  # fmt: skip
_SIZED = (str, bytes, tuple, list, dict, set)  # what calls make
_OBJECTS = {"NEWOBJ_EX", "OBJ", "INST"}  # NEWOBJ is for the vocabulary to allow
_LONGEST_KEY = 64  # of a tuple that is a key
_ITEMS = 4  # that a call may make of each item or character in a pickle: as many bytes has one in UTF-8
# A damaged or hostile pickle can raise these here and in pickletools.
DAMAGE = (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, EOFError, struct.error)


class Global(NamedTuple):
    """A global that the vocabulary knows: only its name."""

    name: str


class LeftOut(NamedTuple):
    """An object of an unknown class or function, by its name; nothing of it is built."""

    name: str


class Refused(Exception):
    """The pickle does something that is not allowed; the argument is the cause."""


class Vocabulary:
    """What the globals of one kind of pickle stand for. This one knows none.

    What a file holds reaches these functions unchecked. They may raise `Refused`, or any of `DAMAGE`.
    """

    def knows(self, name: str) -> bool:
        """Whether a global such as "collections.OrderedDict" may be named."""
        return False

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """The data that a call of a known global makes."""
        raise ValueError("it calls something that is not a function")

    def bare(self, name: str, argument: Any) -> tuple[Any, ...]:
        """The arguments of a call that has something other than a tuple of them."""
        raise ValueError("it calls a function without a tuple of arguments")

    def makes(self, name: str) -> bool:
        """Whether `new` makes objects of a known global, which is a class."""
        return False

    def new(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """An object of a class, before its state is set."""
        raise Refused("its pickle has the operation NEWOBJ")

    def build(self, value: Any, state: Any) -> None:
        """Set the state of a value that is in the memo already: change it in place."""
        raise ValueError("it sets attributes, and should not")

    def stored(self, identity: Any) -> Any:
        """What is stored outside the pickle, under a persistent id."""
        raise Refused("its pickle has the operation BINPERSID")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence pickletools, which decodes strings as Python's source has them, and advises on their escapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def build(data: Any, vocabulary: Vocabulary, left_out: set[str] | None = None) -> Any:
    """Build what a pickle holds: bytes, or something to read from that never gives more than there is.

    With a set `left_out`, each object whose class or function is not known becomes a `LeftOut`, and the set gets its
    name. Nothing of it is built.

    Raises:
        Refused: it names a global that is not known, or does what the vocabulary does not allow.
        CheckpointError: it is damaged.
    """
    try:
        with quiet():
            return _Machine(vocabulary, left_out).run(pickletools.genops(data))
    except CheckpointError:
        raise
    except DAMAGE as damage:
        cause = str(damage).partition("\n")[0][:100]
        raise CheckpointError(f"truncated or damaged: its pickle cannot be read ({cause})\n{AGAIN}") from damage


class _Machine:
    """Stack, marks and memo."""

    def __init__(self, vocabulary: Vocabulary, left_out: set[str] | None) -> None:
        self.vocabulary = vocabulary
        self.left_out = left_out
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.most = 1 << 20  # items and characters that calls may make: no more than the pickle has, but for sharing

    def run(self, operations: Iterator) -> Any:
        for opcode, argument, _ in operations:
            if opcode.name == "STOP":
                return self.stack.pop()
            self.most += _ITEMS * (1 + len(argument) if type(argument) in (str, bytes, bytearray) else 1)
            if opcode.name in _ARGUMENTS:
                self.stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _OBJECTS and self.left_out is None:
                raise Refused(f"its pickle has the operation {opcode.name}")
            elif method := getattr(self, f"_{opcode.name.lower()}", None):
                method(argument)
            elif opcode.name not in ("PROTO", "FRAME"):
                raise Refused(f"its pickle has the operation {opcode.name}")
        raise EOFError("it ends too early")

    def _items(self) -> list[Any]:
        """Pop everything above the last mark."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _mark(self, _: None) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _pop(self, _: None) -> None:
        self.stack.pop()

    def _binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _put = _long_binput = _binput
    _get = _long_binget = _binget

    def _empty_tuple(self, _: None) -> None:
        self.stack.append(())

    def _empty_list(self, _: None) -> None:
        self.stack.append([])

    def _empty_dict(self, _: None) -> None:
        self.stack.append({})

    def _tuple(self, _: None) -> None:
        items = self._items()
        self.stack.append(tuple(items))

    def _tuple1(self, _: None) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, _: None) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: None) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _list(self, _: None) -> None:
        items = self._items()
        self.stack.append(items)

    def _append(self, _: None) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._items())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is LeftOut:
            return
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to something that is not a list")
        self.stack[-1].extend(items)

    def _dict(self, _: None) -> None:
        items = self._items()
        self.stack.append({})
        self._set(items)

    def _setitem(self, _: None) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def _setitems(self, _: None) -> None:
        self._set(self._items())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is LeftOut:
            return
        if type(target) not in (dict, OrderedDict):
            raise ValueError("it sets an item of something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if self.left_out is not None and type(key) in (LeftOut, Global):
                continue
            target[checked_key(key)] = value

    def _empty_set(self, _: None) -> None:
        self.stack.append(set())

    def _additems(self, _: None) -> None:
        items = self._items()
        if type(self.stack[-1]) is not set:
            raise ValueError("it adds to something that is not a set")
        self.stack[-1].update(map(checked_key, items))

    def _frozenset(self, _: None) -> None:
        items = self._items()
        self.stack.append({checked_key(item) for item in items})

    def _newobj(self, _: None) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is Global and self.vocabulary.makes(kind.name):
            if type(arguments) is not tuple:
                raise ValueError("an object is made of something that is not a tuple")
            self.stack.append(self.vocabulary.new(kind.name, arguments))
        elif self.left_out is None:
            raise Refused("its pickle has the operation NEWOBJ")
        else:
            self.stack.append(self._called(kind, arguments))

    def _newobj_ex(self, _: None) -> None:
        self.stack.pop()
        self._reduce(None)

    def _obj(self, _: None) -> None:
        kind, *_arguments = self._items()
        self.stack.append(_left_out(kind))

    def _inst(self, name: str) -> None:
        self._items()
        self._push_global(name.replace(" ", "."))
        self.stack.append(_left_out(self.stack.pop()))

    def _global(self, name: str) -> None:
        self._push_global(name.replace(" ", "."))

    def _stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("the name of a function is not text")
        self._push_global(f"{module}.{name}")

    def _push_global(self, name: str) -> None:
        if self.vocabulary.knows(name):
            self.stack.append(Global(name))
        elif self.left_out is not None:
            self.left_out.add(name[:200])
            self.stack.append(LeftOut(name[:200]))
        else:
            raise Refused(f"it names {name[:200]}")

    def _binpersid(self, _: None) -> None:
        self.stack.append(self.vocabulary.stored(self.stack.pop()))

    def _reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._called(function, arguments))

    def _called(self, function: Any, arguments: Any) -> Any:
        if type(function) is LeftOut:
            return function
        if type(function) is not Global:
            raise ValueError("it calls something that is not a function")
        if type(arguments) is not tuple:
            arguments = self.vocabulary.bare(function.name, arguments)
        made = self.vocabulary.call(function.name, arguments)
        self.most -= len(made) if isinstance(made, _SIZED) else 0
        if self.most < 0:
            cause = "a bomb: calls in its pickle make far more than it holds"
            raise CheckpointError(f"{cause}\nget the file from a source that you trust")
        return made

    def _build(self, _: None) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is not LeftOut:
            self.vocabulary.build(self.stack[-1], state)


def checked_key(key: Any) -> Any:
    """A key of a dict, or a member of a set. Only these: hashing nested tuples or large numbers can take forever."""
    parts = key if type(key) is tuple and len(key) <= _LONGEST_KEY else (key,)
    for part in parts:
        if type(part) not in (str, bytes, bool, float, type(None)) and not (type(part) is int and abs(part) < 2**60):
            raise Refused(f"a dict or a set in it has a key of type {type(part).__name__}")
    return key


def bytes_of(text: Any = b"", encoding: Any = "latin1") -> bytes:
    """The bytes that a call makes of bytes or text; not of a number, which would be how many to make."""
    if type(text) in (bytes, bytearray):
        return bytes(text)
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8"):
        raise ValueError("bytes in an unknown form")
    return text.encode(encoding)


def _left_out(kind: Any) -> LeftOut:
    if type(kind) is not LeftOut:
        raise Refused("it makes objects in an unusual way")
    return kind
