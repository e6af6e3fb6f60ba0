"""What docstrings share: so `help(jaxrnn.LSTM)` can say everything, and each sentence is written once."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import TypeVar

Documented = TypeVar("Documented", bound=Callable)
Class = TypeVar("Class")

WIDTH = 100  # of lines in a notebook

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
    "bidirectional": "whether each layer also runs backward in time.",
    "proj_size": "features of an LSTM's projected hidden state, less than hidden_size; 0 for no projection.",
    "param_dtype": "the parameters' floating dtype.",
    "rngs": "nnx.Rngs for the initial parameters (uniform within 1/sqrt(hidden_size) of 0, as torch's) and, where it "
    "is used, for dropout.",
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
    "reset": "True at the steps before which the state is reset, such as the first of an episode; boolean, of the "
    "shape of x, or its data, without features. Ignored past a row's end. Not for a bidirectional network.",
    "reset_state": "the state that `reset` starts from, like hx; zeros if None.",
}
# Linen's fields.
ARGUMENTS |= {
    "deterministic": "whether dropout is off. With dropout, give it here or in the call.",
    "rng_collection": "the name of the random keys for dropout that `apply` is given.",
    "name": "the name of the module in its parent, as everywhere in Linen.",
}

# What a call of NNX's modules takes, and of Linen's.
_CALL_ARGUMENTS = {
    False: {
        "deterministic": "whether dropout is off; by default as `train()` and `eval()` last set it.",
        "rngs": "nnx.Rngs, an nnx.RngStream or a jax key for dropout, in place of the module's own.",
    },
    True: {
        "deterministic": "whether dropout is off. With dropout, give it here or as a field.",
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
    `lengths=`, `reset=` and `reset_state=` are new. With lengths, a row may have length 0."""
_CELL_DIFFERENCES = _DIFFERENCES.rpartition("\n")[0]

_LAYER_CALL = """Call:
    `output, {state} = module(x, hx=None, {before}*, lengths=None, reset=None,
    reset_state=None, {after})`

    x                                         output                  {states}
    (time, batch, input_size)                 (time, batch, D * H)    (D * num_layers, batch, H)
    (batch, time, input_size), batch_first    (batch, time, D * H)    (D * num_layers, batch, H)
    (time, input_size), unbatched             (time, D * H)           (D * num_layers, H)
    PackedSequence                            PackedSequence          (D * num_layers, batch, H)

    D is 2 if bidirectional, else 1. H is {size}.
    h_n[D * layer + direction] is the state after each row's last step, or at step 0 for direction 1,
    which is backward.

{arguments}"""

_CELL_CALL = """Call:
    `{state} = module(x, hx=None)`

    x                      each state
    (batch, input_size)    (batch, hidden_size)
    (input_size,)          (hidden_size,)

    hx: the state, {state}; zeros if None. One state for all rows may have a batch of 1, or none."""

_LAYER_PARAMETERS = """Parameters of layer k, with torch's names, shapes and order:
    weight_ih_lk               ({rows}, input_size), or ({rows}, D * H) if k > 0
    weight_hh_lk               ({rows}, H)
    bias_ih_lk, bias_hh_lk     ({rows},)
    {projected}and the same with `_reverse` for the backward direction."""

_CELL_PARAMETERS = """Parameters, with torch's names, shapes and order:
    weight_ih           ({rows}, input_size)
    weight_hh           ({rows}, hidden_size)
    bias_ih, bias_hh    ({rows},)"""


def complete(docstring: str, parameters: Iterable[str]) -> str:
    """Describe every parameter under `Args:`, in order. Those that the docstring leaves out come from `ARGUMENTS`."""
    docstring = inspect.cleandoc(docstring)
    before, heading, after = docstring.partition("Args:\n")
    own: dict[str, str] = {}
    if heading:
        section, _, after = after.partition("\n\n")
        for names, text in re.findall(r"^    (\w[\w, ]*): ((?:.|\n {8})*)", section, re.M):
            own |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    else:  # before what usually follows
        place = re.search(r"^(Returns:|Raises:|Warns:|>>> )", docstring, re.M)
        cut = place.start() if place else len(docstring)
        before, after = docstring[:cut], docstring[cut:]
    return f"{before}Args:\n{_entries({name: own.get(name) or ARGUMENTS[name] for name in parameters})}\n\n{after}"


def _entries(texts: dict[str, str]) -> str:
    return "\n".join(_filled(f"{name}: {text}", "    ", "        ") for name, text in texts.items())


def _filled(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def described(function: Documented) -> Documented:
    """Complete a function's docstring from its signature."""
    if function.__doc__:  # there is none under -OO
        names = [name for name in inspect.signature(function).parameters if name not in ("self", "options")]
        function.__doc__ = complete(function.__doc__, names)
    return function


def layer(kind: str = "", linen: bool = False) -> Callable[[type[Class]], type[Class]]:
    """Complete the docstring of a class of layers: its equations, arguments, call, parameters and differences.

    Args:
        kind: "RNN", "LSTM" or "GRU"; empty for layers of any cell.
        linen: whether it is a module of Linen.
    """
    lstm = kind == "LSTM"
    rows = f"{GATES[kind]} * hidden_size".removeprefix("1 * ") if kind else "gates * hidden_size"
    off = "deterministic=None"
    names = ["hx", "lengths", "reset", "reset_state"]
    call = _LAYER_CALL.format(
        state="(h_n, c_n)" if lstm else "h_n",
        states="h_n; c_n with hidden_size" if lstm else "h_n",
        size="proj_size, or hidden_size without projection" if lstm or not kind else "hidden_size",
        before=f"{off}, " * linen,
        after="rng=None" if linen else f"{off}, rngs=None",
        arguments=_entries({name: ARGUMENTS[name] for name in names} | _CALL_ARGUMENTS[linen]),
    )
    projected = "weight_hr_lk               (proj_size, hidden_size), with proj_size\n    " if lstm else ""
    sections = [call, _LAYER_PARAMETERS.format(rows=rows, projected=projected)]
    if lstm:
        sections.insert(0, "With `proj_size`, h_t is W_hr (o * tanh(c_t)).")
    if kind:
        sections.append(_DIFFERENCES.format(name=kind))
    return _completed(kind, "Each layer computes, for each step t of its input x,", sections)


def cell(kind: str) -> Callable[[type[Class]], type[Class]]:
    """Complete the docstring of a class of cells, as `layer` does."""
    call = _CELL_CALL.format(state="(h, c)" if kind == "LSTM" else "h")
    rows = f"{GATES[kind]} * hidden_size".removeprefix("1 * ")
    sections = [call, _CELL_PARAMETERS.format(rows=rows), _CELL_DIFFERENCES.format(name=f"{kind}Cell")]
    return _completed(kind, "A call computes, from the input x_t and the state h_{t-1},", sections)


def _completed(kind: str, lead: str, sections: Iterable[str]) -> Callable[[type[Class]], type[Class]]:
    def change(documented: type[Class]) -> type[Class]:
        if documented.__doc__:  # there is none under -OO
            names = [name for name in inspect.signature(documented).parameters if name != "parent"]
            summary, _, rest = complete(documented.__doc__, names).partition("\n\n")
            place = re.search(r"^(Raises:|>>> )", rest, re.M)
            cut = place.start() if place else len(rest)
            equations = [f"{lead}\n{EQUATIONS[kind]}"] if kind else []
            parts = [summary, *equations, rest[:cut].rstrip(), *sections, rest[cut:]]
            documented.__doc__ = "\n\n".join(parts)
        return documented

    return change
