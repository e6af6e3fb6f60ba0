"""Files of Flax, Haiku and plain JAX: read alike, whatever wrote them, and equal to what the original computes."""

import io
import pathlib
import pickle
import pickletools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import linen, nnx, serialization
from flax.core import freeze
from flax.training import train_state
from flax.traverse_util import flatten_dict, unflatten_dict
from memory import memory_to_refuse
from reading import apply, loaded, weights
from safetensors.numpy import save_file

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.__main__ import main
from jaxrnn.checkpoint import CheckpointError, find_rnns, load
from jaxrnn.checkpoint.check import check
from jaxrnn.checkpoint.dialects import DIALECTS

T, N, F, H = 5, 2, 3, 4
CELLS = {"LSTM": jaxrnn.LSTM_CELL, "GRU": jaxrnn.GRU_CELL, "RNN": jaxrnn.RNN_TANH}


def _cell(library: str, name: str) -> dict[str, Any]:
    """The weights of a cell, nested."""
    dialect = DIALECTS[library, name]
    torchs = parameters(jaxrnn.CellSpec(CELLS[dialect.kind], F, H))
    if library != "haiku" and (library, name) != ("flax.linen", "GRUCell"):
        del torchs["bias_hh"]
    return unflatten_dict(dialect.write(torchs), sep=".")


# An actor and critic as reinforcement learning has them: a scanned cell, in a module of its own, and dense layers.
POLICY = {
    "ScannedRNN_0": {"GRUCell_0": _cell("flax.linen", "GRUCell")},
    "Dense_0": {"kernel": normal(H, 2), "bias": normal(2)},
}
STATISTICS = {"BatchNorm_0": {"mean": normal(H), "var": normal(H)}}


def _torchs(tree: dict[str, Any], prefix: str = "ScannedRNN_0.GRUCell_0.") -> dict[str, Any]:
    cell = DIALECTS["flax.linen", "GRUCell"].read(flatten_dict(tree["ScannedRNN_0"]["GRUCell_0"], sep="."))
    found = {f"{prefix}{role}_l0": array for role, array in cell.items()}
    return found | {f"Dense_0.{name}": array for name, array in tree["Dense_0"].items()}


def _safetensors(separator: str) -> Callable[[Path, Any], Path]:
    def write(path: Path, tree: Any) -> Path:
        save_file({name: np.array(a, order="C") for name, a in flatten_dict(tree, sep=separator).items()}, path)
        return path

    return write


def _bytes(dump: Callable[[Any], bytes]) -> Callable[[Path, Any], Path]:
    def write(path: Path, tree: Any) -> Path:
        path.write_bytes(dump(tree))
        return path

    return write


def _orbax(path: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def _pickled(protocol: int) -> Callable[[Path, Any], Path]:
    return _bytes(lambda tree: pickle.dumps(tree, protocol))


def _npz(path: Path, tree: Any) -> Path:
    np.savez(path.with_suffix(".npz"), **flatten_dict(tree, sep="/"))
    return path.with_suffix(".npz")


WRITERS = {
    "savez": _npz,
    **{f"safetensors, {each!r}": _safetensors(each) for each in (".", ",", "/", "|", "__", " -> ")},
    "to_bytes": _bytes(serialization.to_bytes),
    "msgpack_serialize": _bytes(serialization.msgpack_serialize),
    **{f"pickle, protocol {number}": _pickled(number) for number in (2, 3, 4, 5)},
    "pickle, FrozenDict": _bytes(lambda tree: pickle.dumps(freeze(tree))),
    "pickle, JAX": _bytes(lambda tree: pickle.dumps(jax.tree.map(jnp.asarray, tree))),
    "orbax": _orbax,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_wrote_it(writer: str, tmp_path: Path) -> None:
    with jax.enable_x64(True):
        for number, tree in enumerate(({"params": POLICY}, POLICY)):
            tensors, words = loaded(WRITERS[writer](tmp_path / f"{number}", tree))
            assert not words
            assert_close(tensors, _torchs(POLICY), atol=0)
            assert tensors["Dense_0.kernel"].flags.writeable
            [rnn] = find_rnns(tensors)
            assert (rnn.prefix, rnn.kind, rnn.assumed) == ("ScannedRNN_0.GRUCell_0.", "GRU", {"batch_first": False})


FLAX = [(library, name) for library, name in DIALECTS if library.startswith("flax.")]


@pytest.mark.parametrize(("library", "name"), FLAX, ids=[".".join(each) for each in FLAX])
def test_cells_of_flax_compute_the_same(library: str, name: str, tmp_path: Path) -> None:
    tree, x = {"encoder": {"cell": _cell(library, name)}}, normal(N, T, F)
    path = WRITERS["msgpack_serialize"](tmp_path / "a.msgpack", tree)
    tensors = load(path)
    [rnn] = find_rnns(tensors)
    assert (rnn.prefix, rnn.assumed["batch_first"]) == ("encoder.", True)
    with jax.enable_x64(True):
        ours, state = apply(rnn.spec, weights(tensors, rnn), jnp.asarray(x))
        made = nnx if library == "flax.nnx" else linen
        if made is nnx:
            cell = getattr(nnx, name)(F, H, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
            nnx.update(cell, nnx.State(tree["encoder"]["cell"]))
            carry, theirs = nnx.RNN(cell, return_carry=True, rngs=nnx.Rngs(0))(x)
        else:
            layer = linen.RNN(getattr(linen, name)(H, param_dtype=jnp.float64), return_carry=True)
            carry, theirs = layer.apply({"params": {"cell": tree["encoder"]["cell"]}}, x)
        assert_close(ours, theirs, atol=1e-13)
        theirs_last = list(reversed(carry)) if isinstance(carry, tuple) else [carry]
        assert_close([each[0] for each in jax.tree.leaves(state)], theirs_last, atol=1e-13)
        result = check(rnn, tensors, None)
    assert result.original.startswith(library)
    assert result.difference is not None
    assert result.difference < 1e-14


@pytest.mark.libraries
@pytest.mark.parametrize(("name", "biases"), [("LSTM", 1), ("VanillaRNN", 2), ("VanillaRNN", 1)])
def test_cells_of_haiku_compute_the_same(name: str, biases: int, tmp_path: Path) -> None:
    haiku = pytest.importorskip("haiku")
    more = {"double_bias": biases == 2} if name == "VanillaRNN" else {}

    def unrolled(x: Any) -> Any:
        core = getattr(haiku, name)(H, **more)
        return haiku.dynamic_unroll(core, x, core.initial_state(N))

    run = haiku.without_apply_rng(haiku.transform(unrolled))
    x = normal(T, N, F)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: normal(*a.shape), run.init(jax.random.key(0), x))
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(params))
        tensors = load(tmp_path / "a.pkl")
        [rnn] = find_rnns(tensors)
        ours, state = apply(rnn.spec, weights(tensors, rnn), jnp.asarray(x))
        theirs, last = run.apply(params, x)
        assert_close(ours, theirs, atol=1e-13)
        assert_close([each[0] for each in jax.tree.leaves(state)], jax.tree.leaves(last), atol=1e-13)
        assert check(rnn, tensors, None).difference < 1e-14
    assert rnn.prefix == {"LSTM": "lstm.", "VanillaRNN": "vanilla_rnn."}[name]
    assert rnn.said == ({"nonlinearity": "relu"} if name == "VanillaRNN" else {})


def test_haikus_names_of_other_layers_are_no_cells(tmp_path: Path) -> None:
    """A hk.Linear is named as the layers in a hk.LSTM are."""
    tree: Any = {"critic/~/linear": {"w": normal(F + H, 4 * H), "b": normal(4 * H)}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree))
    assert find_rnns(load(tmp_path / "a.pkl")) == []


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("writer", ["safetensors, ','", "to_bytes"])
def test_stacked_seeds_are_named_and_the_remedy_reads_one(
    writer: str, axes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What jax.vmap made of several seeds, and of several agents."""
    monkeypatch.chdir(tmp_path)
    tree = POLICY
    for _ in range(axes):
        tree = jax.tree.map(lambda *arrays: np.stack(arrays), tree, jax.tree.map(lambda a: a + 1, tree))
    path = WRITERS[writer](tmp_path / "seeds", {"params": tree})
    for _ in range(axes):
        tensors, [words] = loaded(path)
        assert find_rnns(tensors) == []
        cause, remedy = words.split("\n")
        assert cause.startswith("ScannedRNN_0.GRUCell_0 is 2 cells, one for each index of its arrays' first axis, as ")
        _, _, code = remedy.partition("write a file of one, and read that: ")
        with pytest.warns(UserWarning, match="not converted"):
            exec(code, {"jaxrnn": jaxrnn, "numpy": np, "path": path})
        path = tmp_path / "one.npz"
    tensors, said = loaded(path)
    assert said == []
    assert_close(tensors, _torchs(POLICY), atol=0)


def test_lstms_of_haiku_with_a_name_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the message says to type finds them."""
    tree = {f"net/{name}/linear": _cell("haiku", "LSTM")["linear"] for name in ("core", "core2")}
    tree["net/linear"] = {"w": normal(3, 5), "b": normal(5)}  # of another module
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree))
    assert main(["inspect", str(tmp_path / "a.pkl")]) == 2
    words = " ".join(capsys.readouterr().err.split())
    _, _, typed = words.partition("if these are LSTMs of Haiku, put lstm in their names: jaxrnn ")
    out = str(tmp_path / "renamed.safetensors")
    assert main([out if word == "OUT" else word for word in typed.split()]) == 0
    assert [rnn.prefix for rnn in find_rnns(load(out))] == ["net.core_lstm.", "net.core2_lstm."]


def test_a_minimal_gated_unit_is_left_out_and_a_cell_computes_it(tmp_path: Path) -> None:
    layer, x = linen.RNN(linen.MGUCell(H, param_dtype=jnp.float64)), normal(N, T, F)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda a: normal(*a.shape), layer.init(jax.random.key(0), x))
        tensors, [words] = loaded(WRITERS["to_bytes"](tmp_path / "a", {"mgu": variables["params"]}))
        assert words.startswith(
            "left out mgu.cell (flax.linen.MGUCell), which torch does not have\nwrite a jaxrnn.Cell"
        )

        def step(gates: Any, hidden: Any, state: Any) -> Any:
            (f, n), (h,) = gates, state
            f = jax.nn.sigmoid(f)
            return ((1 - f) * jnp.tanh(n + f * hidden[0]) + f * h,)

        spec = jaxrnn.Spec(jaxrnn.Cell("MGU", ("f", "n"), ("h",), step, apart=("n",)), F, H, batch_first=True)
        a = {name.removeprefix("mgu.cell."): array for name, array in tensors.items()}
        params = {f"weight_{s}h_l0": np.concatenate([a[f"{s}f.kernel"].T, a[f"{s}n.kernel"].T]) for s in "ih"}
        params["bias_ih_l0"] = np.concatenate([a["if.bias"], a["in.bias"]])
        params["bias_hh_l0"] = np.concatenate([np.zeros(H), a["hn.bias"]])
        ours, _ = jaxrnn.apply(spec, jax.tree.map(jnp.asarray, params), jnp.asarray(x))
        assert_close(ours, layer.apply(variables, x), atol=1e-13)


@pytest.mark.libraries
def test_haikus_gru_is_left_out_and_a_cell_computes_it(tmp_path: Path) -> None:
    haiku = pytest.importorskip("haiku")
    core = {"w_i": normal(F, 3 * H), "w_h": normal(H, 3 * H), "b": normal(3 * H)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"core": core}))
    tensors, [words] = loaded(tmp_path / "a.pkl")
    assert words.startswith("left out core (haiku.GRU), which torch does not have\nit multiplies r * h by a matrix")
    assert words.endswith("as examples/other_libraries.md does, with z and 1 - z exchanged")
    assert_close(tensors, {f"core.{name}": array for name, array in core.items()}, atol=0)

    def step(gates: Any, hidden: Any, state: Any) -> Any:
        (z, r, n), (h,) = gates, state
        z, r = jax.nn.sigmoid(z), jax.nn.sigmoid(r)
        n = jnp.tanh(n + (r * h) @ tensors["core.w_h"][:, 2 * H :])
        return ((1 - z) * h + z * n,)

    spec = jaxrnn.Spec(jaxrnn.Cell("GRU", ("z", "r", "n"), ("h",), step, apart=("n",)), F, H)
    arrays = tensors["core.w_i"].T, tensors["core.w_h"].T, tensors["core.b"], np.zeros(3 * H)
    x = normal(T, N, F)
    with jax.enable_x64(True):
        run = haiku.transform(lambda x: haiku.dynamic_unroll(haiku.GRU(H, name="core"), x, jnp.zeros((N, H))))
        ours, _ = jaxrnn.apply(spec, dict(zip(spec.shapes(), map(jnp.asarray, arrays), strict=True)), jnp.asarray(x))
        assert_close(ours, run.apply({"core": core}, None, x)[0], atol=1e-13)


def test_both_directions(tmp_path: Path) -> None:
    tree = {"enc": {f"{way}_rnn": {"cell": _cell("flax.nnx", "LSTMCell")} for way in ("forward", "backward")}}
    tensors, [words] = loaded(WRITERS["to_bytes"](tmp_path / "a", tree))
    assert words.startswith("enc.forward_rnn and enc.backward_rnn are read as a Bidirectional")
    [rnn] = find_rnns(tensors)
    assert (rnn.prefix, rnn.bidirectional) == ("enc.", True)
    assert check(rnn, tensors, None)[2] == "flax.nnx.LSTMCell"
    assert check(rnn, tensors, None).difference < 1e-14


def test_the_parameters_of_a_train_state(tmp_path: Path) -> None:
    import optax

    class State(train_state.TrainState):
        batch_stats: Any
        target_params: Any

    state = State.create(
        apply_fn=None, params=POLICY, tx=optax.adam(1e-3), batch_stats=STATISTICS, target_params=POLICY
    )
    wanted = _torchs(POLICY) | {f"BatchNorm_0.{name}": a for name, a in STATISTICS["BatchNorm_0"].items()}
    for name in ("to_bytes", "orbax"):
        path = WRITERS[name](tmp_path / name, serialization.to_state_dict(state))
        assert_close(load(path), wanted, atol=1e-7)
        assert checkpoint.load_tree(path, "step") == 0
        assert_close(load(path, "target_params"), _torchs(POLICY), atol=1e-7)
        moments = load(path, "opt_state.0.mu")
        assert_close(moments, jax.tree.map(np.zeros_like, _torchs(POLICY)), atol=0)
    nested = {"actor": {"params": POLICY, "step": np.array(3)}, "critic": {"params": {"params": POLICY}}}
    nested |= {"opt_state": {"mu": {"params": POLICY}}}
    tensors = load(WRITERS["to_bytes"](tmp_path / "nested", nested))
    assert_close(
        tensors, {f"{name}.{key}": a for name in ("actor", "critic") for key, a in _torchs(POLICY).items()}, atol=0
    )
    assert [rnn.prefix for rnn in find_rnns(tensors)] == [
        f"{name}.ScannedRNN_0.GRUCell_0." for name in ("actor", "critic")
    ]


def test_lists_of_parameters(tmp_path: Path) -> None:
    for name in ("msgpack_serialize", "pickle, protocol 4"):
        path = WRITERS[name](tmp_path / name, {"runs": [POLICY, {"seeds": [POLICY, POLICY]}]})
        prefixes = [rnn.prefix for rnn in find_rnns(load(path))]
        places = ("runs.0.", "runs.1.seeds.0.", "runs.1.seeds.1.")
        assert prefixes == [f"{place}ScannedRNN_0.GRUCell_0." for place in places]
        assert_close(load(path, key="runs.1.seeds.0"), _torchs(POLICY), atol=0)


def test_a_model_of_flax_loads_with_flaxs_names(tmp_path: Path) -> None:
    """Flax's layers take their own layouts, and a recurrent cell becomes ours: nothing is missing or unexpected."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(7, F, rngs=rngs)
            self.conv = nnx.Conv(F, F, (3,), rngs=rngs)
            self.norm = nnx.LayerNorm(F, rngs=rngs)  # whose epsilon is Flax's, and no warning says so
            self.batch = nnx.BatchNorm(F, rngs=rngs)
            self.rnn = jaxrnn.GRU(F, H, rngs=rngs)
            self.head = nnx.Linear(H, 2, rngs=rngs)

    tree = {
        "embed": {"embedding": normal(7, F)},
        "conv": {"kernel": normal(3, F, F), "bias": normal(F)},
        "norm": {"scale": normal(F), "bias": normal(F)},
        "batch": {"scale": normal(F), "bias": normal(F), "mean": normal(F), "var": normal(F)},
        "rnn": {"cell": _cell("flax.linen", "GRUCell")},
        "head": {"kernel": normal(H, 2), "bias": normal(2)},
    }
    model = Model(nnx.Rngs(0))
    raw = flatten_dict(tree, sep="/")
    for tensors in (load(WRITERS["to_bytes"](tmp_path / "a", tree)), raw, flatten_dict(tree, sep=".")):
        assert jaxrnn.load_state_dict(model, tensors) == ([], [])
        for layer in ("embed", "conv", "norm", "batch", "head"):
            for name, array in tree[layer].items():
                assert_close(getattr(getattr(model, layer), name)[...], array.astype("f4"), atol=0)
        assert_close(model.rnn.weight_hh_l0[...], _torchs(POLICY, "")["weight_hh_l0"].astype("f4"), atol=0)
    with pytest.raises(CheckpointError, match=r"head.weight is float64 \(2, 5\), should be float32 \(2, 4\)"):
        jaxrnn.load_state_dict(model, raw | {"head/kernel": normal(5, 2)})
    with pytest.raises(CheckpointError, match=r"head.kernel is unexpected"):
        jaxrnn.load_state_dict(model, raw | {"head/kernel": normal(5)})


DTYPES = ["f8", "f4", "f2", "i8", "u1", "?", "c8", ">f4", ">i2", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_hold_every_bit(protocol: int, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {f"{np.dtype(each)} {i}": (normal(3, 4) * 3).astype(each) for i, each in enumerate(DTYPES)}
    arrays |= {"fortran": np.asfortranarray(normal(3, 4)), "a view": normal(6, 4)[::2, 1:], "empty": np.ones((0, 3))}
    arrays |= {"scalar": np.float32(3), "0-d": np.array(2.5), "jax": jnp.ones(3), "jax's": jnp.ones(2, jnp.bfloat16)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays, protocol))
    tensors = load(tmp_path / "a.pkl")
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        wanted = np.asarray(array).astype(np.asarray(array).dtype.newbyteorder("="))
        assert (tensors[name].dtype, tensors[name].shape) == (wanted.dtype, wanted.shape), name
        assert tensors[name].tobytes() == wanted.tobytes(), name
    tree = checkpoint.load_tree(tmp_path / "a.pkl", "fortran")
    assert tree.tobytes() == arrays["fortran"].tobytes()


def test_msgpack_holds_every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {f"{np.dtype(each)}": (normal(3, 4) * 3).astype(each) for each in DTYPES if str(each)[:1] != ">"}
    arrays |= {"empty": np.ones((0, 3)), "0-d": np.array(2.5), "scalar": np.float32(3)}
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 40)  # larger arrays are cut into parts
    (tmp_path / "a").write_bytes(serialization.msgpack_serialize(dict(arrays)))
    assert b"chunked" in (tmp_path / "a").read_bytes()
    tensors = load(tmp_path / "a")
    for name, array in arrays.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape), name
        assert tensors[name].tobytes() == array.tobytes(), name
    tree = {"a": np.ones(2), "n": 3, "text": "x", "z": 1 + 2j, "list": [1, 2.5, None]}
    (tmp_path / "b").write_bytes(serialization.msgpack_serialize(tree))
    found = checkpoint.load_tree(tmp_path / "b")
    assert_close(found.pop("a"), tree.pop("a"), atol=0)
    assert found == tree


def test_npz_holds_every_bit(tmp_path: Path) -> None:
    arrays = {f"{np.dtype(each)}": (normal(3, 4) * 3).astype(each) for each in DTYPES[:9]}
    arrays |= {"fortran": np.asfortranarray(normal(3, 4)), "0-d": np.array(2.5), "empty": np.ones((0, 3))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        tensors, words = loaded(tmp_path / "a.npz")
        assert not words
        for name, array in arrays.items():
            assert (tensors[name].dtype, tensors[name].shape) == (array.dtype.newbyteorder("="), array.shape), name
            assert_close(tensors[name].real, array.real, atol=0)
    half = np.ones(3, jnp.bfloat16) / 3
    np.savez(tmp_path / "a.npz", half=half)
    tensors, [words] = loaded(tmp_path / "a.npz")
    assert words.startswith("half.npy is read as bfloat16")
    assert tensors["half"].tobytes() == half.tobytes()
    np.savez(tmp_path / "a.npz", a=np.array([{}], object))
    assert _refusal(tmp_path / "a.npz").startswith("a is an array of object, which are not numbers")


class _Anything:
    def __reduce__(self) -> Any:
        return print, ("a call",)


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    return str(caught.value).removeprefix(f"{path}: ")


def test_what_a_pickle_holds_beside_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The remedies of the message work: save the parameters of what was unpickled, or leave out the rest."""
    import optax

    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"params": POLICY, "opt_state": optax.adam(1e-3).init(POLICY)}))
    message = _refusal(path)
    assert "it names optax._src" in message
    remedy = message.partition("\n")[2]
    assert "only_tensors=True" in remedy
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_close(load(path, only_tensors=True), _torchs(POLICY), atol=0)
    assert "left out objects that are not arrays: optax._src" in str(caught[0].message)
    call = remedy.partition("save its parameters: ")[2].partition(", or leave")[0]
    params = pickle.loads(path.read_bytes())["params"]
    import flax

    eval(
        call.replace("weights.msgpack", str(tmp_path / "weights.msgpack")),
        {"flax": flax, "params": params, "pathlib": pathlib},
    )
    assert_close(load(tmp_path / "weights.msgpack"), _torchs(POLICY), atol=0)
    for value in ({"a": np.ones(2), "b": _Anything()}, _Anything(), {"a": np.array([{}], object)}):
        path.write_bytes(pickle.dumps(value))
        assert "its code is not run" in _refusal(path)
    path.write_bytes(pickle.dumps({"a": np.zeros(2, [("x", "f4")])}))
    assert "array of 'V4', which are not numbers" in _refusal(path)
    assert capsys.readouterr().out == ""


class _Tagger(nnx.Module):
    """With random numbers in several places, as Dropout and Flax's layers have them, and items of a list."""

    def __init__(self, rngs: nnx.Rngs, port: bool = False) -> None:
        forward, backward = (nnx.RNN(nnx.LSTMCell(F, H, rngs=rngs)) for _ in range(2))
        self.bi: Any = nnx.Bidirectional(forward, backward, rngs=rngs)
        if port:
            self.bi = jaxrnn.LSTM(F, H, bidirectional=True, batch_first=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(2 * H, 2, rngs=rngs)])
        self.rngs = rngs

    def __call__(self, x: jax.Array) -> jax.Array:
        output = self.bi(x)
        return self.layers[0](self.drop(output[0] if isinstance(output, tuple) else output))


@pytest.mark.filterwarnings("ignore:.* are read as a Bidirectional")
def test_an_nnx_state_without_its_random_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import flax

    trained = nnx.view(_Tagger(nnx.Rngs(0)), deterministic=True)
    state = nnx.state(trained)
    _orbax(tmp_path / "orbax", state)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(state))
    cause, remedy = _refusal(tmp_path / "a.pkl").split("\n")
    assert "it names flax.nnx" in cause
    call = remedy.partition("save what is in it: ")[2].replace("weights.msgpack", str(tmp_path / "weights.msgpack"))
    state = pickle.loads((tmp_path / "a.pkl").read_bytes())
    eval(call, {"flax": flax, "state": state, "pathlib": pathlib})
    x = jnp.asarray(normal(N, T, F), jnp.float32)
    for name in ("orbax", "weights.msgpack"):
        ours = nnx.view(_Tagger(nnx.Rngs(1), port=True), deterministic=True)
        assert jaxrnn.load_state_dict(ours, load(tmp_path / name)) == ([], [])
        assert_close(ours(x), trained(x), atol=1e-6)
    main(["inspect", str(tmp_path / "orbax")])
    assert "left out states of random numbers: bi." in " ".join(capsys.readouterr().err.split())


def test_planted_calls_and_every_opcode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pkl"
    call = b"cbuiltins\nprint\n(X\x01\x00\x00\x00xtR"
    for opcode in pickletools.opcodes:
        for end in (b".", b"\x00\x00\x00\x00.", call + b".", b"0" + call + b"."):
            path.write_bytes(b"\x80\x04" + call[:-1] + opcode.code.encode("latin1") + end)
            assert _refusal(path)
    data = pickle.dumps({"params": POLICY})
    for place in range(2, len(data) - 1, 7):
        path.write_bytes(data[:place] + call + data[place:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(path)
            except CheckpointError:
                continue
    assert capsys.readouterr().out == ""


def _savez(tree: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **flatten_dict(tree, sep="/"))
    return file.getvalue()


WHOLE = {
    "npz": lambda: _savez(POLICY),
    "msgpack": lambda: serialization.to_bytes({"params": POLICY, "step": 3, "z": 1 + 2j}),
    "pickle 2": lambda: pickle.dumps({"params": POLICY, "step": 3}, 2),
    "pickle 5": lambda: pickle.dumps({"params": freeze(POLICY), "x": [jnp.ones(2)]}, 5),
}


@pytest.mark.parametrize("name", WHOLE)
def test_files_cut_short(name: str, tmp_path: Path) -> None:
    data = WHOLE[name]()
    for end in range(1, len(data), len(data) // 40):
        (tmp_path / "a").write_bytes(data[:end])
        assert _refusal(tmp_path / "a")


def _deep(depth: int) -> bytes:
    return b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"N" + b"s" * depth + b"."


def _dag(levels: int) -> bytes:
    value: Any = np.ones(2)
    for _ in range(levels):
        value = {"a": value, "b": value}
    file = io.BytesIO()
    pickle.dump(value, file)
    return file.getvalue()


BOMBS = {
    "a pickle of 200,000 dicts": lambda: _deep(200_000),
    "2^60 paths": lambda: _dag(60),
    "a pickle that says 2^40 bytes": lambda: b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
    "a list of 2^31 in msgpack": lambda: b"\x81\xa1a\xdd\x7f\xff\xff\xff" + bytes(9),
    "lists in lists in msgpack": lambda: b"\x81\xa1a" + b"\xdd\x00\x00\x0f\xff" * 1000,
    "large dicts in large dicts in msgpack": lambda: b"\xdf\x00\x00\xc3\x50\xa1a" * 1000,
    "dicts in dicts in msgpack": lambda: b"\x81\xa1a" * 100_000 + b"\xc0",
    "2^31 items in msgpack": lambda: b"\xdf\x7f\xff\xff\xff\xa1a\xc0",
}


def test_bombs(tmp_path: Path) -> None:
    paths = [tmp_path / name.replace(" ", "_") for name in BOMBS]
    for path, make in zip(paths, BOMBS.values(), strict=True):
        path.write_bytes(make())
    assert memory_to_refuse(paths) < 50 << 20


def test_one_array_a_thousand_times(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps([np.zeros(1 << 20, np.uint8)] * 1000))
    assert _refusal(path).startswith("a bomb: its numbers would fill over")
