"""Files that we write: whole or not at all, compared before they take their name, and ordinary ones."""

import errno
import os
import re
import stat
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrnn import checkpoint
from jaxrnn.checkpoint import CheckpointError, files, stored, write


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (np.array([None]), "x is an array of object"),
        (np.array(["a"]), "x is an array of <U1"),
        ([1.0], "x is of type list"),
        (1.0, "x is of type float"),
        (np.ones(1, np.complex128), "x of complex128 cannot be written"),
    ],
    ids=str,
)
def test_save_refuses(value, cause, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(path, {"x": value})
    assert str(caught.value).startswith(f"{path}: {cause}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.npz", "a", ".safetensors/a", "a.pt.gz"])
def test_save_goes_by_the_suffix(name, tmp_path):
    with pytest.raises(CheckpointError, match=r"(no suffix|ends in .*)\nend the name in one of \.safetensors, \.pt"):
        checkpoint.save(tmp_path / name, {"x": np.ones(1)})
    with pytest.raises(CheckpointError, match="__metadata__"):
        checkpoint.save(tmp_path / "a.safetensors", {"__metadata__": np.ones(1)})
    assert not list(tmp_path.iterdir())


FORMATS = ["safetensors", "pt", "orbax"]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_was_written_is_read_and_compared(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"a.{suffix}"
    checkpoint.save(path, {"x": np.ones(2)})
    before = _contents(tmp_path)
    right = write.WRITERS[f".{suffix}"]
    for other in (
        {"x": np.array([1.0, np.nan])},
        {"x": np.ones(2, np.float32)},
        {"x": np.ones((2, 1))},
        {"y": np.ones(1)},
    ):
        monkeypatch.setitem(write.WRITERS, f".{suffix}", lambda file, _, wrote, other=other: right(file, other, wrote))
        with pytest.raises(CheckpointError, match=f"^{path}: read back, it differs from what was written: [xy]"):
            checkpoint.save(path, {"x": np.array([1.0, 2.0])})
        assert _contents(tmp_path) == before


@pytest.mark.parametrize("suffix", FORMATS)
def test_from_file_to_file_in_pieces(suffix, tmp_path):
    """What lies in a file is written piece by piece, and tells of what has happened to that file."""
    numbers = np.random.RandomState(0).randint(0, 2**16, 3_000_001).astype(np.uint16)
    one, other = tmp_path / "one.safetensors", tmp_path / f"other.{suffix}"
    checkpoint.save(one, {"x": numbers, "y": np.ones((), np.float32)})
    lazy, done = files.opened(one), []
    assert all(isinstance(value, stored.Stored) for value in lazy.values())
    checkpoint.save(other, lazy, done.append)
    assert sum(done) == 2 * (numbers.nbytes + 4)
    found = checkpoint.load(other)
    assert list(found) == ["x", "y"]
    np.testing.assert_array_equal(found["x"], numbers, strict=True)
    before = other.stat().st_mtime_ns
    checkpoint.save(one, {"x": numbers + np.uint16(1), "y": np.ones((), np.float32)})
    with pytest.raises(CheckpointError, match=f"^{one}: the file has changed since it was opened\n"):
        checkpoint.save(other, lazy)
    one.unlink()
    with pytest.raises(CheckpointError, match=f"^{one}: no such file\n"):
        checkpoint.save(other, lazy)
    assert other.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [other]


def test_an_orbax_checkpoint_takes_anothers_place(tmp_path):
    path = tmp_path / "a.orbax"
    checkpoint.save(path, {"x": np.ones(2)})
    checkpoint.save(path, {"x": np.zeros(3)})
    assert checkpoint.load(path)["x"].shape == (3,)
    assert list(tmp_path.iterdir()) == [path]
    before = _contents(path)

    # As if killed between the two renames: the old one is all that there is, and comes back though the new is refused.
    os.rename(path, f"{path}.01234567.tmp.old")
    (tmp_path / "a.orbax.01234567.tmp.new").mkdir()
    (tmp_path / "a.orbax.01234567.tmp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="x has size 0, which orbax cannot write"):
        checkpoint.save(path, {"x": np.ones((0, 2))})
    assert _contents(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_into_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/nothing/a.safetensors: no such"):
        checkpoint.save(tmp_path / "nothing" / "a.safetensors", {})
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: Is a directory"):
        checkpoint.save(tmp_path / "b.safetensors", {})
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_numbers_that_change_while_they_are_saved(suffix, tmp_path):
    """What is then in the file is not what is in the array."""
    path = tmp_path / f"a.{suffix}"
    checkpoint.save(path, {"x": np.ones(2)})
    before = _contents(tmp_path)
    numbers = np.zeros(3)
    with pytest.raises(CheckpointError, match=f"^{path}: read back, it differs from what was written: x\n"):
        checkpoint.save(path, {"x": numbers}, lambda count: numbers.__setitem__(1, 2.0))
    assert _contents(tmp_path) == before, "the old file is not what it was"


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_disk_that_is_full_leaves_the_old_file(suffix, tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / f"a.{suffix}"
    checkpoint.save(path, {"x": np.ones(2)})
    before = _contents(tmp_path)
    numbers = np.random.RandomState(0).standard_normal(100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=f"^{path}: "):
            checkpoint.save(path, {"x": numbers})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _contents(tmp_path) == before, "the old file is not what it was"


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])  # a directory cannot take another's place at once
def test_whoever_reads_meanwhile_meets_whole_files(suffix, tmp_path):
    """As the kills below show of a writer that dies, and in no time."""
    path = tmp_path / f"a.{suffix}"
    checkpoint.save(path, {"x": np.zeros(200_000)})
    done, met = threading.Event(), []

    def read() -> None:
        copy = tmp_path / f"copy.{suffix}"
        while not done.is_set():
            copy.write_bytes(path.read_bytes())
            met.append(checkpoint.load(copy)["x"])

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for number in range(30):
            checkpoint.save(path, {"x": np.full(200_000, number)})
        done.set()
        reader.result()
    assert len(met) > 3
    assert all(np.all(found == found[0]) for found in met), "a reader met a file that was written half"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_save_is_whole_or_not_at_all(name, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"x": np.ones(2)})
    before = path.read_bytes()

    def fail(*args: object) -> None:
        assert path.read_bytes() == before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(CheckpointError, match=f"^{path}: No space left on device\n"):
        checkpoint.save(path, {"x": np.zeros(3)})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_save_syncs_before_it_renames(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def record_replace(source: str, target: str) -> None:
        assert os.path.dirname(source) == os.path.dirname(target)
        calls.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    checkpoint.save(tmp_path / "a.safetensors", {"x": np.ones(1000)})
    assert [name for name, *_ in calls] == ["fsync", "replace"]
    (_, *synced), (_, *renamed) = calls
    assert synced == renamed
    assert synced[1] > 8000


def test_saved_file_is_an_ordinary_one(tmp_path):
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "folder" / "b.safetensors", tmp_path / "a.safetensors")
    mask = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "a.safetensors", {"x": np.ones(1)})
    finally:
        os.umask(mask)
    assert (tmp_path / "a.safetensors").is_symlink()
    assert stat.S_IMODE((tmp_path / "folder" / "b.safetensors").stat().st_mode) == 0o640


WRITER = """
import sys, threading, numpy as np
from jaxrnn import checkpoint

def write(path):
    for number in range(10**6):
        checkpoint.save(path, {"x": np.full(200_000, number), "y": np.full(3, number)})

print("ready", flush=True)
for path in sys.argv[1:]:
    threading.Thread(target=write, args=[path]).start()
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path, thorough):
    """One process writes all formats at once, for most of the time goes into starting it."""
    paths = [tmp_path / suffix / f"a.{suffix}" for suffix in FORMATS]
    for path in paths:
        path.parent.mkdir()
    random = np.random.RandomState(0)
    abandoned = set()
    for _ in range(70 if thorough else 4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, *paths], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        # Longer than one takes, so that there is an old file to lose.
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.wait()
        process.stdout.close()
        for path in paths:
            others = [other.name for other in path.parent.iterdir() if other != path]
            assert len({name[: len(path.name) + len(".01234567.tmp")] for name in others}) <= 1
            abandoned |= {path} if others else set()
            if path.exists():
                found = checkpoint.load(path)
                assert np.all(found["x"] == found["y"][0])
    for path in paths:
        checkpoint.save(path, {"x": np.ones(1)})
        assert list(path.parent.iterdir()) == [path]
    assert abandoned == {*paths} or not thorough


def test_what_another_writer_holds_stays(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    held, other = tmp_path / "a.pt.0123abcd.tmp", tmp_path / "b.pt.0123abcd.tmp"
    other.write_bytes(b"")
    with open(held, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        checkpoint.save(tmp_path / "a.pt", {"x": np.ones(1)})
        assert held.exists()
    checkpoint.save(tmp_path / "a.pt", {"x": np.ones(1)})
    assert not held.exists()
    assert other.exists()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_directory_that_is_no_checkpoint_stays(suffix, tmp_path):
    path = tmp_path / f"runs.{suffix}"
    (path / "notes").mkdir(parents=True)
    (path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(
        CheckpointError, match=f"^{path}: a directory that is not an orbax checkpoint, so it is not replaced\n"
    ):
        checkpoint.save(path, {"x": np.ones(1)})
    assert _contents(tmp_path) == {f"runs.{suffix}/notes/thesis.txt": b"mine"}
    if suffix == "orbax":
        (tmp_path / "empty.orbax").mkdir()
        checkpoint.save(tmp_path / "empty.orbax", {"x": np.ones(1)})
        assert list(checkpoint.load(tmp_path / "empty.orbax")) == ["x"]


def test_who_may_read_the_old_file_may_read_the_new_one(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"x": np.ones(1)})
    for mode in (0o600, 0o440):
        path.chmod(mode)
        checkpoint.save(path, {"x": np.ones(2)})
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_several_writers_at_once(tmp_path):
    """One of them wins each time, and none removes what another is writing."""

    def write_often(number: int) -> None:
        for _ in range(25):
            checkpoint.save(tmp_path / "a.pt", {"x": np.full(10, number)})

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write_often, range(4))) == [None] * 4
    assert len(set(checkpoint.load(tmp_path / "a.pt")["x"])) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EIO])
def test_where_files_cannot_be_locked(code, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "a.pt.0123abcd.tmp").write_bytes(b"somebody's")
    checkpoint.save(tmp_path / "a.pt", {"x": np.ones(1)})
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "a.pt.0123abcd.tmp"}


@pytest.mark.parametrize(("name", "tensors", "cause"), [("a\0b.pt", {}, "NUL"), ("a.pt", {1: np.ones(1)}, "got 1\n")])
def test_names_that_are_none(name, tensors, cause, tmp_path):
    with pytest.raises(CheckpointError, match=cause):
        checkpoint.save(tmp_path / name, tensors)


TREE: dict[str, Any] = {
    "model": {"w": np.arange(6.0).reshape(2, 3), "h": jnp.ones(2, jnp.bfloat16), "empty": np.zeros((0, 2), np.int8)},
    "optimizer": {"state": {0: {"step": np.array(3.0, np.float32)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
    "more": [None, True, False, 0, -(2**70), 1e-310, float("nan"), "é\ud800", (), [], {}, {"a.b": np.float64(2)}],
}


def test_trees(tmp_path: Path, torch: types.ModuleType) -> None:
    checkpoint.save_tree(tmp_path / "run.pt", {**TREE, "lr": torch.tensor(0.1)})
    found = checkpoint.load_tree(tmp_path / "run.pt")
    assert repr(found["more"][:-1]) == repr(TREE["more"][:-1])
    assert found["lr"].dtype == np.float32
    theirs = torch.load(tmp_path / "run.pt")
    assert list(theirs) == [*TREE, "lr"]
    assert theirs["optimizer"]["param_groups"] == [{"betas": (0.9, 0.999)}]
    assert theirs["optimizer"]["state"][0]["step"] == 3
    assert theirs["model"]["h"].dtype == torch.bfloat16
    assert (theirs["model"]["w"].numpy() == TREE["model"]["w"]).all()
    assert theirs["more"][-1]["a.b"] == 2
    assert list(checkpoint.load(tmp_path / "run.pt", key="model")) == ["w", "h", "empty"]


@pytest.mark.parametrize(
    ("tree", "name", "cause"),
    [
        ({}, "run.safetensors", "nested dicts are written for torch alone\nend the name in .pt"),
        ({"a": [{1.5: 0}]}, "run.pt", "keys should be strings or integers, and a.0 has 1.5\nrename it"),
        ({"a": [object()]}, "run.pt", "a.0 is of type object, which is not written\nleave it out"),
        ({"a": {3: np.array("x")}}, "run.pt", "a.3 is of type ndarray, which is not written"),
        ({"a": [jnp.ones(2, jnp.int4)]}, "run.pt", "a.0 has dtype int4, which torch does not have\nconvert it"),
        (object(), "run.pt", "the tree is of type object"),
    ],
)
def test_trees_that_are_not_written(tree: Any, name: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{tmp_path / name}: {cause}')}"):
        checkpoint.save_tree(tmp_path / name, tree)
    assert not list(tmp_path.iterdir())


def test_a_tree_that_reads_back_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.pt").write_bytes(b"mine")
    for change in ({"a": [1]}, {"a": (1, 2)}, {"a": [True, 2]}, {"a": [1, np.zeros(2)]}, {"b": [1, 2]}):
        monkeypatch.setattr(checkpoint.write, "load_tree", lambda path, change=change: change)
        with pytest.raises(CheckpointError, match=r"read back, it differs from what was written: (a|the tree)"):
            checkpoint.save_tree(tmp_path / "run.pt", {"a": [1, 2]})
    assert (tmp_path / "run.pt").read_bytes() == b"mine"
