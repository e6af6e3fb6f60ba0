import io
import pickle
import re
import shlex
import sys
import types
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from jaxrnn import checkpoint
from jaxrnn.checkpoint import CheckpointError
from jaxrnn.checkpoint.formats.torch_legacy import MAGIC


def archive(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        for name, data in entries.items():
            writer.writestr(f"model/{name.replace('_', '.')}", data)
    return file.getvalue()


# How a file of torch.save from before torch 1.6 starts.
LEGACY = b"\x80\x02" + MAGIC + b"."

# Without torch


def test_torch_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(LEGACY)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "a.pt")
    assert "needs torch, which is not installed" in str(caught.value)
    assert 'pip install "jaxrnn[torch]"' in str(caught.value)
    assert "safetensors" in str(caught.value)


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cpu", "2.1"])
def test_torch_too_old(version, tmp_path, monkeypatch, refusal):
    torch = types.ModuleType("torch")
    monkeypatch.setattr(torch, "__version__", version, raising=False)
    monkeypatch.setitem(sys.modules, "torch", torch)
    (tmp_path / "a.pt").write_bytes(LEGACY)
    cause = "reading a file of torch.save from before torch 1.6 needs torch 2.10 or later"
    assert refusal(tmp_path / "a.pt") == f"{cause}, not {version}"


def test_damaged_compression(tmp_path, refusal):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("model/data.pkl", b"0123456789")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(b"data.pkl") + len("data.pkl")] = 0xFF
    (tmp_path / "a.pt").write_bytes(data)
    assert "a damaged zip file" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("place", "value", "cause"),
    [
        (6, 99, "one that torch.save did not write: zip file version 9.9"),
        (10, 99, "torch.save writes no entry such as"),
    ],
    ids=["version", "compression"],
)
def test_a_zip_of_another_kind(place, value, cause, tmp_path, refusal):
    """Of a version that zipfile does not know, or of a compression that is refused before that."""
    data = bytearray(archive(data_pkl=b"\x80\x02}.", version=b"3\n"))
    data[data.index(b"PK\x01\x02") + place] = value  # in the list of entries
    (tmp_path / "a.pt").write_bytes(data)
    assert cause in refusal(tmp_path / "a.pt")


def test_zip_cut_anywhere(tmp_path, refusal):
    data = archive(data_pkl=b"\x80\x02}.", version=b"3\n")
    for length in range(4, len(data)):
        (tmp_path / "a.pt").write_bytes(data[:length])
        assert "truncated" in refusal(tmp_path / "a.pt")


# With torch


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def zipped(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.torch
@pytest.mark.parametrize("name", ["model.pt", "model.tar", "model.safetensors", "model"])
def test_state_dict(name, zipped, torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4, 2, bidirectional=True), torch.nn.BatchNorm1d(4))
    torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    found = checkpoint.load(tmp_path / name)
    assert list(found) == list(model.state_dict())
    for key, tensor in model.state_dict().items():
        assert found[key].dtype == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[key], tensor.numpy())


@pytest.mark.torch
def test_every_tensor_is_a_contiguous_copy(zipped, torch, tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "row": base[1],
        "transposed": base.T,
        "parameter": torch.nn.Parameter(base.clone()),
        "bfloat16": base.bfloat16().T,
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "bool": torch.tensor([True, False]),
    }
    if zipped:  # torch itself reads no file of before 1.6 with these dtypes
        tensors |= {"float8": base.to(torch.float8_e4m3fn), "uint16": torch.tensor([65535], dtype=torch.uint16)}
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = checkpoint.load(tmp_path / "a.pt")
    for name, tensor in tensors.items():
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].flags.c_contiguous
        kind = torch.complex128 if tensor.is_complex() else torch.float64
        wanted = tensor.detach().resolve_conj().to(kind).numpy()
        np.testing.assert_array_equal(found[name].astype(wanted.dtype), wanted)
    assert found["bfloat16"].dtype == ml_dtypes.bfloat16
    found["base"][:] = 0
    assert found["row"].all()


@pytest.mark.torch
def test_torch_loads_weights_only_onto_the_cpu(torch, tmp_path, monkeypatch):
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    load, calls = torch.load, []
    monkeypatch.setattr(torch, "load", lambda file, **settings: calls.append(settings) or load(file, **settings))
    checkpoint.load(tmp_path / "a.pt")
    assert calls == [{"map_location": "cpu", "weights_only": True}]


@pytest.mark.torch
def test_nested_state_dicts(zipped, torch, tmp_path, refusal):
    def save(value: object) -> None:
        torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)

    tensors = {"weight": torch.ones(2)}
    for key in ("state_dict", "model_state_dict", "model_state", "model"):
        save({key: tensors, "optimizer": {"state": {}}, "epoch": 3})
        assert list(checkpoint.load(tmp_path / "a.pt")) == ["weight"]
    save({"model": {"state_dict": tensors}})
    assert list(checkpoint.load(tmp_path / "a.pt")) == ["weight"]
    save({"model": tensors, "state_dict": {"other": torch.ones(1)}})
    assert "dicts under model, state_dict" in refusal(tmp_path / "a.pt")
    assert list(checkpoint.load(tmp_path / "a.pt", key="state_dict")) == ["other"]
    save({"trainer": {"ema": tensors}, "epoch": 3})
    assert "dicts under trainer" in refusal(tmp_path / "a.pt")
    assert list(checkpoint.load(tmp_path / "a.pt", key="trainer.ema")) == ["weight"]
    for key, cause in {
        "trainer.model": "its 'trainer' has no key 'model'\nits keys: ema",
        "epoch": "its 'epoch' is of type int, not a dict",
        "trainer.ema.weight": "its 'trainer.ema.weight' is one tensor, not a dict",
        "trainer": "its 'trainer' has no tensors, but dicts under ema\nsay which dict to read: key='trainer.ema'",
    }.items():
        with pytest.raises(CheckpointError, match=re.escape(cause)):
            checkpoint.load(tmp_path / "a.pt", key=key)


def test_a_dict_that_holds_itself(tmp_path, refusal):
    (tmp_path / "a.pt").write_bytes(archive(data_pkl=b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."))
    assert "dicts under model" in refusal(tmp_path / "a.pt")


def test_safetensors_have_no_keys(tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", {"x": np.ones(1)})
    with pytest.raises(CheckpointError, match="has no dicts in it, and so no key 'model'"):
        checkpoint.load(tmp_path / "a.safetensors", key="model")


@pytest.mark.torch
def test_empty_dict(torch, tmp_path):
    torch.save(OrderedDict(), tmp_path / "a.pt")
    assert checkpoint.load(tmp_path / "a.pt") == {}


@pytest.mark.torch
def test_truncated(zipped, torch, tmp_path, refusal):
    torch.save(torch.nn.LSTM(2, 3).state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "a.pt").read_bytes()
    for length in range(32, len(data), 17):
        (tmp_path / "a.pt").write_bytes(data[:length])
        assert "truncated" in refusal(tmp_path / "a.pt")


@pytest.mark.torch
def test_truncated_pickle_in_a_whole_zip(torch, tmp_path, refusal):
    torch.save({"x": torch.ones(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as reader:
        entries = {name: reader.read(name) for name in reader.namelist()}
    for length in range(0, len(entries["a/data.pkl"]), 7):
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as writer:
            for name, data in entries.items():
                writer.writestr(name, data[:length] if name == "a/data.pkl" else data)
        assert "truncated or damaged" in refusal(tmp_path / "b.pt")


@pytest.mark.torch
def test_a_whole_tree(zipped, torch, tmp_path):
    shared = torch.arange(4.0)
    value = {
        "model": OrderedDict(weight=shared, view=shared[1:3]),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "twice": shared}}, "groups": [{"betas": (0.9, 1)}]},
        "name": "best",
        "none": None,
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        7: [True, torch.ones(2, dtype=torch.bfloat16)],
    }
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    tree = checkpoint.load_tree(tmp_path / "a.pt")
    assert list(tree) == list(value)
    np.testing.assert_array_equal(tree["model"]["view"], [1, 2])
    np.testing.assert_array_equal(tree["optimizer"]["state"][0]["twice"], [0, 1, 2, 3])
    assert tree["optimizer"]["state"][0]["step"] == 3
    assert (tree["name"], tree["none"], tree[7][0]) == ("best", None, True)
    assert tree[7][1].dtype == ml_dtypes.bfloat16
    assert tree["dtype"] == "torch.bfloat16"
    assert type(tree["size"]) is tuple
    assert tree["size"] == (2, 3)
    assert checkpoint.load_tree(tmp_path / "a.pt", "optimizer.groups") == [{"betas": (0.9, 1)}]
    with pytest.raises(CheckpointError, match=r"its 'optimizer' has no key 'epoch'\nits keys: state, groups"):
        checkpoint.load_tree(tmp_path / "a.pt", "optimizer.epoch")
    with pytest.raises(CheckpointError, match=r"its 'name' has no key 'x'"):
        checkpoint.load_tree(tmp_path / "a.pt", "name.x")
    torch.save({"x": [torch.ones(1), torch.ones(1).expand(10**12)]}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"b.pt: x\.1 of shape \(1000000000000,\) was saved expanded"):
        checkpoint.load_tree(tmp_path / "b.pt")


def test_trees_that_are_none(tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", {"x": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"a.safetensors: its format holds tensors only"):
        checkpoint.load_tree(tmp_path / "a.safetensors")
    (tmp_path / "deep.pt").write_bytes(archive(data_pkl=b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."))
    with pytest.raises(CheckpointError, match=r"deep.pt: its dicts and lists are nested more than 100 deep"):
        checkpoint.load_tree(tmp_path / "deep.pt")
    (tmp_path / "self.pt").write_bytes(archive(data_pkl=b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."))
    tree = checkpoint.load_tree(tmp_path / "self.pt")
    assert tree["model"] is tree
    shared: dict = {"a": 1}
    for _ in range(60):
        shared = {"a": shared, "b": shared}
    (tmp_path / "dag.pt").write_bytes(archive(data_pkl=pickle.dumps(shared, 2)))
    tree = checkpoint.load_tree(tmp_path / "dag.pt")
    assert tree["a"] is tree["b"]


@pytest.mark.torch
def test_without_checksums(torch, tmp_path):
    """torch writes none where it is told so."""
    tensors = {"x": torch.arange(5.0), "y": torch.arange(6.0).reshape(2, 3).T}
    enabled = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(enabled)
    found = checkpoint.load(tmp_path / "a.pt")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


@pytest.mark.torch
def test_keys_that_are_alike_in_a_tree(torch, tmp_path):
    value = {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1) * 2, 0: torch.ones(1) * 3, "0": torch.ones(1) * 4}
    torch.save({**value, "dtype": torch.float32}, tmp_path / "a.pt")
    tree = checkpoint.load_tree(tmp_path / "a.pt")
    assert [tree["a"]["b"], tree["a.b"], tree[0], tree["0"]] == [1, 2, 3, 4]
    assert tree["dtype"] == "torch.float32"


def _lists(torch: types.ModuleType) -> dict[str, object]:
    """What a file may hold in which no dict of tensors is at the top."""
    one, other = {"weight": torch.ones(2)}, {"weight": torch.zeros(2)}
    moments = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "list": [one, other],
        "tuple": (3, one),
        "list under a key": {"models": [one, other], "epoch": 3},
        "list under a usual key": {"model": [one, other]},
        "lists in dicts in lists": [{"epoch": 1}, {"runs": [[{"net": {"ema": [other]}}]]}],
        "numbers as keys": {0: one, 1: other},
        "names with dots": {"a.b": {"c": one}, "a": {"b": {"d": 1}}},
        "names with blanks": {"the best": {"of all": one}},
        "an empty name": {"": one, "x": other},
        "a name that hides another": {"a.b": one, "a": {"b": other}},
        "an optimizer before": {"optimizer": moments, "nets": [one]},
        "tensors before": {"nets": [torch.ones(1)], "others": {"x": one}},
        "the number and its text": {0: {"x": one}, "0": {"x": other}, "1": dict(other)},
    }


@pytest.mark.torch
@pytest.mark.parametrize("key", [True, False], ids=["key", "command line"])
def test_the_advised_key_works(key, zipped, torch, tmp_path, refusal):
    path = tmp_path / "a.pt"
    for value in _lists(torch).values():
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        remedy = _remedy(path)
        if key:
            found = checkpoint.load(path, key=eval(re.search(r"key=('.*'|\".*\"), on", remedy)[1]))
        else:
            options = shlex.split(remedy.partition("on the command line ")[2])
            assert options[0] == "--key"
            found = checkpoint.load(path, key=options[1])
        assert list(found) == ["weight"]


def _remedy(path, key=None):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, key=key)
    return str(caught.value).partition("\n")[2]


@pytest.mark.torch
def test_keys_of_lists_and_dicts_without_one(zipped, torch, tmp_path):
    path = tmp_path / "a.pt"

    def save(value: object) -> None:
        torch.save(value, path, _use_new_zipfile_serialization=zipped)

    save({"nets": [{"w": torch.ones(1)}], "more": [[torch.ones(1)]]})
    assert "key='nets.0'" in _remedy(path)
    assert "key='nets.0'" in _remedy(path, "nets")
    read = "torch.save(model.state_dict(), path), or read all of it with jaxrnn.checkpoint.load_tree(path)"
    assert read in _remedy(path, "more")
    save([torch.ones(1), torch.ones(1)])  # tensors without names
    assert read in _remedy(path)
    assert len(checkpoint.load_tree(path)) == 2
    save({0: {"w": torch.ones(1)}, "0": {"w": torch.ones(1)}})
    assert read in _remedy(path)
    with pytest.raises(
        CheckpointError, match=r"its '0' may be the key 0 or the key '0'\nread all of it with .*load_tree"
    ):
        checkpoint.load(path, key="0")
    assert list(checkpoint.load_tree(path)) == [0, "0"]
