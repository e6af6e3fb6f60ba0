"""The equations, step by step in NumPy and float64, and the mistakes that people make with them.

The module shares no code with jaxrnn. `locate` compares wrong results with it.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .cases import KINDS, Case, NamedArrays

ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
GATES = {"RNN": ("h",), "LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n")}


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A mistake in the equations.

    Attributes:
        cause: a description for people.
        swapped: two gates whose rows are exchanged.
        what: a keyword of `_layer` and `run`.
    """

    cause: str
    what: str = ""
    swapped: tuple[str, str] | None = None


NONE = Mistake("nothing is wrong")


def mistakes(case: Case) -> Iterator[Mistake]:
    """The mistakes that could show in a case."""
    family, cells = KINDS[case.kind].module.removesuffix("Cell"), case.steps is None
    for pair in itertools.combinations(GATES[family], 2):
        yield Mistake(f"the gates {pair[0]} and {pair[1]} are exchanged", swapped=pair)
    if family == "GRU":
        if case.arguments.get("bias", True):
            yield Mistake("b_hn is missing", "no b_hn")
            yield Mistake("the biases are folded: b_hn belongs inside r * (W_hn h + b_hn)", "folded")
        yield Mistake("z is taken the other way round: h' = (h - n) * z + n", "combine")
    if family == "LSTM":
        yield Mistake("a stale carry: c is not kept from step to step", "stale c")
    if not cells:
        yield Mistake("a stale carry: every step starts from the first state", "stale")
    if case.arguments["hidden_size"] * len(GATES[family]) == case.arguments["hidden_size"]:
        yield Mistake("W_hh is transposed", "transposed")
    if case.arguments["hidden_size"] == case.arguments["input_size"]:
        yield Mistake("W_ih and W_hh are exchanged", "exchanged")
    yield Mistake("TF32: products of numbers with 10 bits after the binary point", "tf32")
    if cells:
        return
    if case.arguments["bidirectional"] and (case.lengths is not None or case.mask is not None):
        yield Mistake("the backward direction does not start at each row's own last step", "reverse start")
    if case.lengths is not None:
        yield Mistake("padding leaks: the state goes on past a row's end", "leak")
        yield Mistake("lengths are one too short", "shorter")
        yield Mistake("lengths are one too long", "longer")
    if case.mask is not None:
        yield Mistake("padding leaks: the state goes on at masked steps", "leaks")
        yield Mistake("the mask is ignored: padding leaks", "no mask")
        yield Mistake("the mask is the other way round: True at padding", "inverted")
        yield Mistake("the mask is taken for lengths: its valid steps are counted, wherever they are", "counted")
        yield Mistake("the mask makes inputs 0, and nothing else: the state has to be held", "inputs")
        yield Mistake("the mask makes outputs 0, and nothing else: the state has to be held", "outputs")
        yield Mistake("the state becomes 0 at masked steps: it has to be held", "zeroed")
        yield Mistake("masked steps repeat the last output: theirs have to be 0", "repeated")
    if case.arguments["bidirectional"]:
        if case.arguments["num_layers"] > 1:
            yield Mistake("h_n is ordered by direction before layer", "h_n order")
        yield Mistake("the backward direction runs forward", "no reverse")


def run(case: Case, arrays: tuple[NamedArrays, NamedArrays], mistake: Mistake = NONE) -> dict[str, Any]:
    """The results of a case by name, and under "layers" each layer's output, a list.

    Args:
        case: the case.
        arrays: the parameters and the inputs, as `case.arrays()` gives them first.
        mistake: the mistake to make.
    """
    parameters, inputs = arrays
    kind = KINDS[case.kind]
    family = kind.module.removesuffix("Cell")
    x = inputs["input"]
    single = x.ndim == (1 if case.steps is None else 2)
    states = [inputs.get(f"{name}_0") for name in case.states]
    if case.steps is None:
        x = x.reshape(1, -1, x.shape[-1])
        first = [None if s is None else s.reshape(1, -1, s.shape[-1]) for s in states]
        suffixes = [[""]]
    else:
        if case.arguments.get("batch_first") and not single:
            x = x.swapaxes(0, 1)
        x = x[:, None] if single else x
        first = [None if s is None else (s[:, None] if single else s) for s in states]
        directions = ("", "_reverse")[: 1 + case.arguments["bidirectional"]]
        suffixes = [[f"_l{layer}{d}" for d in directions] for layer in range(case.arguments["num_layers"])]
    count, rows = x.shape[:2]
    valid, taken = (_valid(case, count, rows, what) for what in ("", mistake.what))
    if mistake.what == "inputs":
        x = np.where(valid[..., None], x, 0)
    layers, last = [], []
    for depth, names in enumerate(suffixes):
        outputs = []
        for side, suffix in enumerate(names):
            roles = [role for role in ROLES if role + suffix in parameters]
            weights = {role: parameters[role + suffix] for role in roles}
            index = depth * len(names) + side
            hidden = weights["weight_hh"].shape[0] // len(GATES[family])
            sizes = [weights["weight_hh"].shape[1], hidden][: len(case.states)]
            start = [np.zeros((rows, n)) if s is None else s[index] for s, n in zip(first, sizes, strict=True)]
            output, end = _layer(family, case, weights, x, start, taken, bool(side), mistake)
            outputs.append(output)
            last.append(end)
        x = np.concatenate(outputs, axis=-1)
        layers.append(x)
    if mistake.what == "outputs":
        layers[-1] = np.where(valid[..., None], layers[-1], 0)
    if mistake.what == "h_n order":
        last = [last[2 * layer + side] for side in (0, 1) for layer in range(len(suffixes))]
    results: dict[str, Any] = {
        f"{name}_n": np.stack([end[index] for end in last]) for index, name in enumerate(case.states)
    }
    if case.steps is None:
        return {name: (a[0, 0] if single else a[0]) for name, a in results.items()} | {"layers": layers}
    output = layers[-1].swapaxes(0, 1) if case.arguments.get("batch_first") and not single else layers[-1]
    results["output"] = output
    if single:
        results = {name: a[:, 0] for name, a in results.items()}
    return results | {"layers": layers}


def _valid(case: Case, count: int, rows: int, what: str) -> np.ndarray:
    """Which steps are valid, (time, rows), or are taken to be."""
    times, valid = np.arange(count)[:, None], case.valid()
    if valid is None:
        lengths = np.full(rows, count) if case.lengths is None else np.array(case.lengths)
        return times < lengths + {"shorter": -1, "longer": 1}.get(what, 0)
    valid = valid.T if case.arguments.get("batch_first") else valid
    wrong = {"inverted": ~valid, "counted": times < valid.sum(axis=0)}
    return wrong.get(what, valid | (what in ("no mask", "inputs", "outputs")))


def _layer(
    family: str,
    case: Case,
    weights: Mapping[str, np.ndarray],
    x: np.ndarray,
    start: list[np.ndarray],
    valid: np.ndarray,
    reverse: bool,
    mistake: Mistake,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """One layer in one direction: the outputs, and the states after each row's last step.

    `valid` tells which steps are the row's own, (time, rows).
    """
    what = mistake.what
    names = GATES[family]
    if mistake.swapped:
        a, b = (names.index(name) for name in mistake.swapped)
        order = list(range(len(names)))
        order[a], order[b] = b, a
        weights = {
            role: array if role == "weight_hr" else np.concatenate([np.split(array, len(names))[k] for k in order])
            for role, array in weights.items()
        }
    w_ih, w_hh = weights["weight_ih"], weights["weight_hh"]
    if what == "exchanged":
        w_ih, w_hh = w_hh, w_ih
    if what == "transposed":
        w_hh = w_hh.T
    b_ih, b_hh = (weights.get(name, np.zeros(len(w_hh))) for name in ("bias_ih", "bias_hh"))

    def product(a: np.ndarray, w: np.ndarray) -> np.ndarray:
        return _tf32(a) @ _tf32(w).T if what == "tf32" else a @ w.T

    count = len(x)
    state, output = list(start), np.zeros((count, len(start[0]), start[0].shape[1]))
    for t in range(count)[:: -1 if reverse and what != "no reverse" else 1]:
        alive = valid[t][:, None]
        held = ~alive & (what not in ("leaks", "reverse start" if reverse else "leak"))
        h = start[0] if what == "stale" else state[0]
        padded = np.where(alive, x[t], 0)
        input_part = np.split(product(padded, w_ih) + b_ih, len(names), axis=-1)
        hidden_part = np.split(product(h, w_hh) + b_hh, len(names), axis=-1)
        after = _step(family, KINDS[case.kind].arguments, what, input_part, hidden_part, b_hh, h, state)
        if "weight_hr" in weights:
            after[0] = product(after[0], weights["weight_hr"])
        if what == "stale c":
            after[1] = state[1]
        state = [np.where(held, old * (what != "zeroed"), new) for new, old in zip(after, state, strict=True)]
        output[t] = np.where(alive | (what == "repeated"), state[0], 0)
    return output, state


def _step(
    family: str, arguments: Mapping[str, Any], what: str, a: list, b: list, b_hh: np.ndarray, h: np.ndarray, state: list
) -> list[np.ndarray]:
    if family == "RNN":
        total = a[0] + b[0]
        return [np.maximum(total, 0) if arguments["nonlinearity"] == "relu" else np.tanh(total)]
    if family == "LSTM":
        i, f, g, o = (p + q for p, q in zip(a, b, strict=True))
        c = _sigmoid(f) * state[1] + _sigmoid(i) * np.tanh(g)
        return [_sigmoid(o) * np.tanh(c), c]
    r, z = (_sigmoid(p + q) for p, q in zip(a[:2], b[:2], strict=True))
    b_hn = np.split(b_hh, 3)[2]
    inside = b[2] - (b_hn if what in ("no b_hn", "folded") else 0)
    n = np.tanh(a[2] + r * inside + (b_hn if what == "folded" else 0))
    z = 1 - z if what == "combine" else z
    return [(1 - z) * n + z * h]


def _sigmoid(a: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(a / 2))


def _tf32(a: np.ndarray) -> np.ndarray:
    """Rounded to 10 bits after the binary point, to nearest."""
    bits = a.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32).astype(np.float64)
