"""Files of msgpack and pickle as neither Flax nor Haiku writes them: what is refused, and what keeps its name."""

import io
import pickle
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from arrays import parameters
from flax import serialization
from flax.traverse_util import unflatten_dict
from reading import loaded

import jaxrnn
from jaxrnn.checkpoint import CheckpointError, find_rnns, load, load_tree
from jaxrnn.checkpoint.dialects import DIALECTS
from jaxrnn.checkpoint.files import opened
from jaxrnn.checkpoint.flax_names import with_torchs_names
from jaxrnn.checkpoint.formats.reading import Reading


def _cell(library: str, name: str) -> dict[str, np.ndarray]:
    """The weights of a cell, whose second bias is 0."""
    dialect = DIALECTS[library, name]
    torchs = parameters(jaxrnn.CellSpec(getattr(jaxrnn, f"{dialect.kind}_CELL"), 3, 4))
    return dialect.write({role: array for role, array in torchs.items() if role != "bias_hh"})


def _saved(path: Path, tree: Any) -> Path:
    path.write_bytes(serialization.msgpack_serialize(tree))
    return path


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    return str(caught.value).removeprefix(f"{path}: ")


def test_one_array_a_thousand_times_in_a_tree_is_one_array(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"a": [np.zeros(1 << 20, np.uint8)] * 1000}))
    assert len({*map(id, load_tree(path)["a"])}) == 1


def test_long_names(tmp_path: Path) -> None:
    """A name is copied for each value below it: a file of 1 MB could make terabytes."""
    for data in (msgpack.packb({"k" * 1_000_000: [None] * 40_000}), pickle.dumps({"k" * 1_000_000: [1] * 40_000})):
        (tmp_path / "a").write_bytes(data)
        for read in (load, load_tree):
            with pytest.raises(CheckpointError, match="or their keys have over 2000 characters"):
                read(tmp_path / "a")
    start = time.monotonic()
    for tensors in ({"lstm" * 100_000 + ".x.w": np.ones(2)}, {"a" + "!" * n + "w": np.ones(2) for n in range(1, 2000)}):
        assert find_rnns(tensors) == []
    assert time.monotonic() - start < 2


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a\ud800": np.ones(2)}))
    assert _refusal(tmp_path / "a.pkl").startswith(r"the name a\ud800 is not valid Unicode")


def test_an_optimizer_alone(tmp_path: Path) -> None:
    path = _saved(tmp_path / "a", {"opt_state": {"mu": {"w": np.ones(2)}}, "step": 3})
    assert list(load(path)) == ["opt_state.mu.w"]


def test_what_is_left_out_is_noted(tmp_path: Path) -> None:
    path, notes = _saved(tmp_path / "a", {"w": np.ones(2), "step": 3}), list[str]()
    opened(path, Reading(note=notes.append))
    assert notes == ["took the parameters, and left out step"]


def test_bytes_after_the_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(serialization.to_bytes({"w": np.ones(2)}) + b"\xc0")
    assert _refusal(tmp_path / "a").startswith("damaged: there are more bytes after its end")
    (tmp_path / "a").write_bytes(b"\x82\xa1a\xc0\xa1a\xc0")
    assert _refusal(tmp_path / "a").startswith("damaged: a dict has the key 'a' twice")


def test_what_msgpack_may_not_hold(tmp_path: Path) -> None:
    text = msgpack.ExtType(1, msgpack.packb(((2,), "S1", b"ab")))
    for value, cause in ((text, "it holds an array of |S1, which are"), ([0] * 50_000, "hold more than 50000 values")):
        (tmp_path / "a").write_bytes(msgpack.packb({"a": value}))
        with pytest.raises(CheckpointError, match=re.escape(cause)):
            load_tree(tmp_path / "a")


class _Swapped:
    """An array in the other byte order, of bytes that others have, too."""

    def __init__(self, numbers: bytes) -> None:
        self.numbers = numbers

    def __reduce__(self) -> Any:
        make = np.zeros(1).__reduce_ex__(5)[0]  # NumPy's own function, whose name differs between versions
        return make, (self.numbers, np.dtype(">f4"), (len(self.numbers) // 4,), "C")


def test_what_pickles_of_arrays_may_not_hold(tmp_path: Path) -> None:
    numbers = bytes(1 << 20)
    (tmp_path / "a").write_bytes(pickle.dumps([_Swapped(numbers) for _ in range(110)]))
    with pytest.raises(CheckpointError, match="a bomb: its numbers would fill over"):
        load_tree(tmp_path / "a")
    shape = pickle.dumps(np.ones(2), 2)
    assert b"K\x02\x85" in shape
    (tmp_path / "a").write_bytes(shape.replace(b"K\x02\x85", b"](K\x02e"))
    assert "an array of objects, or in an unknown form" in _refusal(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"\x80\x02}}b.")
    assert "it sets attributes of something that is not an array" in _refusal(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"\x80\x02]cnumpy.core.multiarray\n_reconstruct\n)Ra.")
    assert _refusal(tmp_path / "a").startswith("truncated or damaged: an array without numbers")


def _npz(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def test_what_npz_may_not_hold(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.ones(2, np.float32))
    good = file.getvalue()
    for data, cause in (
        (good.replace(b"(2,), }  ", b"(999,), }"), "damaged: a.npy of shape (999,) has too few bytes"),
        (good + b"x", "damaged: a.npy of shape (2,) has too many bytes"),
        (good + bytes(70 << 20), "a bomb: its numbers would fill over"),
    ):
        (tmp_path / "a").write_bytes(_npz(a=data))
        assert _refusal(tmp_path / "a").startswith(cause)
    (tmp_path / "a").write_bytes(_npz(a=good))
    assert load(tmp_path / "a")["a"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"an \.npz file has no dicts in it"):
        load(tmp_path / "a", "a")


def test_two_keys_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": {1: np.ones(2), "1": np.zeros(2)}}))
    assert _refusal(tmp_path / "a.pkl").startswith("two keys are both read as a/1")


def test_names_that_stay() -> None:
    cell = _cell("flax.linen", "GRUCell")
    tensors = {f"enc.{name}": array for name, array in cell.items()}
    assert with_torchs_names(tensors, keep=["enc.hn.bias"]) == tensors
    # One name with dots and one with slashes are not one.
    both = {name.replace(".", "/"): array for name, array in tensors.items()} | {"enc.hn.bias": np.ones(1)}
    assert with_torchs_names(both) == both
    # A state of random numbers is of integers.
    tensors = {f"enc.cell.{name}": array for name, array in cell.items()}
    found = with_torchs_names(tensors | {"enc.rngs.count": np.ones(1, np.uint32), "dec.rngs.count": np.ones(1)})
    assert [name for name in found if "rngs" in name] == ["dec.rngs.count"]


def test_two_layers_with_the_names_of_a_bidirectional_that_differ(tmp_path: Path) -> None:
    tree = {
        "forward_rnn": {"cell": unflatten_dict(_cell("flax.nnx", "LSTMCell"), sep=".")},
        "backward_rnn": {"cell": unflatten_dict(_cell("flax.nnx", "GRUCell"), sep=".")},
    }
    tensors, words = loaded(_saved(tmp_path / "a", {"enc": tree}))
    assert words == []
    assert {rnn.prefix for rnn in find_rnns(tensors)} == {"enc.forward_rnn.", "enc.backward_rnn."}


def test_an_array_in_parts_with_other_keys(tmp_path: Path) -> None:
    parts = {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": np.ones(2)}}
    for more, expected in (({}, ["a"]), ({"scale": 2.0}, None)):
        path = _saved(tmp_path / "a", {"a": parts | more})
        if expected is not None:
            assert list(load(path)) == expected
        else:
            assert "an array in parts with other keys" in _refusal(path)
