import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save as serialize

from jaxrnn import checkpoint
from jaxrnn.checkpoint.formats import safetensors

DTYPES = [jnp.dtype(name) for name in safetensors.DTYPES.values()]
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def safetensors(header: object, data: bytes = b"abcd", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    size = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype == np.bool_:
        data = bytes(byte % 2 for byte in data)
    return np.frombuffer(data, np.uint8).view(dtype).reshape(shape)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), arrays(), max_size=5))
def test_round_trip(tmp_path, tensors):
    tensors.pop("__metadata__", None)
    checkpoint.save(tmp_path / "a.safetensors", tensors)
    found = checkpoint.load(tmp_path / "a.safetensors")
    assert_same(found, tensors)
    for value in found.values():
        assert value.flags.c_contiguous
        assert value.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_are_those_of_the_library(dtype, tmp_path):
    (tmp_path / "a").write_bytes(serialize({"x": np.ones((2, 3), dtype)}))
    found = checkpoint.load(tmp_path / "a")["x"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.ones((2, 3), dtype))


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.arange(6.0)[::-2],
        np.float32(3),
        np.array(3.0, ">f8"),
        np.arange(3, dtype=">i4"),
        jnp.arange(3, dtype=jnp.bfloat16),
        np.broadcast_to(np.ones(1), (3, 4)),
    ],
    ids=["transposed", "strided", "scalar", "big-endian", "big-endian-1d", "jax", "stride-0"],
)
def test_save_any_array(value, tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", {"x": value})
    found = checkpoint.load(tmp_path / "a.safetensors")["x"]
    assert found.shape == value.shape
    assert found.dtype == value.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, value)


def test_bfloat16_is_that_of_jax(tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", {"x": jnp.ones(2, jnp.bfloat16)})
    assert checkpoint.load(tmp_path / "a.safetensors")["x"].dtype == ml_dtypes.bfloat16


def test_order_is_the_file_s(tmp_path):
    (tmp_path / "a").write_bytes(
        safetensors({name: ENTRY | {"data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate("bca")}, bytes(12))
    )
    assert list(checkpoint.load(tmp_path / "a")) == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "an empty file"),
        (b"weights\n", "a text file"),
        ("λ".encode() * 1000, "a text file"),
        (b'{"module": {}}', "a text file"),
        (b"\n <!DOCTYPE html><html>", "an HTML page"),
        (b"<html><body>404", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"\x93NUMPY\x01\x00" + bytes(50), "a NumPy .npy file"),
        (b"\x1f\x8b\x08" + bytes(50), "compressed by gzip"),
        (b"\x80\x04}\x94.", "it has no arrays"),
        (b"model/".ljust(257, b"\0") + b"ustar\0" + bytes(300), "a damaged tar file"),
        (b"\0\1\2", "truncated: it has only 3 bytes"),
        (bytes(range(256)), "not a file of safetensors, torch.save, ONNX, Keras, msgpack or pickle"),
        (safetensors({"x": ENTRY})[:12], "truncated"),
    ],
)  # fmt: skip
def test_not_a_checkpoint(data, cause, tmp_path, refusal):
    (tmp_path / "model.safetensors").write_bytes(data)
    assert cause in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (safetensors({"x": ENTRY}, b"abc"), "truncated: the tensors should have 4 bytes, and 3 are there"),
        (safetensors({"x": ENTRY}, b"abcde"), "trailing bytes: the tensors should have 4 bytes, and 5 are there"),
        (safetensors({"x": ENTRY}, length=500), "truncated: the header should have 500 bytes"),
        (safetensors({"x": ENTRY}, length=2**64 - 1), "header too large"),
        (safetensors({"x": ENTRY}, length=100_000_001), "header too large"),
        (safetensors(b'{"x":' + b"[" * 100_000), "recursion limit"),
        (safetensors(b'{"x":}'), "invalid JSON"),
        (safetensors(b'{"\xff":1}'), "invalid UTF-8"),
        (safetensors({"x": ENTRY, "y": ENTRY}), "invalid offset for tensor `"),
        (safetensors({"x": ENTRY, "y": ENTRY | {"data_offsets": [8, 12]}}, bytes(12)), "invalid offset for tensor `y`"),
        (safetensors({"x": ENTRY | {"shape": [2]}}), "invalid shape"),
        (safetensors({"x": ENTRY | {"shape": [2**40, 2**40]}}), "overflow"),
        (safetensors({"x": ENTRY | {"shape": [-1]}}), "invalid value"),
        (safetensors({"x": ENTRY | {"shape": [True]}}), "invalid type"),
        (safetensors({"x": ENTRY | {"shape": [1.0]}}), "invalid type"),
        (safetensors({"x": ENTRY | {"dtype": "F4", "shape": [8]}}), "x is of F4, which NumPy does not have"),
        (safetensors(b'{"x":%b,"x":%b}' % ((json.dumps(ENTRY).encode(),) * 2)), "two tensors are named x"),
    ],
)  # fmt: skip
def test_damaged_safetensors(data, cause, tmp_path, refusal):
    (tmp_path / "model.safetensors").write_bytes(data)
    assert cause in refusal(tmp_path / "model.safetensors")


def test_safetensors_cut_anywhere(tmp_path, refusal):
    data = serialize({"x": np.arange(5.0), "y": np.ones((2, 2), np.float16)})
    for length in range(len(data)):
        (tmp_path / "a").write_bytes(data[:length])
        cause = refusal(tmp_path / "a")
        assert "truncated" in cause or length < 2  # one byte is a letter
