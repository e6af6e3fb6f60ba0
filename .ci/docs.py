"""Writes what docstrings share into them, so that an editor shows all of it, and each sentence is kept once: here.

`python .ci/docs.py` tells which files differ from what it would write; with `--write` it writes them. A docstring's own
parts are its first paragraphs, the arguments that are in no table below, and everything from `Raises:` on. It also
writes the list of weights for type checkers, `jaxrnn/_core/weights.py`.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 100  # of lines in a notebook
LAYERS = 8  # of which type checkers know the weights

# What each argument of a constructor or a call means, wherever it is taken.
ARGUMENTS = {
    "input_size": "features of the input at each step.",
    "hidden_size": "features of the hidden state.",
    "num_layers": "how many layers are stacked.",
    "nonlinearity": '"tanh" or "relu".',
    "bias": "whether there are `bias_ih` and `bias_hh`.",
    "batch_first": "whether batched input and output are (batch, time, features) rather than (time, batch, features). "
    "It does not change hx and h_n.",
    "dropout": "the probability with which an output of each layer but the last is zeroed in training.",
    "recurrent_dropout": "the probability with which a number of h is zeroed in training before the recurrent product, "
    "with one mask for all steps and gates.",
    "variational_dropout": "whether `dropout`, too, has one mask for all steps.",
    "bidirectional": "whether each layer also runs backward in time.",
    "proj_size": "features of an LSTM's projected hidden state, less than hidden_size; 0 for no projection.",
    "param_dtype": "the parameters' floating dtype.",
    "kernel_init": "what draws `weight_ih` gate by gate, and `weight_hr` if there is one: a function init(key, shape, "
    "dtype), such as those of `jax.nn.initializers`, which gets the shape (features, hidden_size); or a dict from some "
    "gates to such functions. None: as torch, uniform within 1/sqrt(hidden_size) of 0. For Flax's own, give "
    "`**jaxrnn.initializers.FLAX`.",
    "recurrent_kernel_init": "the same for `weight_hh`.",
    "bias_init": "the same for `bias_ih`, with the shape (hidden_size,). It makes `bias_hh` 0, because the two add up. "
    "In GRU's n, where they do not, it draws both.",
    "rngs": "nnx.Rngs for the initial parameters and, where it is used, for dropout. Or a jaxrnn.TorchGenerator to "
    "draw the parameters as torch does; then a call with dropout needs `rngs` or `dropout_masks`.",
    "dtype": "the floating dtype to compute in, and of the output; by default the promoted dtype of inputs and "
    "parameters. States have the dtype of hx, if given: a float32 state is returned unrounded.",
    "precision": "the precision of the products, as for `jax.lax.dot_general`.",
    "remat": 'what the forward pass saves for the backward pass. "none": all it needs, nothing is recomputed. "gates": '
    "only the states; gates are recomputed. An integer k: the state before every k-th step; the rest is recomputed, k "
    "steps at a time. Values and gradients are the same, up to rounding.",
    "hidden_axis": "the mesh axis or axes, of type Auto, over which hidden units are sharded; None leaves sharding to "
    "XLA. For a module it may be a logical axis of Flax. A module stores it in its parameters' metadata, and creates "
    "them on the mesh in `jax.set_mesh`, if there is one.",
    "unroll": "how many steps the loop makes at a time, as for `jax.lax.scan`; if None, 4 on a GPU and 1 elsewhere.",
    "engine": 'what runs the loop over time: "auto"; a name in `jaxrnn.engines.ENGINES`; or a tuple of such names, of '
    "which the first that can run it does.",
    "x": "the input, (time, batch, input_size), or (batch, time, input_size) with `batch_first`, or unbatched (time, "
    "input_size); floating. Or a PackedSequence of such steps.",
    "hx": "the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM, of the shapes "
    "that are returned; zeros if None. A state that all rows share, such as a learned one, may have a batch of 1, or "
    "the last axis alone.",
    "lengths": "how many steps each row has, integers from 0 to time, (batch,), or for unbatched x (); all steps if "
    "None. Padding in x affects no result and no gradient. Under jit lengths are data, and cannot be checked: a length "
    "below 0 counts as 0, and one above time as time.",
    "mask": "True at valid steps, False at padding, which may be anywhere in a row; boolean, of the shape of x, or its "
    "data, without features. The results are those of the valid steps alone: at a masked step the state is held, and "
    "the output is 0.",
    "reset": "True at the steps before which the state is reset, such as the first of an episode; boolean, of the "
    "shape of x, or its data, without features. Ignored at masked steps and past a row's end. Not for a bidirectional "
    "network.",
    "reset_state": "the state that `reset` starts from, like hx; zeros if None.",
    "dropout_masks": "in place of random masks between layers, if `dropout` is above 0: for each layer but the last "
    "an array of 0 or 1, 1 where dropout keeps an output, (time, batch, directions * output size) even with "
    "`batch_first`, or (1, batch, ...) for one mask for all steps; without batch for unbatched x, and laid out like "
    "its data for a PackedSequence.",
}
# Linen's fields.
ARGUMENTS |= {
    "deterministic": "whether dropout and zoneout are off. With either, give it here or in the call.",
    "rng_collection": "the name of the random keys for dropout that `apply` is given.",
    "name": "the name of the module in its parent, as everywhere in Linen.",
}

# What a call of NNX's modules takes, and of Linen's.
_CALL_ARGUMENTS = {
    False: {
        "deterministic": "whether dropout and zoneout are off; by default as `train()` and `eval()` last set it.",
        "rngs": "nnx.Rngs, an nnx.RngStream or a jax key for dropout, in place of the module's own.",
    },
    True: {
        "deterministic": "whether dropout and zoneout are off. With either, give it here or as a field.",
        "rng": "a jax key for dropout, in place of the one that `apply` was given for `rng_collection`.",
    },
}

EQUATIONS = {
    "RNN": """
    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

or relu in place of tanh.""",
    "LSTM": """
    i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
    f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
    g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
    o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
    c_t = f * c_{t-1} + i * g
    h_t = o * tanh(c_t)

The rows of the weights and biases hold i, f, g, o in this order.""",
    "GRU": """
    r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
    z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
    n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
    h_t = (1 - z) * n + z * h_{t-1}

The rows of the weights and biases hold r, z, n in this order.""",
}
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}

# What someone who comes from torch would not expect.
_DIFFERENCES = """Differs from torch.nn.{name}:
    `dtype` is, as in Flax, the dtype to compute in; torch's `dtype` is `param_dtype`. There is no
    `device`.
    Inputs and parameters of different dtypes are promoted, where torch raises.
    `lengths=`, `mask=`, `reset=`, `reset_state=`, `recurrent_dropout=` and `variational_dropout=` are
    new. With lengths, a row may have length 0."""
_CELL_DIFFERENCES = (
    _DIFFERENCES.rpartition("\n    `lengths")[0]
    + """
    `reset=` and `reset_state=` are new."""
)

_LAYER_LEAD = "Each layer computes, for each step t of its input x,"

_LAYER_CALL = """Call:
    `output, {state} = module(x, hx=None, {before}*, lengths=None, mask=None,
    reset=None, reset_state=None, dropout_masks=None, {after})`

    x                                         output                  {states}
    (time, batch, input_size)                 (time, batch, D * H)    (D * num_layers, batch, H)
    (batch, time, input_size), batch_first    (batch, time, D * H)    (D * num_layers, batch, H)
    (time, input_size), unbatched             (time, D * H)           (D * num_layers, H)
    PackedSequence                            PackedSequence          (D * num_layers, batch, H)

    `module.step(x, hx)` makes one step: x and output are without the axis of time.

    D is 2 if bidirectional, else 1. H is {size}.
    h_n[D * layer + direction] is the state after each row's last step, or at step 0 for direction 1,
    which is backward.

{arguments}"""

_CELL_CALL = """Call:
    `{state} = module(x, hx=None, *, reset=None, reset_state=None)`

    x                      each state
    (batch, input_size)    (batch, hidden_size)
    (input_size,)          (hidden_size,)

    hx: the state, {state}; zeros if None. One state for all rows may have a batch of 1, or none.
    reset: True for the rows whose state is reset before the step; boolean, (batch,), or ().
    reset_state: the state that `reset` starts from, like hx; zeros if None."""

_LAYER_PARAMETERS = """Parameters of layer k, with torch's names, shapes and order:
    weight_ih_lk               ({rows}, input_size), or ({rows}, D * H) if k > 0
    weight_hh_lk               ({rows}, H)
    bias_ih_lk, bias_hh_lk     ({rows},)
    {projected}and the same with `_reverse` for the backward direction."""

_CELL_PARAMETERS = """Parameters, with torch's names, shapes and order:
    weight_ih           ({rows}, input_size)
    weight_hh           ({rows}, hidden_size)
    bias_ih, bias_hh    ({rows},)"""


# Arguments that a docstring describes in words of its own.
OWN = {
    "Recurrent": ("cell", "proj_size"),
    "RNNCell": (cell := ("input_size", "bias", "rngs")),
    "LSTMCell": cell,
    "GRUCell": cell,
    "Layers.__call__": ("deterministic", "rngs", "rng"),
    "Layers.step": (step := ("x", "reset", "deterministic", "rngs", "rng")),
    "apply_step": step,
    "apply_cell": ("x", "hx", "reset", "dtype"),
}


def described(own: Mapping[str, str], name: str, parameters: Iterable[str], width: int) -> str:
    """The section `Args:`."""
    kept = OWN.get(name, ())
    if unknown := [each for each in parameters if each not in own and each not in ARGUMENTS]:
        raise SystemExit(f"{name}: say in .ci/docs.py, under ARGUMENTS, or in the docstring what {unknown} mean")
    texts = {each: own[each] if each in kept or each not in ARGUMENTS else ARGUMENTS[each] for each in parameters}
    return f"Args:\n{_entries(texts, width)}"


def _entries(texts: Mapping[str, str], width: int = WIDTH) -> str:
    return "\n".join(
        textwrap.fill(
            f"{name}: {text}",
            width,
            initial_indent="    ",
            subsequent_indent="        ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in texts.items()
    )


def sections(name: str, linen: bool) -> tuple[str, list[str]]:
    """What the docstring of a class has before `Args:` and after it."""
    cell = name.endswith("Cell")
    kind = name.removesuffix("Cell").replace("Recurrent", "")
    lstm = kind == "LSTM"
    rows = f"{GATES[kind]} * hidden_size".removeprefix("1 * ") if kind else "gates * hidden_size"
    lead = "A call computes, from the input x_t and the state h_{t-1}," if cell else _LAYER_LEAD
    before = f"{lead}\n{EQUATIONS[kind]}" if kind else ""
    if cell:
        call = _CELL_CALL.format(state="(h, c)" if lstm else "h")
        return before, [call, _CELL_PARAMETERS.format(rows=rows), _CELL_DIFFERENCES.format(name=name)]
    off = "deterministic=None"
    given = ("hx", "lengths", "mask", "reset", "reset_state", "dropout_masks")
    arguments = {each: ARGUMENTS[each] for each in given} | _CALL_ARGUMENTS[linen]
    call = _LAYER_CALL.format(
        state="(h_n, c_n)" if lstm else "h_n",
        states="h_n; c_n with hidden_size" if lstm else "h_n",
        size="proj_size, or hidden_size without projection" if lstm or not kind else "hidden_size",
        before=f"{off}, " * linen,
        after="rng=None" if linen else f"{off}, rngs=None",
        arguments=_entries(arguments),
    )
    projected = "weight_hr_lk               (proj_size, hidden_size), with proj_size\n    " if lstm else ""
    after = ["With `proj_size`, h_t is W_hr (o * tanh(c_t))."] * lstm
    after += [call, _LAYER_PARAMETERS.format(rows=rows, projected=projected)]
    return before, after + [_DIFFERENCES.format(name=kind)] * bool(kind)


def completed(docstring: str, name: str, parameters: list[str], linen: bool = False) -> str:
    """A docstring, without its indentation, with what it shares with others."""
    before, _, rest = docstring.partition("Args:\n")
    arguments, _, rest = rest.partition("\n\n")
    found = re.findall(r"^    (\w+): ((?:.|\n {8})*)", arguments, re.M)
    own = {each: " ".join(text.split()) for each, text in found}
    if not name[0].isupper() or "." in name:  # a function, in the source's own width
        width = 120 - 4 * (1 + name.count("."))
        return f"{before}{described(own, name, parameters, width)}\n\n{rest}"
    lead, after = sections(name, linen)
    if lead:
        before = before.partition(lead.partition("\n")[0])[0]
    end = rest[re.search(r"^Raises:", rest, re.M).start() :]
    return "\n\n".join(
        part for part in (before.rstrip(), lead, described(own, name, parameters, WIDTH), *after, end) if part
    )


def _parameters(node: ast.ClassDef | ast.FunctionDef, bases: Mapping[str, ast.ClassDef], linen: bool) -> list[str]:
    """The names of a function's parameters, or of a constructor's."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        return [each for each in names if each != "self"]
    if not linen:
        return _parameters(next(n for n in node.body if getattr(n, "name", "") == "__init__"), bases, linen)
    fields: tuple[list[str], list[str]] = [], []  # by position, and by keyword alone
    for each in _lineage(node, bases):
        names = [n.target.id for n in each.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        names += ["name"] * (each is node)  # which Linen adds
        cut = names.index("_") if "_" in names else len(names)
        fields[0].extend(names[:cut])
        fields[1].extend(names[cut + 1 :])
    return [*fields[0], *fields[1]]


def _lineage(node: ast.ClassDef, bases: Mapping[str, ast.ClassDef]) -> list[ast.ClassDef]:
    names = [ast.unparse(base).partition("[")[0] for base in node.bases]
    above = [each for name in names if name in bases for each in _lineage(bases[name], bases)]
    return [*above, node]


def rewritten(path: Path) -> str:
    """A file's text, with complete docstrings."""
    text, linen = path.read_text(), "linen" in path.parts
    lines = text.splitlines(keepends=True)
    base = path.with_name("base.py")
    bases = (
        {n.name: n for n in ast.parse(base.read_text()).body if isinstance(n, ast.ClassDef)} if base.exists() else {}
    )
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            found += [(f"{node.name}.{n.name}", n) for n in node.body if isinstance(n, ast.FunctionDef)]
        found.append((getattr(node, "name", ""), node))
    for name, node in sorted(found, key=lambda pair: -getattr(pair[1], "lineno", 0)):
        if name not in NAMES or not isinstance(node, ast.ClassDef | ast.FunctionDef) or not ast.get_docstring(node):
            continue
        place, indent = node.body[0], " " * node.body[0].col_offset
        complete = completed(ast.get_docstring(node) + "\n", name, _parameters(node, bases, linen), linen)
        new = textwrap.indent(complete.rstrip(), indent).lstrip()
        lines[place.lineno - 1 : place.end_lineno] = [f'{indent}"""{new}\n{indent}"""\n']
    return "".join(lines)


def weights() -> str:
    """The file that tells type checkers which parameters a layer may have."""
    roles = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    names = [f"{role}_l{k}{way}" for k in range(LAYERS) for way in ("", "_reverse") for role in roles]
    return f'''"""The layers' parameters for type checkers and editors. `.ci/docs.py` writes this file."""

import jax
from flax import nnx


class LayerParameters:
    """Torch's parameters of {LAYERS} layers. Modules get theirs when they are made, and have no others.

    With names rather than a `__getattr__`, which would take any name, checkers find misspelled attributes. For a layer
    further up, use `getattr(module, "weight_hh_l{LAYERS}")`.
    """

{"".join(f"    {name}: nnx.Param[jax.Array]{chr(10)}" for name in names)}'''


KINDS = ("RNN", "LSTM", "GRU")
FUNCTIONS = ("apply", "trajectory", "apply_step", "apply_cell", "Layers.__call__", "Layers.step")
NAMES = {*KINDS, *(f"{kind}Cell" for kind in KINDS), "Recurrent", *FUNCTIONS}
MODULES = ("base", "layers", "recurrent", "cells")
FILES = ["functions.py", *(f"{api}/{file}.py" for api in ("nnx", "linen") for file in MODULES)]


def main(write: bool) -> int:
    wanted = {ROOT / "jaxrnn" / name: rewritten(ROOT / "jaxrnn" / name) for name in FILES}
    wanted[ROOT / "jaxrnn" / "_core" / "weights.py"] = weights()
    differ = [path for path, text in wanted.items() if path.read_text() != text]
    for path in differ:
        print(f"{path.relative_to(ROOT)} is not what .ci/docs.py makes of it", *["and is written"] * write)
        if write:
            path.write_text(wanted[path])
    return int(bool(differ) and not write)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
