"""The code in a TorchScript archive: what it says of weights and settings. It is read as text, and never run.

torch prints the code itself, in one form: an assignment a line, each value with a name. Only lines of a few forms are
looked at. Where the code does something else, it says nothing here.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxrnn.checkpoint.formats.recurrent_calls import Call

Path = tuple[str, ...]  # names of attributes, from a module down; of a constant ("CONSTANTS", "c0")

CONSTANTS = "CONSTANTS"
_CLASS = re.compile(r"class (\w+)(?:\((\w+)\))?:")
_NAMES = re.compile(r'  (__parameters__|__buffers__) = \[((?:"(?:[^"\\]|\\.)*", )*)\]')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_FINAL = re.compile(r"  (\w+) : Final\[(?:bool|int|float|str)\] = (.+)")
_DEF = re.compile(r"  def \w+\((\w+): ")
_ATTRIBUTE = re.compile(r'    +(\w+) = (?:(\w+)\.(\w+)|getattr\((\w+), "((?:[^"\\]|\\.)*)"\))')
_LIST = re.compile(r"    +(\w+) = (\[[\w., ]*\])")
_CALL = re.compile(
    r"    +\w[\w, ]* = torch\.(?:(lstm|gru|rnn_tanh|rnn_relu)|(lstm|gru|rnn_tanh|rnn_relu)_cell)\((.*)\)"
)
_ARGUMENT = re.compile(r"(?:^|, )([\w.+-]+|\[[\w., ]*\])(?=, |$)")
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)", re.DOTALL)


class CodeCall(NamedTuple):
    """A call of recurrent layers, or of a cell, in the code.

    Attributes:
        call: the function and its settings.
        weights: the paths of the weights, in torch's order; or one path, that of a list of them. The path of a weight
            from elsewhere, such as an argument of the method, is empty.
        title: what the code calls the list of weights.
    """

    call: Call
    weights: tuple[Path, ...]
    title: str = ""


class Class(NamedTuple):
    """What the code says of a class.

    Attributes:
        is_module: whether it is a module's.
        parameters: their names.
        buffers: their names.
        settings: its constants.
        calls: those of recurrent functions in its methods.
        activations: tanh and relu, if its methods call them.
    """

    is_module: bool
    parameters: frozenset[str]
    buffers: frozenset[str]
    settings: dict[str, Any]
    calls: tuple[CodeCall, ...]
    activations: frozenset[str]


def classes(code: str) -> dict[str, Class]:
    """The classes in a file of code, by name."""
    found: dict[str, Class] = {}
    name, base, lines = "", "", list[str]()
    for line in [*code.split("\n"), "class "]:
        if not line.startswith(" "):
            if name:
                found[name] = _class(base, lines)
            header = _CLASS.fullmatch(line)
            name, base, lines = (header[1], header[2] or "", []) if header else ("", "", [])
        elif name:
            lines.append(line)
    return found


def _class(base: str, lines: list[str]) -> Class:
    names = {"__parameters__": list[str](), "__buffers__": list[str]()}
    settings: dict[str, Any] = {}
    for line in lines:
        if match := _NAMES.fullmatch(line):
            names[match[1]] = [_unquoted(text) for text in _QUOTED.findall(match[2])]
        elif match := _FINAL.fullmatch(line):
            settings[match[1]] = _value(match[2])
    return Class(
        base == "Module",
        frozenset(names["__parameters__"]),
        frozenset(names["__buffers__"]),
        settings,
        tuple(_calls(lines)),
        frozenset(name for name in ("tanh", "relu") if any(f"torch.{name}(" in line for line in lines)),
    )


def _calls(lines: list[str]) -> Iterator[CodeCall]:
    """The calls of recurrent layers in the methods of a class."""
    known: dict[str, Path] = {}
    lists: dict[str, str] = {}

    def path(name: str) -> Path | None:
        first, _, rest = name.partition(".")
        return (first, rest) if first == CONSTANTS else None if rest else known.get(name)

    for line in lines:
        if match := _DEF.match(line):
            known, lists = {match[1]: ()}, {}
        elif match := _ATTRIBUTE.fullmatch(line):
            owner, leaf = match[2] or match[4], match[3] or _unquoted(match[5] or "")
            known.pop(match[1], None)
            if (above := path(owner)) is not None:
                known[match[1]] = (*above, leaf)
        elif match := _LIST.fullmatch(line):
            lists[match[1]] = match[2]
        elif match := _CALL.fullmatch(line):
            arguments = _ARGUMENT.findall(match[3])
            settings, weights = ({}, arguments[2:]) if match[2] else _layers(arguments)
            title = weights[0] if len(weights) == 1 else ""
            if len(weights) == 1 and (text := lists.get(weights[0], weights[0])).startswith("["):
                weights = text[1:-1].split(", ")
            paths = tuple(path(each) or () for each in weights)
            if paths and (all(paths) or not any(paths)):
                yield CodeCall(Call(match[1] or match[2], settings, bool(match[2])), paths, title)


def _layers(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings and the weights in a call of layers: of padded sequences, or packed ones, which have no batch_first.

    Those are input, state, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first; and data,
    batch_sizes, state, weights, has_biases, num_layers, dropout, train, bidirectional.
    """
    if len(arguments) != 9:
        return {}, []
    packed = not isinstance(_value(arguments[3]), bool)
    values = [_value(each) for each in arguments[3 + packed :]]
    names = ("bias", "num_layers", "dropout", "train", "bidirectional", "batch_first")
    settings = {name: value for name, value in zip(names, values, strict=False) if name != "train"}
    return settings, [arguments[2 + packed]]


def _value(text: str) -> Any:
    """A literal of the code: True, 2, 0.5, "tanh"; None for anything else."""
    if text in ("True", "False"):
        return text == "True"
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    if re.fullmatch(r"-?\d*\.?\d*(?:e[+-]?\d{1,3})?", text) and re.search(r"\d", text):
        return float(text)
    match = _QUOTED.fullmatch(text)
    return _unquoted(match[1]) if match else None


def _unquoted(text: str) -> str:
    """A string of the code: torch escapes what is not ASCII, byte by byte."""

    def byte(match: re.Match[bytes]) -> bytes:
        letter = match[1]
        if len(letter) == 3:
            return bytes([int(letter, 8) & 255])
        return {b"n": b"\n", b"t": b"\t", b"r": b"\r"}.get(letter, letter)

    return _ESCAPE.sub(byte, text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
