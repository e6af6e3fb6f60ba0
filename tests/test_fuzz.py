"""Mutated files of every format are read or refused, in time, in little memory, and with no words but ours.

`pytest -n0 tests/test_fuzz.py --fuzz 100000` reads as many for each reader and says how fast; `-k NAME` takes some. A
failure says how to see it again.
"""

import functools
import gc
import io
import json
import pickle
import tempfile
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from export_archives import export_of_an_lstm, older_export, torch_save
from flax import nnx, serialization
from flax.core import freeze
from flax.traverse_util import flatten_dict
from fuzzing import Reader, fuzz
from making import filled
from mutating import JSON, MSGPACK, PICKLE, PROTOBUF, SAFETENSORS, ZIP, Codec, Coded, taken_apart
from safetensors.numpy import save as safetensors_bytes
from script_archives import TENSOR, script_archive, script_object

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.checkpoint.dialects import DIALECTS

LSTM = {f"rnn.{name}": array for name, array in parameters(jaxrnn.Spec(jaxrnn.LSTM_CELL, 2, 3), np.float32).items()}
GRU = {f"gru.{name}": array for name, array in parameters(jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 3), np.float16).items()}


def _flax() -> dict[str, Any]:
    """Parameters as Flax nests them."""
    cell = DIALECTS["flax.linen", "GRUCell"].write(parameters(jaxrnn.CellSpec(jaxrnn.GRU_CELL, 2, 3)))
    nested: dict[str, Any] = {}
    for name, array in cell.items():
        gate, leaf = name.split(".")
        nested.setdefault(gate, {})[leaf] = array
    return {"GRUCell_0": nested, "Dense_0": {"kernel": normal(3, 2), "bias": normal(2)}}


def _both(codec: Codec, *files: bytes) -> list[Any]:
    """Files as bytes, and taken apart."""
    return [*files, *(Coded(codec, codec.decode(data)) for data in files)]


def _safetensors() -> list[Any]:
    flax = {name.replace(".", " -> "): array for name, array in flatten_dict(_flax(), sep=".").items()}
    files = (LSTM | {"steps": np.array(3), "empty": np.zeros((0, 2), np.int8)}, flax, GRU)
    return _both(SAFETENSORS, *(safetensors_bytes(tensors, {"format": "pt"}) for tensors in files))


def _deflated(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


def _torch_zip() -> list[Any]:
    plain = torch_save(LSTM | {"steps": np.array(3)})
    return [*_both(ZIP, plain, torch_save(GRU)), _deflated(plain)]


def _saved(torch: types.ModuleType, value: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


class Config:
    """An object in a pickle beside tensors."""

    def __init__(self) -> None:
        self.sizes = [1, 2]


def _of_torch(torch: types.ModuleType) -> list[Any]:
    """What people save with torch: a state dict, a training run, objects, views, a quantized model."""
    nn = torch.nn
    model = nn.ModuleDict({"rnn": nn.LSTM(2, 3), "head": nn.Linear(3, 2), "norm": nn.BatchNorm1d(3)})
    optimizer = torch.optim.Adam(model.parameters())
    run = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "lr": [0.1, None]}
    objects = {"model": model.state_dict(), "config": Config(), "set": {1}, "z": 1j, (1, "a"): 2.5}
    views = {"a": torch.ones(4, 3).T, "b": torch.ones(5)[::2], "c": torch.ones(2).bfloat16(), "d": nn.Parameter()}
    return _both(ZIP, *(_saved(torch, each) for each in (run, objects, views)))


def _quantized(torch: types.ModuleType) -> list[Any]:
    nn = torch.nn
    model = nn.ModuleDict({"rnn": nn.LSTM(2, 3), "cell": nn.GRUCell(2, 3), "head": nn.Linear(3, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRUCell, nn.Linear})
        return _both(ZIP, _saved(torch, made.state_dict()))


def _legacy(torch: types.ModuleType) -> list[Any]:
    return [_saved(torch, torch.nn.GRU(1, 2).state_dict(), False), _saved(torch, {"a": [torch.ones(3)]}, False)]


def _script() -> list[Any]:
    from script_archives import text

    return _both(ZIP, script_archive(script_object(b"}" + text("w") + TENSOR + b"s")))


def _scripts(torch: types.ModuleType) -> list[Any]:
    nn = torch.nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.LSTM(2, 3, batch_first=True, dropout=0.2), nn.GRU(3, 3)])
            self.head = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x, _ = layer(x)
            return self.head(x[0])

    model, files = Model().eval(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = torch.jit.script(model), torch.jit.freeze(torch.jit.trace(model, torch.ones(2, 3, 2)))
    for made in both:
        file = io.BytesIO()
        torch.jit.save(made, file)
        files.append(file.getvalue())
    return _both(ZIP, *files)


def _export() -> list[Any]:
    return _both(ZIP, export_of_an_lstm(), older_export(torch_save({"w": np.arange(4.0)})))


def _npz() -> list[Any]:
    file = io.BytesIO()
    np.savez(file, **flatten_dict(_flax(), sep="/"), step=3)
    return [*_both(ZIP, file.getvalue()), _deflated(file.getvalue())]


def _msgpack() -> list[Any]:
    trees: Any = (
        {"params": _flax(), "step": 3, "z": 1 + 2j},
        _flax(),
        {"params": {"w": [jnp.ones(2)]}, "x": [1.5, None]},
    )
    return _both(MSGPACK, *map(serialization.to_bytes, trees))


def _pickles() -> list[Any]:
    trees: Any = ({"params": _flax(), "step": 3}, {"params": freeze(_flax()), "x": [jnp.ones(2)]})
    return _both(PICKLE, *(pickle.dumps(tree, protocol) for tree in trees for protocol in (2, 5)))


def _keras() -> list[Any]:
    pytest.importorskip("pyfive", reason="pyfive is not installed")
    import keras_files as files

    names = {"layers/lstm_1/vars": "tagger", "layers/bidirectional/vars": "both"}
    cells = {
        f"layers/rnn/cell/cells/{name}/vars": files.layer_arrays("LSTM", 3) for name in ("lstm_cell", "lstm_cell_1")
    }
    old = {"model_weights/both/both/forward_gru/gru_cell": files.layer_arrays("GRU")}
    weights, weights_2 = files.hdf5(files.KERAS_3 | cells, names=names), files.hdf5(old, files.CONFIG)
    config = json.dumps(files.CONFIG).encode()
    archives = [files.keras_zip(config_json=config, model_weights_h5=each) for each in (weights, weights_2)]
    return [*_both(ZIP, *archives), weights, weights_2, taken_apart(weights_2, ".h5")]


def _onnx() -> list[Any]:
    import onnx_models as models

    layer = filled(lambda: jaxrnn.LSTM(2, 3, bidirectional=True, rngs=nnx.Rngs(0)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.to_onnx(layer, Path(folder) / "model.onnx")
        return _both(PROTOBUF, models.everything().SerializeToString(), (Path(folder) / "model.onnx").read_bytes())


def _folders(write: Callable[[Path], object]) -> dict[str, Any]:
    """A directory that a function writes, with what is JSON in it taken apart."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made"
        write(path)
        found = {}
        for file in sorted(each for each in path.rglob("*") if each.is_file()):
            data = file.read_bytes()
            found[str(file.relative_to(path))] = Coded(JSON, JSON.decode(data)) if data[:1] == b"{" else data
    return found


def _orbax() -> list[Any]:
    import orbax.checkpoint as ocp

    def zarr(path: Path, newer: bool = False) -> None:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=newer)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave({"params": _flax(), "name": "a", "none": None}))

    def plain(path: Path) -> None:
        checkpoint.save(path.with_suffix(".orbax"), LSTM)
        path.with_suffix(".orbax").rename(path)

    return [_folders(zarr), _folders(functools.partial(zarr, newer=True)), _folders(plain)]


def _index() -> list[Any]:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {each: name for name, tensors in zip(names, (LSTM, GRU), strict=True) for each in tensors}
    index = json.dumps({"metadata": {"total_size": 300}, "weight_map": where}).encode()
    shards = [safetensors_bytes(LSTM), safetensors_bytes(GRU)]
    files = dict(zip(names, (Coded(SAFETENSORS, SAFETENSORS.decode(each)) for each in shards), strict=True))
    return [{"model.safetensors.index.json": Coded(JSON, JSON.decode(index)), **files}]


def _load(path: Path, random: Random) -> None:
    tensors = checkpoint.load(path, only_tensors=random.random() < 0.3, dequantize=random.random() < 0.3)
    assert all(isinstance(array, np.ndarray) for array in tensors.values())
    checkpoint.find_rnns(tensors)
    if random.random() < 0.1:
        checkpoint.scaffold(tensors, linen=random.random() < 0.5)


def _optimizers() -> list[Any]:
    """Their states, as JSON."""
    files = []
    adam = {"betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False, "decoupled_weight_decay": True}
    for own, moments in (
        (adam | {"param_names": ["w", "v"]}, ("exp_avg", "exp_avg_sq")),
        (adam | {"amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        ({"momentum": 0.9, "dampening": 0, "nesterov": False}, ("momentum_buffer",)),
        ({"alpha": 0.9, "eps": 1e-8, "centered": False, "momentum": 0}, ("square_avg",)),
        ({"lr_decay": 0.1, "eps": 1e-8, "initial_accumulator_value": 0}, ("sum",)),
    ):
        group = {"lr": 0.1, "weight_decay": 0.1, "maximize": False, "foreach": None, "params": [0, 1]} | own
        kept = {n: {"step": 3} | {name: [1.0] * (2 + n) for name in moments} for n in (0, 1)}
        files.append(json.dumps({"state": kept, "param_groups": [group]}).encode())
        files.append(json.dumps({"state": kept, "param_groups": [group | {"params": [n]} for n in (0, 1)]}).encode())
    return [Coded(JSON, JSON.decode(data)) for data in files]


def _load_optimizer(path: Path, random: Random) -> None:
    try:
        state = json.loads(path.read_bytes())
        kept = state["state"].items() if random.random() < 0.9 else ()
        state["state"] = {
            int(key): {n: np.asarray(v, object if v is None else None) for n, v in each.items()} for key, each in kept
        }
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        raise checkpoint.CheckpointError("no state to try\ntry another") from error
    params = {"w": np.ones(2), "v": np.ones(3)}
    rate = random.choice([None, 0.1, lambda step: 0.1 / (1 + step)])
    _, ours = checkpoint.optax_from_torch(state, params, None, rate, random.choice([None, 3]))
    checkpoint.optax_to_torch(ours, state, params, ["w", "v"], rate, 3)


def _load_tree(path: Path, random: Random) -> None:
    checkpoint.load_tree(path, random.choice([None, "params", "state_dict", "x.0", "a"]))


PLAIN = [
    Reader("safetensors", _safetensors, "model.safetensors", _load),
    Reader("torch zip", _torch_zip, "model.pt", _load),
    Reader("script by hand", _script, "model.pt", _load),
    Reader("torch export", _export, "model.pt2", _load),
    Reader("npz", _npz, "model.npz", _load),
    Reader("msgpack", _msgpack, "model.msgpack", _load),
    Reader("pickles", _pickles, "model.pkl", _load),
    Reader("index", _index, "model", _load),
    Reader("optimizers", _optimizers, "state.json", _load_optimizer, files=100),
    Reader("orbax", _orbax, "model", _load, files=10),
    Reader("trees of msgpack", _msgpack, "model.msgpack", _load_tree),
    Reader("trees of pickles", _pickles, "model.pkl", _load_tree),
]
OTHERS = [
    Reader("Keras", _keras, "model.keras", _load),
    Reader("ONNX", _onnx, "model.onnx", _load),
]
TORCHS: list[tuple[str, Callable[[types.ModuleType], list[Any]], Any, int]] = [
    ("saved by torch", _of_torch, _load, 200),
    ("trees of torch", _of_torch, _load_tree, 200),
    ("quantized", _quantized, _load, 200),
    ("legacy", _legacy, _load, 200),
    ("TorchScript", _scripts, _load, 200),
]


def _run(reader: Reader, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    config = request.config
    count = config.getoption("--fuzz") or (20_000 if config.getoption("--thorough") else reader.files)
    counts = fuzz(reader, count, config.getoption("--fuzz-first"))
    if config.getoption("--fuzz"):
        with capsys.disabled():
            print(f"\n{reader.name}: {counts}", flush=True)
    assert not counts.failures, "\n".join([f"{reader.name}:", *counts.failures])
    if count >= 100:
        assert counts.refused
        assert counts.read


@pytest.mark.parametrize("reader", PLAIN, ids=lambda reader: reader.name)
def test_mutated(reader: Reader, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    _run(reader, request, capsys)


@pytest.mark.libraries
@pytest.mark.parametrize("reader", OTHERS, ids=lambda reader: reader.name)
def test_mutated_of_libraries(
    reader: Reader, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(reader, request, capsys)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name, *_ in TORCHS])
def test_mutated_of_torch(
    name: str, torch: types.ModuleType, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    _, seeds, read, files = next(each for each in TORCHS if each[0] == name)
    torch.manual_seed(0)
    _run(Reader(name, functools.partial(seeds, torch), "model.pt", read, files), request, capsys)


# What fuzzing found.


def _npy(header: str) -> bytes:
    text = header.encode() + b" " * (-len(header) % 64 + 53) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4)


def _zip(kind: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("__", "."), data)
    return file.getvalue()


def _one_tensor(shape: list[int]) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    return len(header).to_bytes(8, "little") + header


def _gates_of_different_inputs() -> bytes:
    tree = _flax()
    tree["GRUCell_0"]["iz"]["kernel"] = normal(4, 3)
    return serialization.to_bytes({"params": tree})


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (lambda: _one_tensor([0, 2**62, 8]), r"damaged: x of shape \(0, 4611686018427387904, 8\) cannot be read"),
        (lambda: _one_tensor([0] * 65), r"damaged: x of shape \(0.*cannot be read: maximum supported dimension"),
        (lambda: _zip(a__npy=_npy(r"{'descr': '\p', 'fortran_order': False, 'shape': (1,)}")), r"damaged \.npz file"),
        (_gates_of_different_inputs, r"ir.kernel, iz.kernel, in.kernel of flax\.linen\.GRUCell are of different input"),
    ],
)  # fmt: skip
def test_refused(data: Callable[[], bytes], cause: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(data())
    with pytest.raises(checkpoint.CheckpointError, match=rf"^{path}: .*{cause}.*\n"):
        checkpoint.load(path)


def test_files_of_one_byte(tmp_path: Path) -> None:
    for value in range(256):
        (tmp_path / "model").write_bytes(bytes([value]))
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(tmp_path / "model")


def test_what_numpy_and_pickletools_advise_is_not_said(tmp_path: Path) -> None:
    """Warnings are errors here."""
    (tmp_path / "model").write_bytes(_zip(a__npy=_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1L,)}")))
    assert checkpoint.load(tmp_path / "model")["a"].shape == (1,)
    pickled = rb"(dS'\_'" + b"\nI1\ns."
    for data in (pickled, pickled[:-1] + b"S'b'\ncos\nsystem\ns."):  # read, and refused
        (tmp_path / "model").write_bytes(_zip(**{"archive/data__pkl": b"\x80\x02" + data}))
        with pytest.raises(checkpoint.CheckpointError, match=r"some entries of it are not named|names os\.system"):
            checkpoint.load(tmp_path / "model")


def test_what_torch_advises_is_not_said(torch: types.ModuleType, tmp_path: Path) -> None:
    data = _saved(torch, {"w": torch.ones(2)}, zipped=False)
    (tmp_path / "model").write_bytes(data.replace(b"\x80\x02", b"\x80\x03"))  # another protocol
    assert list(checkpoint.load(tmp_path / "model")) == ["w"]


@pytest.mark.libraries
def test_damage_in_files_of_keras(tmp_path: Path) -> None:
    """Neither LZMA, which takes as much memory as the file says, nor zeros for what is not there."""
    pytest.importorskip("pyfive", reason="pyfive is not installed")
    import keras_files as files

    weights = files.hdf5({"layers/lstm/cell/vars": files.layer_arrays("LSTM")})
    (tmp_path / "model.keras").write_bytes(_zip(zipfile.ZIP_LZMA, config__json=b"{}", **{"model.weights.h5": weights}))
    with pytest.raises(checkpoint.CheckpointError, match=r"damaged: Keras compresses no entry as config\.json, model"):
        checkpoint.load(tmp_path / "model.keras")
    place = (1 << 40).to_bytes(8, "little")
    numbers = files.layer_arrays("LSTM")[0].tobytes()
    address = weights.index(numbers).to_bytes(8, "little")
    (tmp_path / "model.h5").write_bytes(weights.replace(address, place))
    (tmp_path / "model2.keras").write_bytes(
        _zip(config__json=b"{}", **{"model.weights.h5": weights.replace(address, place)})
    )
    for name in ("model.h5", "model2.keras"):
        with pytest.raises(checkpoint.CheckpointError, match="numbers of layers/lstm/cell/vars/0 reach past its end"):
            checkpoint.load(tmp_path / name)
    gc.collect()


@pytest.mark.libraries
@pytest.mark.filterwarnings("ignore:.*the file does not say")
def test_large_arrays_in_files_of_keras(tmp_path: Path) -> None:
    """pyfive reads them in pieces of 4 MB, and in files in a zip not all from the right place."""
    pytest.importorskip("pyfive", reason="pyfive is not installed")
    import keras_files as files

    array = np.arange(2 * 1_100_001, dtype=np.float32).reshape(2, -1)
    weights = files.hdf5({"layers/dense/vars": [array]})
    (tmp_path / "model.keras").write_bytes(_zip(config__json=b"{}", **{"model.weights.h5": weights}))
    assert np.array_equal(checkpoint.load(tmp_path / "model.keras")["dense.kernel"], array)
