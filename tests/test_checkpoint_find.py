import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import jaxrnn
from jaxrnn import CellSpec, Spec
from jaxrnn.checkpoint import CheckpointError, FoundRNN, find_rnns
from jaxrnn.checkpoint.named import Described
from jaxrnn.checkpoint.names import under

CELLS = [jaxrnn.LSTM_CELL, jaxrnn.GRU_CELL, jaxrnn.RNN_TANH]
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), jnp.dtype(jnp.bfloat16)]


def tensors_of(spec: Spec | CellSpec, prefix: str = "", dtype: np.dtype = DTYPES[0]) -> dict[str, np.ndarray]:
    return {prefix + name: np.zeros(shape, dtype) for name, shape in spec.shapes().items()}


def refusal(tensors: dict[str, np.ndarray]) -> list[str]:
    """What `find_rnns` finds wrong, a line each."""
    with pytest.raises(CheckpointError) as caught:
        find_rnns(tensors)
    first, *problems, remedy = str(caught.value).split("\n")
    assert first == "recurrent weights that do not fit together:"
    assert remedy
    return [problem.removeprefix("  ") for problem in problems]


@st.composite
def specs(draw: st.DrawFn) -> Spec | CellSpec:
    cell = draw(st.sampled_from(CELLS))
    sizes = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    if draw(st.booleans()):
        return CellSpec(cell, *sizes, bias=draw(st.booleans()))
    return Spec(
        cell,
        *sizes,
        num_layers=draw(st.integers(1, 12)),
        bias=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj_size=draw(st.integers(0, sizes[1] - 1)) if cell.projects else 0,
    )


@given(
    wanted=st.dictionaries(
        st.sampled_from(["", "a.", "b.", "a.b.", "encoder.rnns.0.", "encoder.rnns.1.", "ä b."]),
        st.tuples(specs(), st.sampled_from(DTYPES)),
        max_size=3,
    ),
    random=st.randoms(use_true_random=False),
)
def test_settings_come_back(wanted, random):
    # A module at the root, or one that has submodules, is a cell of torch's only if it stands alone.
    if any(
        isinstance(spec, CellSpec) and any(p != o and o.startswith(p) for o in wanted)
        for p, (spec, _) in wanted.items()
    ):
        wanted = dict(list(wanted.items())[:1])
    tensors = {
        key: value for prefix, (spec, dtype) in wanted.items() for key, value in tensors_of(spec, prefix, dtype).items()
    }
    shuffled = list(tensors.items())
    random.shuffle(shuffled)
    found = {rnn.prefix: rnn for rnn in find_rnns(dict(shuffled))}
    assert found.keys() == wanted.keys()
    for prefix, (spec, dtype) in wanted.items():
        rnn = found[prefix]
        assert rnn == FoundRNN(prefix, spec, dtype)
        assert rnn.is_cell == isinstance(spec, CellSpec)
        assert rnn.kind == {4: "LSTM", 3: "GRU", 1: "RNN"}[len(spec.cell.gates)]
        for name in ("input_size", "hidden_size", "num_layers", "bidirectional", "bias", "proj_size"):
            default = {"num_layers": 1, "bidirectional": False, "proj_size": 0}.get(name)
            assert getattr(rnn, name) == getattr(spec, name, default)
        assert rnn.num_parameters == sum(math.prod(shape) for shape in spec.shapes().values())


def test_order_is_that_of_first_keys():
    spec = Spec(jaxrnn.GRU_CELL, 2, 3)
    tensors = tensors_of(spec, "b.") | tensors_of(CellSpec(jaxrnn.GRU_CELL, 2, 3), "c.") | tensors_of(spec, "a.")
    assert [rnn.prefix for rnn in find_rnns(tensors)] == ["b.", "c.", "a."]


@pytest.mark.parametrize(
    ("spec", "assumed"),
    [
        (Spec(jaxrnn.RNN_TANH, 1, 2, 2), {"nonlinearity": "tanh", "batch_first": False, "dropout": 0.0}),
        (Spec(jaxrnn.LSTM_CELL, 1, 2, 2), {"batch_first": False, "dropout": 0.0}),
        (Spec(jaxrnn.GRU_CELL, 1, 2), {"batch_first": False}),
        (CellSpec(jaxrnn.RNN_TANH, 1, 2), {"nonlinearity": "tanh"}),
        (CellSpec(jaxrnn.GRU_CELL, 1, 2), {}),
    ],
)
def test_what_is_assumed(spec, assumed):
    [found] = find_rnns(tensors_of(spec))
    assert found.assumed == assumed
    assert pickle.loads(pickle.dumps(found)).assumed == assumed


@pytest.mark.torch
def test_live_torch_modules(torch):
    model = torch.nn.ModuleDict(
        {
            "rnn": torch.nn.RNN(2, 3, nonlinearity="relu"),
            "lstm": torch.nn.LSTM(2, 5, 2, bidirectional=True, proj_size=3, dtype=torch.bfloat16),
            "gru": torch.nn.GRU(2, 3, bias=False, dtype=torch.float64),
            "cells": torch.nn.ModuleList([torch.nn.LSTMCell(2, 3), torch.nn.GRUCell(2, 3, bias=False)]),
            "linear": torch.nn.Linear(3, 3),
        }
    )
    assert find_rnns(model.state_dict()) == [
        FoundRNN("rnn.", Spec(jaxrnn.RNN_TANH, 2, 3), np.dtype(np.float32)),
        FoundRNN("lstm.", Spec(jaxrnn.LSTM_CELL, 2, 5, 2, bidirectional=True, proj_size=3), jnp.dtype(jnp.bfloat16)),
        FoundRNN("gru.", Spec(jaxrnn.GRU_CELL, 2, 3, bias=False), np.dtype(np.float64)),
        FoundRNN("cells.0.", CellSpec(jaxrnn.LSTM_CELL, 2, 3), np.dtype(np.float32)),
        FoundRNN("cells.1.", CellSpec(jaxrnn.GRU_CELL, 2, 3, bias=False), np.dtype(np.float32)),
    ]


# A stack that has everything, to damage.
WHOLE = Spec(jaxrnn.LSTM_CELL, 7, 5, num_layers=3, bidirectional=True, proj_size=2)


@given(st.sets(st.sampled_from(list(WHOLE.shapes())), min_size=1, max_size=len(WHOLE.shapes()) - 1))
@example(WHOLE.shapes().keys() - {"weight_hr_l2"})
def test_every_missing_key_is_named_or_the_rest_is_a_smaller_module(lost):
    tensors = {
        name: value for name, value in tensors_of(WHOLE, "enc.").items() if name.removeprefix("enc.") not in lost
    }
    smaller = [
        spec
        for layers in (1, 2, 3)
        for bidirectional in (False, True)
        for bias in (False, True)
        for proj_size in (0, 2)
        if (spec := dataclasses.replace(
            WHOLE, num_layers=layers, bidirectional=bidirectional, bias=bias, proj_size=proj_size
        )).shapes().keys() == {name.removeprefix("enc.") for name in tensors}
    ]  # fmt: skip
    if smaller:
        # Complete by the names; the shapes fit only if what they say of the sizes still holds.
        if tensors_of(smaller[0], "enc.").keys() == tensors.keys() and all(
            value.shape == smaller[0].shapes()[name.removeprefix("enc.")] for name, value in tensors.items()
        ):
            assert [rnn.spec for rnn in find_rnns(tensors)] == smaller
        else:
            assert refusal(tensors)
    else:
        problems = refusal(tensors)
        left = {name.removeprefix("enc.") for name in tensors}
        roles = {name.partition("_l")[0] for name in left}
        expected = [
            f"enc.{name} is missing"
            for name in dataclasses.replace(
                WHOLE,
                num_layers=1 + max(int(name.removesuffix("_reverse")[-1]) for name in left),
                bidirectional=any(name.endswith("_reverse") for name in left),
                bias=bool(roles & {"bias_ih", "bias_hh"}),
                proj_size=2 * ("weight_hr" in roles),
            ).shapes()
            if name not in left
        ]
        assert problems == expected


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"weight_hh_l0": (19, 2)}, ["weight_hh_l0 is (19, 2), should have 4 * 5 rows (LSTM)"]),
        ({"weight_hh_l0": (15, 2)}, ["weight_hh_l0 is (15, 2), should have 4 * 5 rows (LSTM)"]),
        ({"weight_ih_l1": (20, 2)}, ["weight_ih_l1 is (20, 2), should be (20, 4)"]),
        ({"bias_ih_l0": (20, 1)}, ["bias_ih_l0 is (20, 1), should be (20,)"]),
        ({"weight_hh_l0": (20,)}, ["weight_hh_l0 is (20,), should be 2-D"]),
        ({"weight_hr_l0": (2, 5, 1)}, ["weight_hr_l0 is (2, 5, 1), should be 2-D"]),
        (
            {"weight_hr_l2_reverse": (5, 2), "bias_hh_l1": (15,)},
            ["bias_hh_l1 is (15,), should be (20,)", "weight_hr_l2_reverse is (5, 2), should be (2, 5)"],
        ),
        ({"weight_hh_l0": (20, 6)}, ["weight_ih_l0 and the weights beside it: proj_size should be 0"]),
        ({"weight_hr_l0": (2, 0)}, ["weight_hh_l0 is (20, 2), should have 4 * 0 rows (LSTM)"]),
    ],
)
def test_shapes_that_do_not_fit(changes, problems):
    tensors = tensors_of(WHOLE) | {name: np.zeros(shape, np.float32) for name, shape in changes.items()}
    found = refusal(tensors)
    assert len(found) == len(problems)
    for line, problem in zip(found, problems, strict=True):
        assert line.startswith(problem)


@pytest.mark.parametrize("rows", [2, 5, 6, 7, 13, 0])
def test_rows_of_no_kind(rows):
    tensors = tensors_of(Spec(jaxrnn.GRU_CELL, 2, 3)) | {"weight_hh_l0": np.zeros((rows, 3), np.float32)}
    wanted = "4 * 3 rows (LSTM), 3 * 3 (GRU) or 3 (RNN)"
    assert refusal(tensors) == [f"weight_hh_l0 is ({rows}, 3), should have {wanted}"]


@pytest.mark.parametrize("spec", [Spec(jaxrnn.GRU_CELL, 2, 3), CellSpec(jaxrnn.GRU_CELL, 2, 3)])
@pytest.mark.parametrize(
    ("dtype", "problem"),
    [(np.float16, "is float16, should be float32 as the others"), (np.int32, "is int32, should be floating"),
     (np.complex64, "is complex64, should be floating"), (object, "is object, should be floating")],
)  # fmt: skip
def test_dtypes_that_do_not_fit(spec, dtype, problem):
    name = list(spec.shapes())[2]
    tensors = tensors_of(spec, "a.") | {f"a.{name}": np.zeros(spec.shapes()[name], dtype)}
    assert refusal(tensors) == [f"a.{name} {problem}"]


@pytest.mark.parametrize("lost", ["bias_ih", "bias_hh", "weight_ih", "weight_hh"])
def test_cell_that_misses_one_key(lost):
    tensors = tensors_of(CellSpec(jaxrnn.LSTM_CELL, 2, 3), "cell.")
    del tensors[f"cell.{lost}"]
    assert refusal(tensors) == [f"cell.{lost} is missing"]


def test_cell_with_a_2d_bias():
    tensors = tensors_of(CellSpec(jaxrnn.LSTM_CELL, 2, 3)) | {"bias_hh": np.zeros((12, 1), np.float32)}
    assert refusal(tensors) == ["bias_hh is (12, 1), should be (12,)"]


def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {f"cell.{name.replace('__', '.')}": np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        zeros(weight=(4, 4), bias=(4,)),
        zeros(kernel=(2, 12), recurrent_kernel=(3, 12), bias=(12,)),
        zeros(W=(1, 12, 2), R=(1, 12, 3), B=(1, 24)),
        zeros(input_linearity__weight=(12, 2), state_linearity__weight=(12, 3), state_projection__weight=(3, 3)),
        zeros(linear__weight=(9, 5), norm__weight=(9,), norm__bias=(9,)),
        zeros(weight_ih=(12, 2), weight_hh=(12, 3), layernorm_c__weight=(3,)),
        zeros(weight_ih=(12, 2), weight_hh=(12, 3), bias=(12,)),
        zeros(weight_ih=(3, 2), weight_hh=(3,), bias_ih=(3,)),
        zeros(weight_ih=(2, 12), weight_hh=(3, 12), bias_ih=(12,), bias_hh=(12,)),
        zeros(weight_ih=(6, 2), weight_hh=(6, 3), bias_ih=(6,), bias_hh=(6,)),
        zeros(weight_ih=(9, 2), weight_hh=(12, 3)),
        zeros(weight_ih=(0, 2), weight_hh=(0, 0)),
        zeros(weight_hh=(12, 3)),
        zeros(weight_ih=(12, 2), bias_ih=(12,)),
        zeros(weight_hh_l00=(12, 3), weight_hh_l=(12, 3), weight_hh_l0_v=(12, 3), xweight_hh_l0=(12, 3)),
        {"weight_hh_l\u0661": np.zeros((12, 3))},
        {0: {"exp_avg": np.zeros((12, 3))}, "state": {}},
    ],
    ids=[
        "nothing", "linear", "keras", "onnx", "elmo", "linear and norm", "layer norm", "one bias", "independent rnn",
        "transposed", "minimal gated unit", "rows differ", "no rows", "one weight", "one weight and bias",
        "like layers", "other digits", "optimizer",
    ],
)  # fmt: skip
def test_look_alikes_are_no_torch_modules(tensors):
    assert find_rnns(tensors) == []


def test_problems_of_every_set_at_once() -> None:
    spec = Spec(jaxrnn.GRU_CELL, 2, 3)
    tensors = tensors_of(spec, "a.") | tensors_of(spec, "c.")
    del tensors["a.bias_ih_l0"], tensors["c.weight_hh_l0"]
    problems = ["a.bias_ih_l0 is missing", "c.weight_hh_l0 is missing"]
    assert refusal(tensors) == problems
    tensors |= tensors_of(spec, "b.")  # whole: it is found in spite of them
    with pytest.warns(UserWarning, match=r"\n  ".join(["^left out .*:", *problems]) + "\nsave") as caught:
        assert [rnn.prefix for rnn in find_rnns(tensors)] == ["b."]
    assert caught[0].filename == __file__


def test_what_a_file_says_is_used_and_not_assumed() -> None:
    spec = Spec(jaxrnn.RNN_TANH, 2, 3)
    tensors = tensors_of(spec, "m._orig_mod.a.") | tensors_of(spec, "b.")
    said = {"m._orig_mod.a.": {"nonlinearity": "relu", "batch_first": True}}
    one, other = find_rnns(Described(tensors, said))
    assert (one.spec.cell, one.spec.batch_first, one.assumed) == (jaxrnn.RNN_RELU, True, {})
    assert {"nonlinearity": "relu", "batch_first": True}.items() <= one.arguments.items()
    assert other.assumed == {"nonlinearity": "tanh", "batch_first": False}
    [under_m] = find_rnns(under(Described(tensors, said), "m."))
    assert under_m.assumed == {}


def test_layer_gap():
    tensors = tensors_of(Spec(jaxrnn.GRU_CELL, 2, 3, num_layers=3))
    tensors = {name: value for name, value in tensors.items() if not name.endswith("_l1")}
    assert refusal(tensors) == [f"{role}_l1 is missing" for role in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def test_layer_gap_of_any_length():
    tensors = {
        name.replace("_l1", "_l999999999"): value
        for name, value in tensors_of(Spec(jaxrnn.GRU_CELL, 2, 3, num_layers=2), "a.").items()
    }
    assert refusal(tensors) == ["a.: keys go up to layer 999999999, but only 2 layers have any"]


def test_twenty_thousand_layers():
    """In linear time: a time that grew with the square of the keys would be minutes."""
    tensors = tensors_of(Spec(jaxrnn.RNN_TANH, 1, 1, num_layers=20_000))
    assert find_rnns(tensors)[0].num_layers == 20_000
    lost = [name for name in tensors if name.startswith("bias_hh")]
    assert refusal({name: value for name, value in tensors.items() if not name.startswith("bias_hh")}) == [
        f"{name} is missing" for name in lost
    ]


def test_jax_arrays():
    spec = Spec(jaxrnn.LSTM_CELL, 2, 3)
    [found] = find_rnns(spec.init(jax.random.key(0), jnp.bfloat16))
    assert found == FoundRNN("", spec, jnp.dtype(jnp.bfloat16))
