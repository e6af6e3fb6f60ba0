"""Files of torch.save without torch: every tensor bit by bit, whatever calls is refused, and no damage gets through."""

import io
import pickle
import sys
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.checkpoint import CheckpointError
from jaxrnn.checkpoint.formats.pickles import unpickle

DTYPES = ["float64", "float32", "float16", "bfloat16", "complex64", "complex128", "int64", "int32", "int16", "int8"]
DTYPES += ["uint8", "bool", "uint16", "float8_e5m2"]


def _archive(pickled: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    """A file of torch.save: its pickle, and entries by their names inside the folder."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as writer:
        writer.writestr("model/data.pkl", pickled)
        for name, data in entries.items():
            writer.writestr(f"model/{name}", data)
    return file.getvalue()


def _load(data: bytes, folder: Path) -> dict[str, np.ndarray]:
    (folder / "a.pt").write_bytes(data)
    return checkpoint.load(folder / "a.pt")


def _refusal(data: bytes, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _load(data, folder)
    path_and_cause, remedy = str(caught.value).split("\n")
    assert path_and_cause.startswith(f"{folder / 'a.pt'}: ")
    assert remedy
    return path_and_cause.partition(": ")[2]


def _saved(torch: types.ModuleType, value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Load as where torch cannot be imported."""

    def load(data: bytes, folder: Path) -> dict[str, np.ndarray]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch", None)
            return _load(data, folder)

    return load


def _assert_same_bits(ours: np.ndarray, tensor: object, torch: types.ModuleType) -> None:
    tensor = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    assert str(ours.dtype) == str(tensor.dtype).removeprefix("torch.")
    assert ours.shape == tuple(tensor.shape)
    assert ours.flags.c_contiguous
    assert ours.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.torch
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_views_of_shared_storage(
    torch: types.ModuleType, without_torch: Callable, tmp_path: Path, data: st.DataObject
) -> None:
    dtype = getattr(torch, data.draw(st.sampled_from(DTYPES)))
    base = torch.tensor(np.random.RandomState(0).randint(0, 2, 60)).to(dtype)
    tensors = {"base": base}
    for name in "abc":
        shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
        strides = tuple(data.draw(st.integers(1, 5)) for _ in shape)
        if torch.empty(0).new_empty(shape).numel() <= 60:
            tensors[name] = base.as_strided(shape, strides, data.draw(st.integers(0, 10)))
    found = without_torch(_saved(torch, tensors), tmp_path)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        _assert_same_bits(found[name], tensor, torch)


@pytest.mark.torch
def test_whatever_holds_numbers(torch: types.ModuleType, without_torch: Callable, tmp_path: Path) -> None:
    complex_ = torch.tensor([1 + 2j, 3 - 1j])
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "an attribute"
    tensors = {
        "parameter": torch.nn.Parameter(torch.arange(3.0)),
        "with attributes": parameter,
        "buffer": torch.nn.Buffer(torch.arange(3)),
        "conjugate": complex_.conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "tied": parameter,
        "": torch.zeros(()),
    }
    found = without_torch(_saved(torch, tensors), tmp_path)
    for name, tensor in tensors.items():
        _assert_same_bits(found[name], tensor, torch)
    module = torch.nn.Sequential(torch.nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), torch.nn.BatchNorm1d(4))
    found = without_torch(_saved(torch, module.state_dict()), tmp_path)
    for name, tensor in module.state_dict().items():
        _assert_same_bits(found[name], tensor, torch)


def _contents(tensors: dict[str, np.ndarray]) -> dict[str, tuple]:
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in tensors.items()}


@pytest.mark.torch
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_what_we_write_torch_reads_and_back(
    torch: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: st.DataObject
) -> None:
    """torch, and what torch saved again, hold every bit of what was written where torch cannot be imported."""
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    tensors = {}
    for name in data.draw(st.lists(names, max_size=4, unique=True)):
        shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
        numbers = np.random.RandomState(len(name)).randint(0, 2, shape)
        tensors[name] = np.asarray(numbers).astype(jnp.dtype(data.draw(st.sampled_from(DTYPES))))
    path = tmp_path / data.draw(st.sampled_from(["a.pt", "a.pth", "a.ckpt", "a.bin"]))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        checkpoint.save(path, tensors)
        assert _contents(checkpoint.load(path)) == _contents(tensors)
    theirs = torch.load(path, weights_only=True)
    assert list(theirs) == list(tensors)
    for name, tensor in theirs.items():
        _assert_same_bits(tensors[name], tensor, torch)
        assert tensor.is_contiguous()
    torch.save(theirs, path)
    assert _contents(checkpoint.load(path)) == _contents(tensors)


@pytest.mark.torch
def test_a_module_of_torch_loads_what_we_write(torch: types.ModuleType, tmp_path: Path) -> None:
    ours = jaxrnn.LSTM(3, 4, 2, bidirectional=True, proj_size=2, rngs=nnx.Rngs(0))
    checkpoint.save(tmp_path / "a.pt", jaxrnn.state_dict(ours))
    theirs = torch.nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    theirs.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True), strict=True)
    for name, value in jaxrnn.state_dict(ours).items():
        np.testing.assert_array_equal(theirs.state_dict()[name].numpy(), value, strict=True)


def test_dtypes_that_torch_has_not(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="x has dtype int4, which torch does not have"):
        checkpoint.save(tmp_path / "a.pt", {"x": np.ones(2, jnp.int4)})
    assert not list(tmp_path.iterdir())


# Pickles by hand. GLOBAL is b"cMODULE\nNAME\n", REDUCE is b"R", and so on: see the pickletools of the standard library.

STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def _tensor(offset: int = 0, shape: tuple = (4,), strides: tuple = (1,), name: str = "x") -> bytes:
    """A pickle of a dict with one float32 tensor, in a storage of four numbers."""
    described = b"".join(
        b"(" + b"".join(pickle.dumps(n, 2)[2:-1] for n in numbers) + b"t" for numbers in (shape, strides)
    )
    tensor = (
        REBUILD + b"(" + STORAGE + pickle.dumps(offset, 2)[2:-1] + described + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}" + pickle.dumps(name, 2)[2:-1].partition(b"q")[0] + tensor + b"s."


@pytest.mark.parametrize(("kind", "bit"), [("Bool", "neg"), ("Bool", "conj"), ("Float", "conj"), ("Long", "neg")])
def test_bits_that_no_such_tensor_has(kind: str, bit: str, tmp_path: Path) -> None:
    metadata = b"}X" + len(bit).to_bytes(4, "little") + bit.encode() + b"\x88s"
    pickled = _tensor().replace(b"OrderedDict\n)RtR", b"OrderedDict\n)R" + metadata + b"tR")
    pickled = pickled.replace(b"FloatStorage", f"{kind}Storage".encode())
    size = {"Bool": 4, "Float": 16, "Long": 32}[kind]
    assert "(a tensor is conjugated or negated, and its dtype cannot be)" in _refusal(
        _archive(pickled, **{"data/0": bytes(size)}), tmp_path
    )


def test_a_pickle_by_hand(tmp_path: Path) -> None:
    numbers = np.arange(4, dtype=np.float32)
    (found,) = _load(_archive(_tensor(), **{"data/0": numbers.tobytes()}), tmp_path).values()
    np.testing.assert_array_equal(found, numbers)
    big = _archive(_tensor(1, (2,), (2,)), **{"data/0": numbers.byteswap().tobytes(), "byteorder": b"big"})
    (found,) = _load(big, tmp_path).values()
    np.testing.assert_array_equal(found, [1, 3])
    assert found.dtype.isnative


@pytest.mark.parametrize(
    ("pickled", "cause"),
    [
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "it names os.system"),
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "it names builtins.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it names os.system"),
        (b"\x80\x02ctorch\nload\n.", "it names torch.load"),
        (b"\x80\x02ctorch\nobject\n.", "it names torch.object"),
        (b"\x80\x02ctorch._utils\n_rebuild_wrapper_subclass\n.", "it names torch._utils._rebuild_wrapper_subclass"),
        (b"\x80\x02(ios\nsystem\n.", "has the operation INST"),
        (b"\x80\x02ctorch\nSize\n)\x81.", "has the operation NEWOBJ"),
        (b"\x80\x02(ctorch\nSize\no.", "has the operation OBJ"),
        (b"\x80\x02\x82\x01.", "has the operation EXT1"),
        (b"\x80\x02Pname\n.", "has the operation PERSID"),
        (b"\x80\x02ctorch\nSize\n}b.", "truncated or damaged"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "truncated or damaged"),
        (b"\x80\x02]K\x01s.", "truncated or damaged"),
        (b"\x80\x02}K\x01a.", "truncated or damaged"),
        (b"\x80\x02}(K\x01)tK\x01s.", "a dict or a set in it has a key of type tuple"),
        (b"\x80\x02}\x8a\x09" + b"\xff" * 8 + b"\x00K\x01s.", "a dict or a set in it has a key of type int"),
        (b"\x80\x02}]K\x01s.", "a dict or a set in it has a key of type list"),
        (b"\x80\x04\x8f(]\x90.", "a dict or a set in it has a key of type list"),
        (
            b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\xff\xff\xff\xff\xff\x00\x85R.",
            "(bytes in an unknown form)",
        ),
        (b"\x80\x02cbuiltins\ncomplex\nX\x01\x00\x00\x00ax\x85R.", "truncated or damaged"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n2.", "has the operation DUP"),
        (b"\x80\x02h\x05.", "truncated or damaged"),
        (b"\x98\xff", "has the operation READONLY_BUFFER"),
        (b"\x80\x02.", "truncated or damaged"),
        (b"\x80\x02}", "truncated or damaged"),
        (b"\x80\x02" + b"(" * 100_000, "truncated or damaged"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "it is of type list, not a dict"),
        (b"\x80\x02" + b"(" * 200_000 + b"l" * 200_000 + b".", "it is of type list, not a dict"),
        (b"\x80\x02I" + b"9" * 100_000 + b"\n.", "truncated or damaged"),
        (b"\x80\x02\x8d" + b"\xff" * 8 + b"x.", "truncated or damaged"),
    ],
)
def test_pickles_that_do_what_no_torch_save_does(pickled: bytes, cause: str, tmp_path: Path) -> None:
    assert cause in _refusal(_archive(pickled), tmp_path)


def test_a_shared_dag_is_not_walked(tmp_path: Path) -> None:
    shared = {"a": 1}
    for _ in range(60):
        shared = {"a": shared, "b": shared}
    assert "under a, b" in _refusal(_archive(pickle.dumps(shared, 2)), tmp_path)
    pair: tuple = ()
    for _ in range(60):
        pair = (pair, pair)
    assert "a (tuple)" in _refusal(_archive(pickle.dumps({"a": pair}, 2)), tmp_path)
    dag = pickle.dumps(pair, 2)[2:-1]
    assert "(the name of a function is not text)" in _refusal(
        _archive(b"\x80\x04" + dag + b"0" + dag + b"h\x00\x93."), tmp_path
    )
    layout = b"\x80\x02ctorch.serialization\n_get_layout\n(" + dag + b"tR."
    assert "it is one tensor" in _refusal(_archive(layout), tmp_path)


def test_twenty_thousand_layers(tmp_path: Path) -> None:
    assert len(unpickle(pickle.dumps({f"weight_ih_l{k}": k for k in range(20_000)}, 2))) == 20_000


@pytest.mark.parametrize(
    ("arguments", "stored", "cause"),
    [
        ({"shape": (5,)}, 16, "x of shape (5,) was saved expanded: the file has fewer numbers"),
        ({"shape": (10**12,), "strides": (0,)}, 16, "x of shape (1000000000000,) was saved expanded"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, 16, "was saved expanded"),
        ({"offset": 1}, 16, "it reaches past the end of what is stored"),
        ({"offset": 2**62, "shape": (1,)}, 16, "it reaches past the end"),
        ({"offset": 2**63, "shape": (1,)}, 16, "(a tensor has an impossible size)"),
        ({"shape": (2, 2), "strides": (3, 1)}, 16, "it reaches past the end"),
        ({"shape": (2,), "strides": (2**62,)}, 16, "it reaches past the end"),
        ({"shape": (0, 2**62, 2**62), "strides": (1, 1, 1)}, 16, "cannot be read"),
        ({"shape": (0, 2**62), "strides": (2**62, 1)}, 16, "cannot be read: array is too big"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, 16, "(a tensor has an impossible shape)"),
        ({"offset": -1}, 16, "truncated or damaged: its pickle cannot be read (a tensor has an impossible size)"),
        ({"shape": (-4,)}, 16, "(a tensor has an impossible size)"),
        ({"strides": (-1,)}, 16, "(a tensor has an impossible size)"),
        ({"strides": (1, 1)}, 16, "(a tensor has an impossible shape)"),
        ({"shape": (2.0,)}, 16, "(a tensor has an impossible size)"),
        ({"shape": (True,)}, 16, "(a tensor has an impossible size)"),
        ({}, 15, "x should have 16 bytes, and 15 are there"),
        ({}, 17, "x should have 16 bytes, and 17 are there"),
        ({}, None, "x should have 16 bytes, and none are there"),
    ],
)
def test_tensors_that_do_not_fit_what_is_stored(
    arguments: dict, stored: int | None, cause: str, tmp_path: Path
) -> None:
    entries = {} if stored is None else {"data/0": bytes(stored)}
    tracemalloc.start()
    refusal = _refusal(_archive(_tensor(**arguments), **entries), tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cause in refusal
    assert peak < 5_000_000


def test_entries_that_torch_save_does_not_write(tmp_path: Path) -> None:
    data = {"data/0": bytes(16)}
    for name in ("../../x", "data/../0"):
        assert f"torch.save writes no entry such as model/{name}" in _refusal(
            _archive(_tensor(), **data, **{name: b""}), tmp_path
        )
    file = io.BytesIO(_archive(_tensor(), **data))
    with zipfile.ZipFile(file, "a") as writer, pytest.warns(UserWarning, match="Duplicate name"):
        writer.writestr("model/data/0", bytes(16))
    assert "torch.save writes no entry such as model/data/0" in _refusal(file.getvalue(), tmp_path)
    assert "should be little or big, and is b'middle'" in _refusal(
        _archive(_tensor(), **data, byteorder=b"middle"), tmp_path
    )


def test_many_views_of_one_storage_are_a_bomb(tmp_path: Path) -> None:
    size = 1 << 18
    of = b"J" + size.to_bytes(4, "little")
    tensors = [_tensor(shape=(size,), name=f"x{k}")[3:-1].replace(b"cpuK\x04", b"cpu" + of) for k in range(300)]
    pickled = b"\x80\x02}" + b"".join(tensors) + b"."
    tracemalloc.start()
    refusal = _refusal(_archive(pickled, **{"data/0": bytes(4 * size)}), tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "a zip bomb: its tensors have 314572800 bytes" in refusal
    assert peak < 20_000_000


def test_calls_that_copy_one_list_again_and_again() -> None:
    many = b"\x80\x04](" + b"K\x01" * 100_000 + b"e\x94ctorch\nSize\n\x94]\x94(" + b"h\x01h\x00\x85R" * 500 + b"e."
    with pytest.raises(CheckpointError, match=r"^a bomb: calls in its pickle make far more than it holds"):
        unpickle(many)
    assert len(unpickle(many.replace(b"h\x01h\x00\x85R" * 499, b""))) == 1
