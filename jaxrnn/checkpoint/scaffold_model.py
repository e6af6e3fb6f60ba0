"""Make a scaffold's classes: what becomes of every level of names, and the code of it."""

import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of, to_numpy
from jaxrnn.checkpoint.errors import CheckpointError
from jaxrnn.checkpoint.find import FoundRNN, find_rnns
from jaxrnn.checkpoint.scaffold_layers import EMBED, NORM, Layer, Tensor, code_of, layer_of, recurrent
from jaxrnn.checkpoint.scaffold_text import (
    Code,
    Group,
    Loop,
    NewNames,
    comment,
    is_name,
    laid_out,
    quoted,
    singular,
)
from jaxrnn.spec import level_outside

_DEEPEST = 32  # a module within a module takes many of Python's frames
_MOST_LISTED, _MOST_PERMUTED = 20, 6
_NARROW = {np.dtype(np.int64): np.dtype(np.int32), np.dtype(np.uint64): np.dtype(np.uint32)}
STAND_IN = "todo"  # the function that stands for a step without weights
_LINENS = {"name", "parent", "scope", "touch", *dir(linen.Module)}
_NNXS = {name for name in dir(nnx.Module) if not name.startswith("_")}
_TOUCH = ['        """Call every layer once, which makes its parameters. Drop this when `__call__` does it."""']
_INTEGERS = "These are no weights: leave them out of what is differentiated"
_ATTENTION = "These are torch.nn.MultiheadAttention's: the rows of query, key and value, one after the other"
_GAPS = "The numbers between have no weights, such as activations"


class Made(NamedTuple):
    """An instance of a class of the program."""

    name: str


class Numbers(NamedTuple):
    """A level whose names are numbers. `kind` is "list", "dict", or in NNX "sequential"."""

    kind: str
    items: dict[int, "Item"]


_Level = dict[str, Any]  # of tensors and levels, by name
Item = Layer | Made | Numbers | Tensor


class Statement(NamedTuple):
    """An attribute of a class: the code that sets it, and comments."""

    before: str
    code: Code
    notes: tuple[str, ...] = ()


class _Class(NamedTuple):
    """A class of the program."""

    name: str
    base: str
    inherits: bool
    statements: tuple[Statement, ...]
    call: tuple[str, ...]
    touch: tuple[Code, ...]


class Program:
    """The classes of a program.

    Attributes:
        linen: whether its modules are Linen's.
        wide: the key of a tensor that JAX has in its 64-bit mode alone; empty if there is none.
        root: what becomes of all tensors.
    """

    def __init__(self, tensors: Mapping[str, Any], in_linen: bool) -> None:
        self.linen = in_linen
        self.wide: str = next((key for key, value in tensors.items() if _is_wide(key, value)), "")
        self._rnns = {found.prefix: found for found in _found(tensors)}
        self._new = NewNames(["Model", STAND_IN, "jax", "jaxrnn", "jnp", "linen", "nnx"])
        self._classes: dict[Any, _Class] = {}  # by what is in them
        tree = _tree({key: Tensor(key, self._dtype(value), tuple(value.shape)) for key, value in tensors.items()})
        self.root: Item = self._item(tree, "", "Model")

    def _dtype(self, value: Any) -> np.dtype:
        dtype = dtype_of(value)
        return dtype if self.wide else _NARROW.get(dtype, dtype)

    def _item(self, level: _Level | Tensor, prefix: str, name: str, as_class: bool = False) -> Item:
        """What a level of names becomes.

        Args:
            level: the level.
            prefix: what its keys start with.
            name: a word for it.
            as_class: whether it cannot be a list.
        """
        if isinstance(level, Tensor):
            return level
        found = self._rnns.get(prefix)
        if found is not None and level.keys() == found.spec.shapes().keys():
            return recurrent(found)
        tensors_alone = all(isinstance(child, Tensor) for child in level.values())
        if found is None and tensors_alone and (layer := layer_of(name, level)) is not None:
            return layer
        if found is None and not as_class and self._can_be_list(level, prefix):
            name = singular(name)
            numbers = sorted(map(int, level))
            items = {each: self._item(level[str(each)], f"{prefix}{each}.", name) for each in numbers}
            return Numbers(self._kind(numbers, items, prefix), items)
        return self._class(level, prefix, name, found)

    def _can_be_list(self, level: _Level, prefix: str) -> bool:
        if not all(_is_number(name) for name in level):
            return False
        # Linen has parameters in modules alone, and lists in modules.
        return not self.linen or (prefix != "" and not any(isinstance(child, Tensor) for child in level.values()))

    def _kind(self, numbers: list[int], items: Mapping[int, Item], prefix: str) -> str:
        last = numbers[-1]
        if last + 1 == len(numbers) and (prefix or self.linen):
            return "list"
        if self.linen or last > 4 * len(numbers) or any(isinstance(item, Tensor) for item in items.values()):
            return "dict"
        return "sequential"

    def _class(self, level: _Level, prefix: str, name: str, found: FoundRNN | None) -> Made:
        """A class for a level of names. In NNX it inherits from a recurrent layer that has more than its weights."""
        base = "linen.Module" if self.linen else "nnx.Module"
        statements: list[Statement] = []
        own: list[tuple[str, Item]] = []
        inherits = found is not None and not self.linen
        if found is not None and not self.linen:
            layer = recurrent(found)
            base = layer.nnx[0]
            arguments = Group("super().__init__(", [*layer.nnx[1:], *layer.settings, "rngs=rngs"], ")")
            statements.append(Statement("", arguments, notes_of(layer)))
            level = {child: below for child, below in level.items() if child not in found.spec.shapes()}
        taken, attributes = set(level), NewNames([*_LINENS, *filter(_is_attribute, level)])
        for child, below in level.items():
            # Linen names the items of lists itself: those of `layers` are layers_0 and so on.
            generated = set(_names_in_linen(child, below)) if self.linen else set()
            as_class = self.linen and not (_is_attribute(child) and generated.isdisjoint(taken))
            taken |= generated
            item = self._item(below, f"{prefix}{child}.", child, as_class)
            access = self._access(child, attributes)
            statements.append(self.statement(child, prefix + child, access, item))
            own.append((access, item))
        call = () if inherits else tuple(_call(own))
        touch = tuple(code for access, item in own for code in self.touch(access, item)) if self.linen else ()
        code = tuple((each.before, str(each.code)) for each in statements)
        key = (base, code, call, tuple(map(str, touch))) if prefix else ()  # the whole model has its own
        if key not in self._classes:
            made = self._new.of_class(name) if prefix else "Model"
            self._classes[key] = _Class(made, base, inherits, tuple(statements), call, touch)
        return Made(self._classes[key].name)

    def _access(self, name: str, attributes: NewNames) -> str:
        """The code that gets an attribute."""
        if self.linen:
            return f"self.{name if _is_attribute(name) else attributes.attribute(name)}"
        return f"self.{name}" if is_name(name) else f"getattr(self, {quoted(name)})"

    def statement(self, name: str, key: str, access: str, item: Item) -> Statement:
        """The statement that sets an attribute."""
        notes = notes_of(item)
        if self.linen:
            given = quoted(name) if isinstance(item, Tensor) or not _is_attribute(name) else ""
            return Statement(f"{access} = ", self.code(item, given), notes)
        if name.startswith("_") and (hasattr(nnx.Module, name) or name.startswith("_pytree__")):
            cause = f"{key:.200}: an nnx.Module has the attribute {name} itself"
            remedy = f"rename it by jaxrnn convert IN OUT --rename {key:.200}=another, or write the model in Linen"
            raise CheckpointError(f"{cause}\n{remedy}")
        if name in _NNXS:
            notes = (*notes, f"This takes the place of the method nnx.Module.{name}")
        if is_name(name):
            return Statement(f"{access} = ", self.code(item), notes)
        return Statement("", Group("setattr(", ["self", quoted(name), self.code(item)], ")"), notes)

    def code(self, item: Item, name: str = "") -> Code:
        """The expression that makes an item.

        Args:
            item: the item.
            name: in Linen, the literal of its name, if it is not that of the attribute.
        """
        last = [f"name={name}"] if name else [] if self.linen else ["rngs=rngs"]
        if isinstance(item, Layer):
            start, *arguments = item.linen if self.linen else item.nnx
            return Group(f"{start}(", [*arguments, *item.settings, *last], ")")
        if isinstance(item, Made):
            return Group(f"{item.name}(", last, ")")
        if isinstance(item, Tensor):
            dtype = [] if item.dtype == np.float32 and not self.wide else [code_of(item.dtype)]
            if self.linen:
                return Group("self.param(", [name, "linen.initializers.zeros", str(item.shape), *dtype], ")")
            return Group("nnx.Param(", [Group("jnp.zeros(", [str(item.shape), *dtype], ")")], ")")
        codes = {number: self.code(each) for number, each in item.items.items()}
        if item.kind == "list":
            items = Group("[", _repeated(list(codes.values())), "]")
            return items if self.linen else Group("nnx.List(", [items], ")")
        if item.kind == "sequential":
            for number, each in item.items.items():
                if isinstance(each, Layer) and each.has_state and not each.nnx[0].endswith("Cell"):
                    codes[number] = Group("jaxrnn.OutputOnly(", [codes[number]], ")")
            return Group("nnx.Sequential(", [codes.get(number, STAND_IN) for number in range(max(codes) + 1)], ")")
        pairs: list[Code] = []
        for number, code in codes.items():
            start = f'"{number}": '
            pairs.append(code._replace(start=start + code.start) if isinstance(code, Group) else f"{start}{code}")
        return Group("{", pairs, "}") if self.linen else Group("nnx.Dict(", [Group("{", pairs, "}")], ")")

    def touch(self, access: str, item: Item) -> list[Code]:
        """Statements that call what is in an item once, for Linen."""
        if isinstance(item, Layer):
            usual = item.dtype == np.float32 and not self.wide
            dtype = ["int"] if item.rank == EMBED else [] if usual else [code_of(item.dtype)]
            return [Group(f"{access}(", [Group("jnp.zeros(", [str(item.input), *dtype], ")"), *item.call], ")")]
        if isinstance(item, Made):
            return [f"{access}.touch()"]
        if isinstance(item, Tensor):
            return []
        each = [self.touch("layer", below) for below in item.items.values()]
        if len(each) > 1 and len(each[0]) == 1 and len({*map(str, each)}) == 1:
            values = access if item.kind == "list" else f"{access}.values()"
            return [f"for layer in {values}:\n    {each[0][0]}"]
        quote = '"' if item.kind == "dict" else ""
        places = {f"{access}[{quote}{number}{quote}]": below for number, below in item.items.items()}
        return [code for place, below in places.items() for code in self.touch(place, below)]

    def class_lines(self) -> Iterator[str]:
        """The classes, each after those that it uses."""
        counts = self.counts()
        seen: set[str] = set()
        for each in self._classes.values():
            yield from ["", "", f"class {each.name}({each.base}):"]
            yield "    def setup(self):" if self.linen else "    def __init__(self, *, rngs: nnx.Rngs):"
            for line in each.statements:
                yield from statement_lines(line, 2, counts, seen)
            if not each.inherits:
                yield from ["", "    def __call__(self, x):"]
                for number, text in enumerate(each.call):
                    yield from comment(f"  {text}" if number else text, 2, "    ")
                words = f"write {each.name}.__call__: the file holds weights alone"
                yield from laid_out("raise ", Group("NotImplementedError(", [quoted(words)], ")"), "", 2)
            if self.linen:
                yield from ["", "    def touch(self):"]
                if each.name == "Model":
                    yield from _TOUCH
                elif not each.touch:
                    yield "        pass  # setup has made the parameters"
                for code in each.touch:
                    lines = str(code).split("\n")
                    yield from laid_out("", code, "", 2) if len(lines) == 1 else [f"        {line}" for line in lines]

    def counts(self) -> Counter[str]:
        """The number of statements that have each note."""
        return Counter(note for each in self._classes.values() for line in each.statements for note in line.notes)


def statement_lines(statement: Statement, depth: int, counts: Mapping[str, int], seen: set[str]) -> list[str]:
    """A statement with its comments. A note is written once."""
    lines = []
    for note in dict.fromkeys(statement.notes):
        if note not in seen:
            lines += comment(f"Here and below, {note[0].lower()}{note[1:]}." if counts[note] > 1 else f"{note}.", depth)
            seen.add(note)
    return [*lines, *laid_out(statement.before, statement.code, "", depth)]


def _is_attribute(name: str) -> bool:
    """Whether Linen takes it as the name of an attribute."""
    return is_name(name) and not name.startswith("_") and name not in _LINENS


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10 and str(int(name)) == name


def _is_wide(key: str, value: Any) -> bool:
    """Whether JAX needs its 64-bit mode for this tensor."""
    dtype = dtype_of(value)
    if dtype == NO_NUMBERS:
        to_numpy(key, value)  # whose message says what it is
    if dtype in _NARROW and not key.endswith("num_batches_tracked"):
        array, limits = to_numpy(key, value), np.iinfo(_NARROW[dtype])
        return bool(array.size) and not limits.min <= array.min() <= array.max() <= limits.max
    return dtype.name in ("float64", "complex128")


def _found(tensors: Mapping[str, Any]) -> list[FoundRNN]:
    try:
        return find_rnns(tensors)
    except CheckpointError as error:
        warnings.warn(f"each of these becomes a parameter of its own: {error}", stacklevel=level_outside())
        return []


def _tree(tensors: Mapping[str, Tensor]) -> _Level:
    """Tensors by levels of names."""
    root: _Level = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if len(parts) > _DEEPEST:
            cause = (
                f"{key[:100]}{'...' * (len(key) > 100)} has {len(parts)} levels of names, and {_DEEPEST} are the most"
            )
            raise CheckpointError(f"{cause}\nwrite a part of the model: give prefix=, or --prefix on the command line")
        for count in range(1, len(parts)):
            if ".".join(parts[:count]) in tensors:  # it is a tensor, so no level: one name has the rest of the key
                parts[count - 1 :] = [".".join(parts[count - 1 :])]
                break
        level = root
        for part in parts[:-1]:
            level = level.setdefault(part, {})
        level[parts[-1]] = tensor
    return root


def _names_in_linen(name: str, level: _Level | Tensor) -> Iterator[str]:
    """The names that Linen gives to the items of a list."""
    if not isinstance(level, Tensor) and all(map(_is_number, level)):
        for number, below in level.items():
            yield f"{name}_{number}"
            yield from _names_in_linen(f"{name}_{number}", below)


def _repeated(codes: list[Code]) -> list[Code]:
    """Items of a list, where a comprehension makes those that are alike."""
    runs = [(code, len(list(same))) for code, same in itertools.groupby(codes, str)]
    firsts = iter(codes)
    items: list[Code] = []
    for _, count in runs:
        code = next(itertools.islice(firsts, count - 1, None)) if count > 1 else next(firsts)
        if count < 3 and len(runs) > 1:
            items += [code] * count
        elif count == 1:
            items.append(code)
        else:
            items.append(Loop(code, count) if len(runs) == 1 else Group("*(", [Loop(code, count)], ")"))
    return items


def notes_of(item: Item) -> tuple[str, ...]:
    """Comments about an item. A comment that several items have is written once."""
    notes: list[str] = []
    if isinstance(item, Layer):
        notes += item.notes
    elif isinstance(item, Tensor):
        notes.append("" if jnp.issubdtype(item.dtype, jnp.inexact) else _INTEGERS)
        notes.append(_ATTENTION if item.key.endswith("in_proj_weight") else "")
    elif isinstance(item, Numbers):
        notes.append(_GAPS if max(item.items) + 1 > len(item.items) else "")
        notes += [note for each in item.items.values() for note in notes_of(each)]
    return tuple(filter(None, notes))


def _call(own: Sequence[tuple[str, Item]]) -> Iterator[str]:
    """Comments about what `__call__` has to do."""
    if order := _chain(own):
        yield "The sizes fit in this order. Add what has no weights, such as activations:"
        for access, layer in order:
            yield f"{'x, _' if layer.has_state else 'x'} = {access}(x)  # {_sizes(layer)}"
        yield "return x"
        return
    modules = [(access, item) for access, item in own if not isinstance(item, Tensor)]
    if modules:
        yield "In the order of the file, with the sizes of inputs and outputs:"
    for access, item in modules[:_MOST_LISTED]:
        yield f"{access}: {_described(item)}"
    if len(modules) > _MOST_LISTED:
        yield f"and {len(modules) - _MOST_LISTED} more"


def _described(item: Item) -> str:
    if isinstance(item, Layer):
        return _sizes(item)
    if isinstance(item, Tensor):
        return str(item.shape)
    if isinstance(item, Made):
        return item.name
    kinds = Counter(map(_described, item.items.values()))
    return ", ".join(
        f"{count} times {kind}" if count > 1 else kind for kind, count in itertools.islice(kinds.items(), 5)
    )


def _sizes(layer: Layer) -> str:
    before, after = layer.sizes
    return f"{'integers' if before is None else before} -> {after}"


def _chain(own: Sequence[tuple[str, Item]]) -> list[tuple[str, Layer]]:
    """The layers in an order in which their sizes fit; nothing if there is none, or if several are as likely."""
    layers = [(access, item) for access, item in own if isinstance(item, Layer)]
    if len(layers) < len(own) or not layers:
        return []
    orders = itertools.permutations(layers) if len(layers) <= _MOST_PERMUTED else [tuple(layers)]

    def fits(order: Sequence[tuple[str, Layer]]) -> bool:
        return all(one.sizes[1] == other.sizes[0] for (_, one), (_, other) in itertools.pairwise(order))

    def unlikely(order: Sequence[tuple[str, Layer]]) -> int:
        ranks = [layer.rank for _, layer in order if layer.rank != NORM]
        return sum(one > other for one, other in itertools.combinations(ranks, 2))

    fitting = [list(order) for order in orders if fits(order)]
    least = min(map(unlikely, fitting), default=0)
    likely = [order for order in fitting if unlikely(order) == least]
    return layers if layers in likely else likely[0] if len(likely) == 1 else []
