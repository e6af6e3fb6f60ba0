"""Flax's recurrent modules as people have them: shared, transformed, in a class of one's own, or weights alone."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal
from comparing import assert_close
from flax import linen, nnx
from flax_models import FLAX, FLIP, LENGTHS, F, H, N, T, Theirs, assert_same, expression, make_cell, make_rnn
from making import filled, filled_variables

import jaxrnn
from jaxrnn.checkpoint import CheckpointError, find_rnns
from jaxrnn.checkpoint.dialects import DIALECTS
from jaxrnn.checkpoint.flax_names import with_torchs_names

pytest_plugins = "shared_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once", "standard_promotion")


def _bidirectional(library: str, forward: Any, backward: Any) -> Theirs:
    """A Bidirectional of two kinds of cell with settings."""

    def make(rngs: nnx.Rngs) -> Any:
        cells = [make_cell(library, kind, rngs, settings) for kind, settings in (forward, backward)]
        return FLAX[library].Bidirectional(*map(FLAX[library].RNN, cells))

    return Theirs(library, make)


SIZE = {"flax.linen": "features", "flax.nnx": "hidden_features"}
APART = {
    "hidden_size=4 and 6": lambda library: _bidirectional(library, ("GRUCell", {}), ("GRUCell", {SIZE[library]: 6})),
    "nonlinearity=tanh and relu": lambda library: _bidirectional(
        library, ("SimpleCell", {}), ("SimpleCell", {"activation_fn": jax.nn.relu})
    ),
    "dtype=float64 and float32": lambda library: _bidirectional(
        library, ("SimpleCell", {}), ("SimpleCell", {"dtype": jnp.float32, "param_dtype": jnp.float32})
    ),
    "kind=LSTM and GRU": lambda library: _bidirectional(library, ("LSTMCell", {}), ("GRUCell", {})),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", FLAX)
@pytest.mark.parametrize("differ", APART)
def test_two_directions_that_differ_are_converted_one_by_one(differ: str, library: str) -> None:
    theirs = APART[differ](library)
    with pytest.raises(CheckpointError, match=f"a Bidirectional of two cells that differ: .*{differ}.*\n") as caught:
        theirs.ours()
    words = str(caught.value).partition("\n")[2]
    ways = []
    for name in re.findall(r"\w+_rnn", words):
        part = theirs.variables and {"params": theirs.variables["params"][name]}
        ours = jaxrnn.from_flax(getattr(theirs.module, name), part)
        ways.append(ours if part is None else lambda *a, made=ours, **k: made[0].apply(made[1], *a, **k))
    names = {"lengths": LENGTHS, "time_major": False}
    forward, _ = ways[0](theirs.x, lengths=LENGTHS)
    backward, _ = ways[1](expression(FLIP, words, x=theirs.x, **names), lengths=LENGTHS)
    output = jnp.concatenate([forward, expression(FLIP, words, x=backward, **names)], axis=-1)
    carry, expected = _call(theirs, theirs.x)
    assert len(carry) == 2
    assert_close(output, theirs.valid(expected, LENGTHS), atol=1e-6 if "dtype" in differ else 1e-12)


def _call(theirs: Theirs, x: Any) -> Any:
    """The carry and the output."""
    if theirs.api == "flax.linen":
        return theirs.module.apply(theirs.variables, x, seq_lengths=LENGTHS, return_carry=True)
    return theirs.module(x, seq_lengths=LENGTHS, return_carry=True)


@pytest.mark.slow
@pytest.mark.parametrize("library", FLAX)
@pytest.mark.parametrize("whole", [False, True])
def test_directions_that_share_their_weights(library: str, whole: bool) -> None:
    def make(rngs: nnx.Rngs) -> Any:
        cell, flax = make_cell(library, "GRUCell", rngs, {}), FLAX[library]
        rnn = flax.RNN(cell)
        return flax.Bidirectional(rnn, rnn if whole else flax.RNN(cell))

    theirs = Theirs(library, make)
    with pytest.warns(UserWarning, match="two directions have the same weights\nours train apart: to tie") as caught:
        made = jaxrnn.from_flax(theirs.module, theirs.variables)
    words = str(caught[0].message)
    if library == "flax.linen":
        ours, variables = made
        params = {name: a for name, a in variables["params"].items() if not name.endswith("_reverse")}
        params = expression(r"\{\*\*.*\}$", words, params=params)
        assert_same(theirs, lambda *args, **kwargs: ours.apply({"params": params}, *args, **kwargs))
    else:
        assert_same(theirs, made)
        exec(re.search(r"ours\.weight_ih_l0_reverse = ours.weight_ih_l0", words)[0], {"ours": made})
        assert made.weight_ih_l0_reverse is made.weight_ih_l0


@pytest.mark.slow
@pytest.mark.parametrize("library", FLAX)
@pytest.mark.parametrize("name", ["RNN", "Bidirectional"])
def test_a_subclass_with_a_call_of_its_own(name: str, library: str) -> None:
    flax = FLAX[library]
    same = type("Named", (getattr(flax, name),), {"__module__": __name__, "__annotations__": {}})
    other = type("Louder", (same,), {"__module__": __name__, "__annotations__": {}, "__call__": _louder})
    settings = dict(_fields(Theirs(library, make_rnn(library, name, {})).module))
    theirs = Theirs(library, lambda rngs: same(**settings))
    assert_same(theirs, theirs.ours())
    with pytest.raises(CheckpointError, match=f"Louder has another __call__ than {library}.{name}\nif it computes the"):
        jaxrnn.from_flax(other(**settings), theirs.variables)


def _louder(self: Any, x: Any, **settings: Any) -> Any:
    return 2 * x


def _fields(module: Any) -> Iterator[tuple[str, Any]]:
    for name in ("cell", "forward_rnn", "backward_rnn"):
        if hasattr(module, name):
            yield name, getattr(module, name)


@pytest.mark.slow
@pytest.mark.parametrize("transform", [linen.remat, linen.jit], ids=lambda transform: transform.__name__)
def test_a_linen_class_that_was_transformed(transform: Any) -> None:
    module, x = transform(linen.RNN)(linen.GRUCell(H, param_dtype=jnp.float64)), jnp.asarray(normal(N, T, F))
    variables = filled_variables(module, x)
    ours, converted = jaxrnn.from_flax(module, variables)
    assert_close(ours.apply(converted, x)[0], module.apply(variables, x), atol=1e-12)
    louder = type("RNN", (linen.RNN,), {"__module__": __name__, "__annotations__": {}, "__call__": _louder})
    with pytest.raises(CheckpointError, match=r"has another __call__ .*\n.* give a flax.linen.RNN of the same cells$"):
        jaxrnn.from_flax(transform(louder)(module.cell), variables)


def test_what_is_in_no_table_is_named() -> None:
    theirs = Theirs("flax.nnx", make_rnn("flax.nnx", "GRUCell", {}))
    cell = theirs.module.cell
    cell.initialize_carry = lambda shape, rngs: jnp.ones((N, H))
    with pytest.warns(UserWarning, match=r"^flax\.nnx\.GRUCell with initialize_carry=<function .*\njaxrnn does"):
        theirs.ours()
    del cell.initialize_carry
    cell.dense_i = filled(lambda: nnx.LoRALinear(F, 3 * H, lora_rank=2, rngs=nnx.Rngs(0)))
    with pytest.raises(CheckpointError, match=r"dense_i of a flax\.nnx\.GRUCell is of type LoRALinear\nput an"):
        theirs.ours()
    cell.dense_i = filled(lambda: nnx.Linear(F, 3 * H, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    with pytest.raises(CheckpointError, match=r"the layers of a flax\.nnx\.GRUCell have several dtypes\ngive them the"):
        theirs.ours()
    with pytest.raises(TypeError, match=r"two of a Bidirectional should be flax\.nnx\.RNN, got GRUCell, GRUCell"):
        jaxrnn.from_flax(nnx.Bidirectional(cell, cell))
    with pytest.raises(TypeError, match="variables are for a Linen module"):
        jaxrnn.from_flax(theirs.module, {"params": {}})
    theirs = Theirs("flax.linen", make_rnn("flax.linen", "GRUCell", {}))
    with pytest.raises(CheckpointError, match=r"'params' in it, but it has cell\ngive \{'params': variables\}"):
        jaxrnn.from_flax(theirs.module, theirs.variables["params"])


@pytest.mark.slow
def test_boxes_of_partitioned_weights() -> None:
    init = linen.with_partitioning(jax.nn.initializers.ones, (None, "model"))
    theirs = Theirs("flax.linen", make_rnn("flax.linen", "GRUCell", {"kernel_init": init}))
    assert isinstance(theirs.variables["params"]["cell"]["in"]["kernel"], linen.Partitioned)
    assert_same(theirs, theirs.ours())


class Custom(nnx.Module):
    """Two recurrent modules of any names, both of which run forward."""

    def __init__(self, **members: Any) -> None:
        for name, member in members.items():
            setattr(self, name, member)


def _gru(features: int = F) -> Any:
    return filled(lambda: nnx.RNN(nnx.GRUCell(features, H, rngs=nnx.Rngs(0))))


def _flat(module: Any) -> dict[str, Any]:
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in state}


def test_two_that_run_forward_are_not_taken_for_a_bidirectional_without_a_word() -> None:
    both = Custom(forward_rnn=_gru(), backward_rnn=_gru())
    x = jnp.asarray(normal(N, T, F), jnp.float32)
    with pytest.warns(UserWarning, match="^forward_rnn and backward_rnn are read as a Bidirectional, .*\nif"):
        assert jaxrnn.from_flax(nnx.state(both), batch_first=True).bidirectional
    for name in ("forward_rnn", "backward_rnn"):
        weights = {key: a for key, a in _flat(both).items() if key.startswith(name)}
        ours = jaxrnn.from_flax(weights, batch_first=True)
        assert_close(ours(x)[0], getattr(both, name)(x), atol=1e-6)
    other = Custom(my_forward_rnn=_gru(), my_backward_rnn=_gru(), backward_rnn=_gru())
    assert [rnn.prefix for rnn in find_rnns(with_torchs_names(_flat(other)))] == [
        "backward_rnn.",
        "my_backward_rnn.",
        "my_forward_rnn.",
    ]
    sizes = Custom(forward_rnn=_gru(), backward_rnn=_gru(F + 2))
    assert [rnn.input_size for rnn in find_rnns(with_torchs_names(_flat(sizes)))] == [F + 2, F]


def test_two_cells_under_one_name() -> None:
    one = _flat(_gru())
    tensors = {f"enc.{name}": a for name, a in one.items()} | {f"enc.forward_rnn.{name}": a for name, a in one.items()}
    assert [rnn.prefix for rnn in find_rnns(with_torchs_names(tensors))] == ["enc.", "enc.forward_rnn."]
    tensors |= {f"enc.backward_rnn.{name}": a for name, a in one.items()}
    with (
        pytest.warns(UserWarning, match="read as a Bidirectional"),
        pytest.raises(
            CheckpointError, match=r"enc\.cell and .*enc\.forward_rnn\.cell are both read as enc\.weight_ih_l0\n"
        ),
    ):
        with_torchs_names(tensors)
    with pytest.raises(CheckpointError, match=r"^a/b and a\.b are both read as a\.b\n"):
        jaxrnn.from_flax({"a": {"b": np.ones(2)}, "a.b": np.ones(2)})


def test_what_stands_beside_a_cell_is_named() -> None:
    theirs = Theirs("flax.nnx", make_rnn("flax.nnx", "GRUCell", {}))
    beside = {"norm": {"scale": np.ones(4)}, "count": np.array(3)}
    said = r"beside the weights of flax\.nnx\.GRUCell there are norm\.scale, count, .*\n.* part of"
    with pytest.warns(UserWarning, match=said):
        ours = jaxrnn.from_flax({**nnx.to_pure_dict(theirs.weights), **beside}, batch_first=True)
    assert_same(theirs, ours)


def _trained(graph: Any, params: Any, call: Any, masks: Any) -> list[Any]:
    """For each mask of the gradients, the losses of four steps of Adam, with clipping."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.05))

    @jax.jit
    def step(params: Any, state: Any, mask: Any) -> Any:
        value, gradient = jax.value_and_grad(lambda params: jnp.mean(call(graph, params) ** 3))(params)
        masked = jax.tree.map(lambda keep, gradient: jnp.where(keep, gradient, 0), mask, gradient)
        updates, state = optimizer.update(masked, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for mask in masks:
        trained, state = params, optimizer.init(params)
        losses.append([])
        for _ in range(4):
            trained, state, value = step(trained, state, mask)
            losses[-1].append(value)
    return [jnp.stack(each) for each in losses]


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), [key for key in DIALECTS if key[0] in FLAX], ids=str)
def test_training_as_flax_with_the_gradients_of_new_biases_masked(library: str, name: str) -> None:
    theirs = Theirs(library, make_rnn(library, name, {}))
    made = jaxrnn.from_flax(theirs.module, theirs.variables)

    def call(module: Any, params: Any, **settings: Any) -> Any:
        if library == "flax.linen":
            return module.apply({"params": params}, theirs.x)
        graph, *others = module
        return nnx.merge(graph, params, *others)(theirs.x, **settings)

    def split(module: Any, variables: Any) -> tuple[Any, Any]:
        if variables:
            return module, variables["params"]
        graph, params, *others = nnx.split(module, nnx.Param, ...)
        return (graph, *others), params

    zero = {} if theirs.variables else {"initial_carry": theirs.cells[0].initialize_carry((N, F), nnx.Rngs(0))}
    module, params = split(theirs.module, theirs.variables)
    every = jax.tree.map(lambda array: np.ones(np.shape(array), bool), params)
    [expected] = _trained(module, params, lambda *arguments: call(*arguments, **zero), [every])
    module, params = split(*(made if theirs.variables else (made, None)))
    every = jax.tree.map(lambda array: np.ones(np.shape(array), bool), params)
    arrays = params if theirs.variables else nnx.to_pure_dict(params)
    has = DIALECTS[library, name].has(arrays)
    mask = has if theirs.variables else nnx.State({key: params[key].replace(jnp.asarray(a)) for key, a in has.items()})
    found = _trained(module, params, lambda *arguments: call(*arguments)[0], [mask, every])
    assert [float(jnp.max(jnp.abs(each - expected))) < 1e-10 for each in found] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["layers", "one of both", "all of both"])
def test_parameters_that_are_shared(tied: str) -> None:
    def make(rngs: nnx.Rngs) -> Any:
        one, other = make_cell("flax.nnx", "LSTMCell", rngs, {}), make_cell("flax.nnx", "LSTMCell", rngs, {})
        if tied == "layers":
            one.hi = one.hf
            return nnx.RNN(one)
        for name, layer in vars(one).items():
            if isinstance(layer, nnx.Linear) and (tied == "all of both" or name == "hi"):
                setattr(other, name, layer)
        return nnx.Bidirectional(nnx.RNN(one), nnx.RNN(other))

    theirs = Theirs("flax.nnx", make)
    words = {
        "layers": r"one parameter at several places: .*cell\.hf\.kernel, cell\.hi\.kernel\nours has a copy",
        "one of both": r"places: .*; forward_rnn\.cell\.hi\.kernel, backward_rnn\.cell\.hi\.kernel\nours has a copy",
        "all of both": "two directions have the same weights\nours train apart",
    }
    with pytest.warns(UserWarning, match=words[tied]) as caught:
        ours = theirs.ours()
    assert len(caught) == 1
    assert_close(ours(theirs.x), theirs(theirs.x, None), atol=1e-12)


@pytest.mark.slow
def test_a_bound_rnn_whose_cell_is_elsewhere() -> None:
    class Around(linen.Module):
        def setup(self) -> None:
            self.inner = linen.GRUCell(H, param_dtype=jnp.float64)
            self.rnn = linen.RNN(self.inner)

        def __call__(self, x: Any) -> Any:
            return self.rnn(x)

    x = jnp.asarray(normal(N, T, F))
    around = Around().bind(Around().init(jax.random.key(0), x))
    with pytest.raises(CheckpointError, match="its cell may belong to the module around it\ngive those of") as caught:
        jaxrnn.from_flax(around.rnn, around.rnn.variables)
    variables = expression(r"\{'params'.*$", str(caught.value), around=around, name="inner")
    ours, variables = jaxrnn.from_flax(around.rnn, variables)
    assert_close(ours.apply(variables, x)[0], around(x), atol=1e-12)


def test_a_dict_of_states() -> None:
    theirs = Theirs("flax.nnx", make_rnn("flax.nnx", "GRUCell", {}))
    for weights in (dict(nnx.state(theirs.module)), dict(nnx.state(theirs.module.cell))):
        ours = jaxrnn.from_flax(weights, batch_first=True)
        assert_close(ours(theirs.x)[0], theirs(theirs.x, None)[0], atol=1e-12)
