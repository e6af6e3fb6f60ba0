"""Calls of torch's recurrent functions in programs that torch saved: the names and settings of their weights."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrnn.checkpoint.tables import UNKNOWN

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_MODES = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}  # of torch's classes
_NAME = re.compile(r"(?:parametrizations\.)?(weight|bias)_(ih|hh|hr)_l(\d{1,9})(_reverse)?")


class Call(NamedTuple):
    """A call of recurrent layers, or of a cell.

    Attributes:
        op: torch's function: "lstm", "gru", "rnn_tanh", "rnn_relu".
        settings: its arguments that are not tensors, by the names of a module's; nothing for a cell.
        is_cell: whether it is a cell's.
    """

    op: str
    settings: Mapping[str, Any]
    is_cell: bool = False

    def names(self, count: int) -> list[str]:
        """torch's names of `count` weights, in the order of the function; an empty list if there cannot be as many."""
        roles = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
        if self.is_cell:
            return roles[:count] if count in (2, 4) else []
        layers, biased, both = (self.settings.get(name) for name in ("num_layers", "bias", "bidirectional"))
        if type(layers) is not int or layers < 1 or type(biased) is not bool or type(both) is not bool:
            return []
        plain = roles[:4] if biased else roles[:2]
        ends = ("", "_reverse")[: 1 + both]
        fits = [each for each in (plain, [*plain, "weight_hr"]) if len(each) * layers * len(ends) == count]
        return [f"{role}_l{layer}{end}" for layer in range(layers) for end in ends for role in fits[0]] if fits else []


class Said:
    """What a program says of its recurrent modules.

    Attributes:
        by_prefix: the settings, by the prefix of a module, as `named.Described.said`.
        words: contradictions, with remedies.
    """

    def __init__(self) -> None:
        self.by_prefix: dict[str, dict[str, Any]] = {}
        self.words: list[tuple[str, str]] = []
        self._in_doubt: set[str] = set()
        self._heard: set[str] = set()
        self._leaves: tuple[Mapping[str, Any], int, dict[str, list[str]]] = {}, 0, {}  # of tensors, and how many

    def add_call(self, call: Call, weights: Sequence[str], tensors: Mapping[str, Any]) -> None:
        """Take the settings from a call with weights of these names, if they are those of one module.

        `tensors` has descriptions of all tensors. A module that is shared has them under several names: each gets the
        settings, of which a program may name one.
        """
        names = call.names(len(weights))
        prefix = weights[0].removesuffix(names[0]) if names else ""
        if names and list(weights) == [prefix + name for name in names]:
            heard = repr((call, names, [tensors[name] for name in weights]))
            if heard in self._heard:  # of a shared module
                return
            self._heard.add(heard)
            for name in self._ending(names[0], tensors):
                other = name.removesuffix(names[0])
                if all(tensors.get(other + each) == tensors[prefix + each] for each in names):
                    self._add(other, call.op, call.settings, call.settings.get("num_layers", 1))
        else:
            owners = {name.rpartition(".")[0] for name in weights}
            if len(owners) == 1 and _NAME.fullmatch(weights[0].rpartition(".")[2]):
                owner = owners.pop()
                self._doubt(f"{owner}." if owner else "", "its code calls it with settings that do not fit its weights")

    def add_module(self, prefix: str, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take the settings of a module's class.

        Args:
            prefix: the module's.
            settings: by their names in torch's class: mode, num_layers, and so on.
            shapes: those of its tensors, by their names below the prefix.
        """
        parts = [match for name in shapes if (match := _NAME.match(name))]
        mode = settings.get("mode")
        op = _MODES.get(mode) if type(mode) is str else None
        if not parts or op is None:
            state = shapes.get("weight_hh", ())
            simple = "weight_ih" in shapes and len(state) == 2 and state[0] == state[1]  # no gates
            if simple and settings.get("nonlinearity") in ("tanh", "relu"):
                self._add(prefix, f"rnn_{settings['nonlinearity']}", {}, 1)
            return
        there = {
            "num_layers": 1 + max(int(part[3]) for part in parts),
            "bidirectional": any(part[4] for part in parts),
            "bias": any(part[1] == "bias" for part in parts),
        }
        wrong = [f"{name}={settings[name]}" for name, value in there.items() if settings.get(name) not in (None, value)]
        hidden = settings.get("hidden_size")
        rows = {
            shape[0]
            for name, shape in shapes.items()
            if re.fullmatch(r"weight_[ih]h_l0(_\w+)?", name) and len(shape) == 2
        }
        if type(hidden) is int and rows and _GATES[op] * hidden not in rows:
            wrong += [f"mode={mode}", f"hidden_size={hidden}"]
        if wrong:
            self._doubt(prefix, f"its class says {', '.join(wrong)}, which does not fit its weights")
        else:
            self._add(prefix, op, settings, there["num_layers"])

    def _ending(self, leaf: str, tensors: Mapping[str, Any]) -> list[str]:
        """The names of tensors that have this one as their last."""
        of, count, leaves = self._leaves
        if of is not tensors or count != len(tensors):
            leaves = {}
            for name in tensors:
                leaves.setdefault(name.rpartition(".")[2], []).append(name)
            self._leaves = tensors, len(tensors), leaves
        return leaves.get(leaf, [])

    def _add(self, prefix: str, op: str, settings: Mapping[str, Any], num_layers: Any) -> None:
        said: dict[str, Any] = {}
        if op.startswith("rnn_"):
            said["nonlinearity"] = op.removeprefix("rnn_")
        if type(settings.get("batch_first")) is bool:
            said["batch_first"] = settings["batch_first"]
        dropout = settings.get("dropout")
        if num_layers != 1 and isinstance(dropout, int | float) and 0 <= dropout <= 1:
            said["dropout"] = float(dropout)
        known = self.by_prefix.setdefault(prefix, {})
        if any(known.get(name, value) != value for name, value in said.items()):
            self._doubt(prefix, f"its code says {_shown(known)}, and {_shown(said)}")
        elif prefix not in self._in_doubt:
            known.update(said)

    def _doubt(self, prefix: str, text: str) -> None:
        if prefix not in self._in_doubt:
            self.words.append((f"{prefix or 'the model'}: {text}", UNKNOWN))
        self._in_doubt.add(prefix)
        self.by_prefix.pop(prefix, None)

    def settings(self) -> dict[str, dict[str, Any]]:
        return {prefix: said for prefix, said in self.by_prefix.items() if said and prefix not in self._in_doubt}


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
