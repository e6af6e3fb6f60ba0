"""Orbax checkpoints: every bit there and back, those that Flax users write, and what is refused."""

import asyncio
import contextlib
import gc
import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training import train_state

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.__main__ import main
from jaxrnn.checkpoint import CheckpointError
from jaxrnn.checkpoint.formats import orbax
from jaxrnn.checkpoint.formats.safetensors import DTYPES

# Where one array cannot be read, orbax does not wait for the others, which then find no event loop, in this or the next
# test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
# Names that a path, or a tree with dots, could trip over.
NAMES = ("encoder.weight_ih_l0", "", ".", "..", "../x", "a/b", "a", "a.b", "é\n", "\0", ".zarray", "0", "value")


def test_every_dtype_and_name(tmp_path: Path) -> None:
    dtypes = [jnp.dtype(name) for name in DTYPES.values()]
    random = np.random.RandomState(0)
    tensors = {}
    for number, dtype in enumerate(dtypes):
        shape = [(), (3,), (2, 3), (1, 2, 1)][number % 4]
        name = NAMES[number] if number < len(NAMES) else f"x{number}"
        tensors[name] = np.asarray(random.randint(0, 2, shape)).astype(dtype)
    assert len(tensors) == len(dtypes) > len(NAMES)
    checkpoint.save(tmp_path / "a.orbax", tensors)
    found = checkpoint.load(tmp_path / "a.orbax")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()
        assert found[name].flags.writeable


def test_the_numbers_are_not_cut_to_32_bits(tmp_path: Path) -> None:
    with jax.enable_x64(False):
        checkpoint.save(tmp_path / "a.orbax", {"x": np.array([1 / 3]), "n": np.array(2**60)})
        found = checkpoint.load(tmp_path / "a.orbax")
    assert found["x"][0] == 1 / 3
    assert found["n"] == 2**60


def test_orbax_itself_reads_it(tmp_path: Path) -> None:
    gru = jaxrnn.GRU(3, 4, rngs=nnx.Rngs(0))
    checkpoint.save(tmp_path / "a.orbax", jaxrnn.state_dict(gru))
    with ocp.StandardCheckpointer() as checkpointer:
        target = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in jaxrnn.state_dict(gru).items()}
        tensors = checkpointer.restore(tmp_path / "a.orbax", target)
    other = jaxrnn.GRU(3, 4, rngs=nnx.Rngs(1))
    assert jaxrnn.load_state_dict(other, tensors) == ([], [])
    np.testing.assert_array_equal(other.weight_hh_l0[...], gru.weight_hh_l0[...])


def test_what_flax_users_write(tmp_path: Path) -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.encoder = jaxrnn.LSTM(3, 4, rngs=rngs)
            self.heads = nnx.List([jaxrnn.GRUCell(4, 5, rngs=rngs)])

    model = Model(nnx.Rngs(0))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
    assert jaxrnn.load_state_dict(Model(nnx.Rngs(1)), checkpoint.load(tmp_path / "state")) == ([], [])
    variables = jaxrnn.linen.GRU(3, 4).init(jax.random.key(0), jnp.ones((5, 3), jnp.float32))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, args=ocp.args.Composite(model=ocp.args.StandardSave({**variables, "step": 3})))
    for path in ("run", "run/7", "run/7/model"):  # the only one there is
        tensors = checkpoint.load(tmp_path / path, key="params")
        assert tensors.keys() == variables["params"].keys()
    np.testing.assert_array_equal(tensors["weight_hh_l0"], variables["params"]["weight_hh_l0"])
    assert checkpoint.load(tmp_path / "run").keys() == tensors.keys()
    assert checkpoint.load_tree(tmp_path / "run", "step") == 3
    with pytest.raises(CheckpointError, match="it has no key 'nobody'\nits keys: params"):
        checkpoint.load(tmp_path / "run", key="nobody")
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(8, args=ocp.args.Composite(model=ocp.args.StandardSave(dict(variables))))
    with pytest.raises(CheckpointError, match=r"several checkpoints\ngive the path of one of them: 7.model, 8.model"):
        checkpoint.load(tmp_path / "run")


def test_two_things_under_one_name(tmp_path: Path) -> None:
    trees = {
        "dotted": ({"a": {"b": np.ones(2)}, "a.b": np.zeros(2)}, "a/b and a.b"),
        "in a list": ({"a": [np.ones(2)], "a.0": np.zeros(2)}, "a/0 and a.0"),
        "a variable's value": ({"a": {"b": {"value": np.ones(2)}}, "a.b": np.zeros(2)}, "a/b and a.b"),
    }
    for name, (tree, both) in trees.items():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, tree)
        with pytest.raises(
            CheckpointError, match=rf"{re.escape(both)} are both read as a\..\nrename one of them before"
        ):
            checkpoint.load(tmp_path / name)


def test_boxes_of_partitioned_weights(tmp_path: Path) -> None:
    init = linen.with_partitioning(jax.nn.initializers.normal(), (None, "model"))
    theirs, x = linen.RNN(linen.GRUCell(4, kernel_init=init)), jnp.ones((2, 5, 3), jnp.float32)
    variables = theirs.init(jax.random.key(0), x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "boxes", variables)
    ours, converted = jaxrnn.from_flax(checkpoint.load(tmp_path / "boxes"), batch_first=True)
    np.testing.assert_allclose(ours.apply(converted, x)[0], theirs.apply(variables, x), atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "cause"),
    [
        ({}, "no tensors, and an orbax checkpoint cannot be empty"),
        ({"x": np.ones((0, 2))}, "x has size 0, which orbax cannot write"),
        ({"\ud800": np.ones(1)}, r"the name \\ud800 is not valid Unicode"),
    ],
)
def test_what_orbax_cannot_hold(tensors: dict, cause: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/a.orbax: {cause}.*\n"):
        checkpoint.save(tmp_path / "a.orbax", tensors)
    assert not list(tmp_path.iterdir())


def test_damaged_directories(tmp_path: Path, refusal: Callable[[Path], str], thorough: bool) -> None:
    path = tmp_path / "a.orbax"
    checkpoint.save(path, {"x": np.arange(1000.0), "y": np.ones(3)})
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for file, data in files.items():
        if file.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):  # for orbax's managers
            continue
        for damage in (None, b"", data[: len(data) // 2]):
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            try:  # orbax keeps some files twice
                assert checkpoint.load(path).keys() == {"x", "y"}
            except CheckpointError:
                assert "orbax" in refusal(path)
            file.write_bytes(data)
    random = np.random.RandomState(0)
    for _ in range(1000 if thorough else 20):
        file = random.choice(sorted(files))
        changed = bytearray(files[file])
        changed[random.randint(len(changed))] ^= 1 << random.randint(8)
        file.write_bytes(changed)
        with contextlib.suppress(CheckpointError):
            checkpoint.load(path)
        file.write_bytes(files[file])
    gc.collect()
    (path / "_METADATA").write_text("{}")
    assert "a damaged orbax checkpoint" in refusal(path)
    (path / "_METADATA").unlink()
    assert refusal(path) == "a directory without an orbax checkpoint"


def _zarr(path: Path, tree: Any) -> None:
    """In files of their own, whose JSON has no checksum."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def test_a_chunk_far_larger_than_its_array(tmp_path: Path, refusal: Callable[[Path], str]) -> None:
    """tensorstore would end the process, for lack of memory."""
    _zarr(tmp_path / "bomb", {"x": np.zeros((3, 3))})
    described = tmp_path / "bomb" / "x" / ".zarray"
    described.write_text(described.read_text().replace("[3,3]", "[3, 2147483647]", 1))
    assert re.fullmatch(r"a bomb: its tensors have 51539607528 bytes, in files of \d+", refusal(tmp_path / "bomb"))


def test_errors_wait_for_what_is_being_read() -> None:
    """Or tensorstore's threads would print tracebacks, because asyncio's loop is closed when they are done."""
    done = []

    async def read(count: int) -> list[int]:
        for _ in range(count):
            await asyncio.sleep(0)
        done.append(count)
        if count == 1:
            raise ValueError(count)
        return [count]

    async def both(*counts: int) -> Any:
        reads = [orbax._All(read, [(count,), (count + 1,)]) for count in counts]
        return await asyncio.gather(*reads)

    assert asyncio.run(both(2, 4)) == [[2, 3], [4, 5]]
    done.clear()
    with pytest.raises(ValueError, match="1"):
        asyncio.run(both(5, 1, 7))
    assert sorted(done) == [1, 2, 5, 6, 7, 8]
    orbax._All(read, [(1,)])  # never awaited, which is no warning


def test_an_array_far_larger_than_its_files(tmp_path: Path, refusal: Callable[[Path], str]) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "bomb", {"x": np.zeros(10_000_000)})
    assert re.fullmatch(r"a bomb: its tensors have 80000000 bytes, in files of \d{4,5}", refusal(tmp_path / "bomb"))


def test_leaves_that_are_no_arrays(
    tmp_path: Path, refusal: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Orbax writes None for a state without numbers, as clip_by_global_norm has it.
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3))
    params = linen.RNN(linen.GRUCell(4)).init(jax.random.key(0), jnp.ones((2, 5, 3), jnp.float32))["params"]
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=optimizer)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", {"state": state, "config": {"name": "GRU", "rate": None}})
        checkpointer.save(tmp_path / "b", {"name": "GRU", "rate": None})
    assert main(["inspect", str(tmp_path / "a")]) == 0
    left_out = "left out state.opt_state, state.step, config.name, config.rate"
    assert left_out in " ".join(capsys.readouterr().err.split())
    assert len(checkpoint.load(tmp_path / "a")) == 4
    assert checkpoint.load_tree(tmp_path / "a", "config") == {"name": "GRU", "rate": None}
    assert checkpoint.load_tree(tmp_path / "a", "state.opt_state")[0] is None
    assert refusal(tmp_path / "b") == "it has no arrays, but name, rate"
    metadata = json.loads((tmp_path / "a" / "_METADATA").read_text())
    assert "('config', 'name')" in metadata["tree_metadata"]


def test_values_of_variables_and_things_called_value(tmp_path: Path) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = {"model": {"kernel": {"value": model.kernel[...]}, "bias": {"value": model.bias[...]}}}
    attention = {"attention": {"key": np.ones(1), "value": np.ones(2)}, "step": np.array(3)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", state | attention)
    assert checkpoint.load(tmp_path / "a", "model").keys() == {"kernel", "bias"}
    assert checkpoint.load(tmp_path / "a").keys() == {
        "model.kernel", "model.bias", "attention.key", "attention.value", "step"
    }  # fmt: skip
    for names in (["a.value"], ["value"], ["a.value", "b.value"]):
        checkpoint.save(tmp_path / "b.orbax", {name: np.ones(3) for name in names})
        assert list(checkpoint.load(tmp_path / "b.orbax")) == names


def test_zeros_are_no_bomb_and_logging_stays(tmp_path: Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", {"x": np.zeros((3000, 1000), np.float32)})
    level = logging.getLogger("absl").level
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(checkpoint.load, [tmp_path / "a"] * 8):
            assert not found["x"].any()
    assert logging.getLogger("absl").level == level
    assert logging.getLogger("absl").filters == []
