"""What broken, foreign and hostile files get: each is refused by the library and by every command, and nothing else.

That is: CheckpointError, with the path, the cause and a remedy; from the command line that message and exit code 2, no
file where the output should be, and an output that was there untouched.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory import memory_to_refuse

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.__main__ import main

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
# How a file of torch.save from before torch 1.6 begins.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def _safetensors(header: object, data: bytes = b"abcd", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _zip(**entries: bytes) -> bytes:
    """A zip archive; in the names "_" stands for "." and "__" for "/"."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"model/{name.replace('__', '/').replace('_', '.')}", data)
    return file.getvalue()


def _pickled(value: object) -> bytes:
    return _zip(data_pkl=pickle.dumps(value, 2))


def _tensor(size: int = 4, stride: int = 1, location: str = "cpu") -> bytes:
    """A pickle of {"a.weight": a tensor in a storage of four numbers}."""

    def number(n: int) -> bytes:
        return pickle.dumps(n, 2)[2:-1]

    def text(string: str) -> bytes:
        return b"X" + struct.pack("<I", len(string)) + string.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text(location) + b"K\x04tQ"
    sizes = number(size) + b"\x85" + number(stride) + b"\x85"
    arguments = b"(" + storage + b"K\x00" + sizes + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02}" + text("a.weight") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


NUMBERS = np.arange(4, dtype=np.float32).tobytes()


def _stored(pickled: bytes, numbers: bytes = NUMBERS) -> bytes:
    return _zip(data_pkl=pickled, data__0=numbers)


def _bomb(size: int = 1 << 31) -> bytes:
    """An archive whose one storage, of some 2 MB, inflates to 2 GB."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = compressor.compress(bytes(1 << 24)) + compressor.flush(zlib.Z_FULL_FLUSH)
    data = bytearray(_zip(data_pkl=_tensor(), data__0=block * (size >> 24) + b"\x03\x00"))
    for header, name_at, method_at, size_at in ((b"PK\x03\x04", 30, 8, 22), (b"PK\x01\x02", 46, 10, 24)):
        at = data.index(b"model/data/0", data.index(header)) - name_at
        at = at if data[at : at + 4] == header else data.rindex(header)
        data[at + method_at : at + method_at + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)
        data[at + size_at : at + size_at + 4] = struct.pack("<I", size)
    return bytes(data)


def _flipped() -> bytes:
    data = bytearray(_stored(_tensor()))
    data[data.index(NUMBERS) + 5] ^= 1
    return bytes(data)


def _nested(depth: int) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * depth + b"a" * (depth - 1) + b"s."


def _shared(levels: int) -> dict:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value, "b": value}
    return value


def _without(*lost: str, **changed: Any) -> bytes:
    """A safetensors file of an LSTM, but for keys that are lost, and shapes and dtypes that are others."""
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 2, 3, num_layers=2, bidirectional=True)
    names = {"float32": "F32", "int64": "I64", "complex64": "C64", "float16": "F16"}
    header, data = {}, b""
    for name, shape in spec.shapes().items():
        change = changed.get(name, shape)
        array = np.zeros(change, np.float32) if isinstance(change, tuple) else np.zeros(shape, change)
        if name not in lost:
            offsets = [len(data), len(data) + array.nbytes]
            header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
            data += array.tobytes()
    return _safetensors(header, data)


# From the kind of file to its bytes, and what the refusal says of it. Row by row as people meet them.
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "text": (b"weights\n", "a text file"),
    "greek": ("λ".encode() * 1000, "a text file"),
    "json": (b'{"module": {}}', "a text file"),
    "html": (b"\n <!DOCTYPE html><html>", "an HTML page"),
    "html 404": (b"<html><body>404", "an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(50), "a NumPy .npy file"),
    "npz": (_zip(weight_npy=b"", bias_npy=b""), "a truncated or damaged .npz file"),
    "zip of files": (_zip(a_txt=b"", b__a_txt=b"").replace(b"model/", b"longer"), "a zip file that torch.save did"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "compressed by gzip"),
    "a few bytes": (b"\0\1\2", "truncated: it has only 3 bytes"),
    "any bytes": (bytes(range(256)), "not a file of safetensors, torch.save, ONNX, Keras, "),
    # cut short; everywhere else in the tests of each reader
    "zip without its end": (_stored(_tensor())[:-9], "truncated or damaged zip file"),
    "zip without its start": (_stored(_tensor())[70:], "not a file of safetensors"),
    "pickle cut in a good zip": (_stored(_tensor()[:50]), "truncated or damaged: its pickle"),
    "safetensors without data": (_safetensors({"x": ENTRY}, b"abc"), "truncated: the tensors should have 4 bytes"),
    "safetensors with more": (_safetensors({"x": ENTRY}, b"abcde"), "trailing bytes: the tensors should have 4 bytes"),
    "header past the end": (_safetensors({"x": ENTRY}, length=500), "truncated: the header should have 500 bytes"),
    "header of half": (_safetensors({"x": ENTRY})[:12], "truncated"),
    "header of 2^64": (_safetensors({"x": ENTRY}, length=2**64 - 1), "header too large"),
    "header of 100 MB": (_safetensors({"x": ENTRY}, length=100_000_001), "header too large"),
    "deep json": (_safetensors(b'{"x":' + b"[" * 100_000), "recursion limit"),
    "no json": (_safetensors(b'{"x":}'), "invalid JSON"),
    "no utf-8": (_safetensors(b'{"\xff":1}'), "invalid UTF-8"),
    # tensors that cannot be, by their names
    "overlap": (_safetensors({"x": ENTRY, "y": ENTRY}), "invalid offset for tensor `"),
    "hole": (_safetensors({"x": ENTRY, "y": ENTRY | {"data_offsets": [8, 12]}}, bytes(12)), "offset for tensor `y`"),
    "backward": (_safetensors({"x": ENTRY | {"data_offsets": [4, 0]}}), "its tensor x is impossible"),
    "size": (_safetensors({"x": ENTRY | {"shape": [2]}}), "its tensor x is impossible: invalid shape"),
    "overflow": (_safetensors({"x": ENTRY | {"shape": [2**40] * 2}}), "its tensor x is impossible: overflow"),
    "negative": (_safetensors({"y": ENTRY, "x": ENTRY | {"shape": [-1]}}), "its tensor x is impossible: invalid JSON"),
    "bool": (_safetensors({"x": ENTRY | {"shape": [True]}}), "its tensor x is impossible: invalid JSON"),
    "float": (_safetensors({"x": ENTRY | {"shape": [1.0]}}), "its tensor x is impossible: invalid JSON"),
    "twice": (_safetensors(b'{"x":%b,"x":%b}' % ((json.dumps(ENTRY).encode(),) * 2)), "two tensors are named x"),
    "4 bits": (_safetensors({"x": ENTRY | {"dtype": "F4", "shape": [8]}}), "x is of F4, which NumPy does not have"),
    # code
    "bare pickle": (pickle.dumps({"a": os.system}), "its code is not run: it names posix.system"),
    "pickle that calls": (_zip(data_pkl=b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."), "it names os.system"),
    "pickle that calls torch": (_zip(data_pkl=b"\x80\x02ctorch\nload\nK\x01\x85R."), "it names torch.load"),
    "numpy scalar": (_pickled({"loss": np.float64(1)}), "scalar"),
    "namespace": (_pickled({"args": argparse.Namespace(a=1)}), "it names argparse.Namespace"),
    "pathlib": (_pickled({"path": pathlib.PurePosixPath("a")}), "it names pathlib."),
    "torchscript": (_zip(data_pkl=b"\x80\x02}.", constants_pkl=b""), "a TorchScript archive whose data is not"),
    "tar": (b"model/".ljust(257, b"\0") + b"ustar\0" + bytes(300), "a damaged tar file"),
    "zip of something": (_zip(config_json=b"{}"), "a zip file that torch.save did not write"),
    # larger than it looks
    "zip bomb": (_bomb(), "a zip bomb: its 2 entries inflate to 2147483"),
    "stride 0": (_stored(_tensor(10**12, 0)), "a.weight of shape (1000000000000,) was saved expanded"),
    "short storage": (_stored(_tensor(), NUMBERS[:-1]), "should have 16 bytes, and 15 are"),
    "long storage": (_stored(_tensor(), NUMBERS + b"0"), "should have 16 bytes, and 17 are"),
    "no storage": (_zip(data_pkl=_tensor()), "a.weight should have 16 bytes, and none are there"),
    "past the storage": (_stored(_tensor(3, 2)), "it reaches past the end of what is stored"),
    "path in a zip": (_zip(data_pkl=_tensor(), data__0=NUMBERS, **{"__..__x": b""}), "torch.save writes no entry"),
    "flipped bit": (_flipped(), "the checksum (CRC) of its entry 'model/data/0' does not match"),
    "nested lists": (_zip(data_pkl=_nested(50_000)), "a (list)"),
    "shared dicts": (_pickled(_shared(60)), "dicts under a, b"),
    # nothing of ours in it
    "a list": (_pickled([1]), "no recurrent weights: it is of type list, not a dict"),
    "a tensor": (_stored(b"\x80\x02" + _tensor()[_tensor().index(b"ctorch.") : -2] + b"."), "it is one tensor, not"),
    "an optimizer": (_pickled({"state": {0: {"step": 1}}, "param_groups": []}), "it is the state of an optimizer"),
    # recurrent weights that do not fit together
    "a key missing": (_without("weight_hh_l0", "bias_ih_l1"), "weight_hh_l0 is missing\n  bias_ih_l1 is missing"),
    "a layer gap": (_without("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), "weight_ih_l0 is missing"),
    "half of reverse": (_without("bias_hh_l1_reverse"), "bias_hh_l1_reverse is missing"),
    "rows": (_without(weight_hh_l0=(7, 3)), "weight_hh_l0 is (7, 3), should have 4 * 3 rows (LSTM)"),
    "input of layer 1": (_without(weight_ih_l1=(12, 3)), "weight_ih_l1 is (12, 3), should be (12, 6)"),
    "2-D bias": (_without(bias_ih_l0=(12, 1)), "bias_ih_l0 is (12, 1), should be (12,)"),
    "mixed dtype": (_without(bias_ih_l0=np.float16), "bias_ih_l0 is float16, should be float32"),
    "integers": (_without(weight_hh_l0=np.int64), "weight_hh_l0 is int64, should be floating"),
    "complex": (_without(bias_ih_l1=np.complex64), "bias_ih_l1 is complex64, should be floating"),
}  # fmt: skip
# What `load` and `convert` take, which want no recurrent weights: only `find_rnns`, `inspect` and the like refuse it.
LOADED = {"a key missing", "a layer gap", "half of reverse", "rows", "input of layer 1", "2-D bias", "mixed dtype"}
LOADED |= {"integers", "complex"}


def _run(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def _assert_refused(path: Path, cause: str, loads: bool = False) -> None:
    """By the library and by every command."""
    if loads:
        tensors = checkpoint.load(path)
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.find_rnns(tensors)
        message = f"{path}: {caught.value}"
    else:
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.load(path)
        message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert cause in message
    assert message.count("\n") >= 1  # the remedy
    assert not message.endswith("\n")
    assert "weights_only" not in message
    assert sys.getsizeof(message) < 4000
    out = path.parent / "out.safetensors"
    commands = [["check", str(path)], ["convert", str(path), str(out), "--only-rnn"]]
    commands += [] if "--only-tensors" in message else [["inspect", str(path)]]  # which reads past objects
    commands += [] if loads else [["convert", str(path), str(out)], ["diff", str(path), str(path)]]
    for command in commands:
        code, printed, said = _run(command)
        assert (code, printed) == (2, "")
        assert said.replace("\n  ", " ").startswith(message.partition("\n")[0].partition(" ")[0])
        assert " ".join(cause.split()) in " ".join(said.split())
        assert "Traceback" not in said
    assert not out.exists()
    out.write_bytes(b"mine")
    assert _run(["convert", str(path), str(out), "--only-rnn", "--force"])[0] == 2
    assert out.read_bytes() == b"mine"
    out.unlink()


@pytest.mark.parametrize("name", FILES)
def test_refused(name: str, tmp_path: Path) -> None:
    data, cause = FILES[name]
    (tmp_path / "model.pt").write_bytes(data)
    _assert_refused(tmp_path / "model.pt", cause, name in LOADED)


def test_no_file(tmp_path: Path) -> None:
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, cause in {
        "nothing": "no such file",
        "link": f"a link to {tmp_path}/nowhere, which does not exist",
        "folder": "a directory without an orbax checkpoint",
        "pipe": "not a regular file",
        "a" * 300: "too long",
    }.items():
        _assert_refused(tmp_path / name, cause)
    with pytest.raises(checkpoint.CheckpointError, match="NUL"):
        checkpoint.load(tmp_path / "a\0b")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A refusal by the system, which root would not meet.
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.setattr(checkpoint.files, "open", refuse, raising=False)
    _assert_refused(tmp_path / "a", "permission denied")


@pytest.mark.parametrize("name", ["model.pt", "model.tar", "model.safetensors", "model", "model.html"])
def test_the_first_bytes_decide(name: str, tmp_path: Path) -> None:
    for data in (_safetensors({"a.weight": ENTRY}), _stored(_tensor())):
        (tmp_path / name).write_bytes(data)
        assert list(checkpoint.load(tmp_path / name)) == ["a.weight"]


def test_saved_on_cuda(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(_stored(_tensor(location="cuda:0")))
    np.testing.assert_array_equal(checkpoint.load(tmp_path / "a")["a.weight"], np.arange(4, dtype=np.float32))


def test_no_recurrent_keys(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(_stored(_tensor()))
    for command in ("inspect", "check"):
        code, _, said = _run([command, str(tmp_path / "a")])
        assert code == 2
        assert "no recurrent weights: no key ends as torch.nn's do" in said.replace("\n  ", " ")
        assert "its keys: a.weight" in said
    (tmp_path / "a").write_bytes(_pickled({}))
    assert _run(["inspect", str(tmp_path / "a")])[0] == 2
    assert checkpoint.find_rnns(checkpoint.load(tmp_path / "a")) == []


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    names = ["zip bomb", "stride 0", "header of 2^64", "header of 100 MB", "deep json", "nested lists", "shared dicts"]
    for name in names:
        (tmp_path / name).write_bytes(FILES[name][0])
    assert 2_000_000 < (tmp_path / "zip bomb").stat().st_size < 2_200_000
    assert memory_to_refuse(tmp_path / name for name in names) < 100_000_000


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves_and_is_no_state_dict(torch: types.ModuleType, zipped: bool, tmp_path: Path) -> None:
    lstm = torch.nn.LSTM(1, 2)
    kinds: dict[str, tuple[Any, str]] = {
        "module": (lstm, "a whole module, not a state_dict"),
        "sequential": (torch.nn.Sequential(lstm), "a whole module, not a state_dict"),
        "class": ({"state_dict": lstm.state_dict(), "hyper_parameters": {"act": torch.nn.Tanh}}, "it holds more than"),
        "tensor": (torch.ones(3), "no recurrent weights: it is one tensor, not a dict"),
        "list": ([torch.ones(3)], "no recurrent weights: it is of type list, not a dict"),
        "optimizer": (torch.optim.Adam(lstm.parameters()).state_dict(), "no recurrent weights"),
        "nested": ({"net": lstm.state_dict(), "epoch": 3}, "under net\nsay which dict to read: key='net'"),
        "namespace": ({**lstm.state_dict(), "args": argparse.Namespace(a=1)}, "argparse.Namespace"),
        "pathlib": ({**lstm.state_dict(), "path": pathlib.Path("a")}, "pathlib"),
        "numpy": ({**lstm.state_dict(), "loss": np.float64(1)}, "scalar"),
        "code": ({**lstm.state_dict(), "evil": _Evil(tmp_path)}, f"{os.name}.mkdir"),
    }
    if zipped:
        kinds |= {
            kind: ({**lstm.state_dict(), "a.weight": tensor}, f"a.weight is a {kind} tensor")
            for kind, tensor in {
                "meta": torch.ones(2, device="meta"),
                "sparse_coo": torch.ones(2).to_sparse(),
                "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
                "torch.complex32": torch.ones(2, dtype=torch.complex32),
            }.items()
        }
        kinds["expanded"] = (
            {"a.weight": torch.ones(1).expand(10**12)},
            "a.weight of shape (1000000000000,) was saved expanded",
        )
    for name, (value, cause) in kinds.items():
        torch.save(value, tmp_path / name, _use_new_zipfile_serialization=zipped)
        _assert_refused(tmp_path / name, cause)
    assert not (tmp_path / "ran").exists()
    torch.save(OrderedDict(lstm.state_dict(), num_batches_tracked=torch.tensor(3)), tmp_path / "fine")
    assert _run(["inspect", str(tmp_path / "fine")])[0] == 0


class _Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder / "ran"),)


@pytest.mark.torch
def test_legacy_cut_short(torch: types.ModuleType, tmp_path: Path) -> None:
    torch.save(torch.nn.LSTM(2, 3).state_dict(), tmp_path / "a", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a").read_bytes()
    for length in (40, len(data) // 2, len(data) - 1):
        (tmp_path / "a").write_bytes(data[:length])
        _assert_refused(tmp_path / "a", "truncated")
