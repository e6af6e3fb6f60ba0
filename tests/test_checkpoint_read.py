"""What people really have in checkpoints: every advice is followed, and what torch reads safely is read."""

import collections
import io
import json
import re
import tarfile
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import nnx
from making import filled

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.__main__ import main
from jaxrnn.checkpoint import CheckpointError

SPEC = jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 4)
LSTM = parameters(SPEC, np.float32)


@pytest.fixture
def saved(torch: types.ModuleType, tmp_path: Path) -> Any:
    """A function that saves an object as torch does, and returns the path."""

    def save(value: Any, name: str = "model.pt", **options: Any) -> Path:
        torch.save(value, tmp_path / name, **options)
        return tmp_path / name

    return save


def _tensors(torch: types.ModuleType, prefix: str = "") -> dict[str, Any]:
    return {prefix + name: torch.tensor(value) for name, value in LSTM.items()}


def _advice(path: Path, pattern: str) -> str:
    """What the remedy of the error says at the place that a pattern's group marks."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    found = re.search(pattern, str(caught.value).split("\n")[1])
    assert found, caught.value
    return found[1]


@pytest.mark.parametrize("key", [0, "v1.0", "net", "a.b.c"])
def test_the_key_that_is_advised_is_taken(key: Any, torch: types.ModuleType, saved: Any) -> None:
    path = saved({key: _tensors(torch), "epoch": 3})
    assert_close(checkpoint.load(path, key=_advice(path, "key='(.*?)'")), LSTM, atol=0)
    path = saved({"models": [{"other": torch.ones(1)}, {key: _tensors(torch)}]})
    assert_close(checkpoint.load(path, key=f"models.1.{key}"), LSTM, atol=0)
    assert list(checkpoint.load_tree(path, f"models.1.{key}")) == list(LSTM)
    with pytest.raises(CheckpointError, match="its 'models' has no key '2'\nits keys: 0, 1"):
        checkpoint.load(path, key="models.2")


def test_usual_keys_are_found_whatever_is_beside_them(torch: types.ModuleType, saved: Any) -> None:
    lstm = torch.nn.LSTM(3, 4)
    optimizer = torch.optim.Adam(lstm.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 80])
    others = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}
    assert list(checkpoint.load(saved({"model": _tensors(torch), **others, "epoch": 3}))) == list(LSTM)
    flat = {**_tensors(torch), "epoch": 3, "_extra_state": None, "lr": 0.1, "tag": "a", "sizes": (1, 2)}
    assert list(checkpoint.load(saved(flat))) == list(LSTM)


def test_an_optimizers_file_says_how_to_go_on(torch: types.ModuleType, saved: Any) -> None:
    lstm = torch.nn.LSTM(3, 4)
    optimizer = torch.optim.Adam(lstm.parameters())
    lstm(torch.ones(2, 3))[0].sum().backward()
    optimizer.step()
    path = saved(optimizer.state_dict())
    assert _advice(path, r"with jaxrnn\.checkpoint\.(load_tree), and give it to jaxrnn\.checkpoint\.optimizer")
    module = filled(lambda: jaxrnn.LSTM(3, 4, rngs=nnx.Rngs(0)))
    assert int(checkpoint.optimizer_from_torch(checkpoint.load_tree(path), module).step[...]) == 1


def test_what_torch_reads_safely_is_read(torch: types.ModuleType, saved: Any) -> None:
    """Value by value as torch.load(weights_only=True) has it."""
    values = {
        "counter": collections.Counter({30: 1, 80: 2}),
        "complex": 1 + 2j,
        "bytearray": bytearray(b"ab\xff"),
        "bytes": b"ab\xff",
        "set": {1, "a"},
        "device": torch.device("cpu"),
        "cuda": torch.device("cuda", 1),
        "keys": {1.5: "a", (1, "b"): 2, None: 3, True: 4},
        "scheme": torch.per_tensor_affine,
        "size": torch.Size([2, 3]),
        "none": None,
        "dtype": torch.bfloat16,
    }
    path = saved(values)
    found, expected = checkpoint.load_tree(path), torch.load(path, weights_only=True)
    named = {"device": "cpu", "cuda": "cuda:1", "dtype": "torch.bfloat16", "scheme": "torch.per_tensor_affine"}
    plain = {"counter": dict(expected["counter"]), "bytearray": bytes(expected["bytearray"])}
    plain["size"] = tuple(expected["size"])
    assert found == expected | named | plain


class _Config:
    """Stands for a config of omegaconf, a loss function, or a scaler of scikit-learn."""

    def __init__(self) -> None:
        self.rate = {"nested": list(range(3))}


def test_objects_beside_tensors_are_left_out_on_request(
    torch: types.ModuleType, saved: Any, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    value = {"state_dict": _tensors(torch), "config": _Config(), "epoch": 3, "path": Path("a"), "loss": np.float64(1)}
    path = saved(value)
    name = f"{_Config.__module__}._Config"
    assert _advice(path, "(only_tensors=True), or --only-tensors on the command line")
    with pytest.warns(UserWarning, match=re.escape(name)):
        assert_close(checkpoint.load(path, only_tensors=True), LSTM, atol=0)
    assert list(checkpoint.load_tree(path, "state_dict")) == list(LSTM)
    with pytest.raises(CheckpointError, match=f"config is a {re.escape(name)}"):
        checkpoint.load_tree(path, "config")
    assert main(["check", str(path)]) == 2
    capsys.readouterr()
    for command in (["check", "--only-tensors"], ["inspect"], ["inspect", "--only-tensors"]):
        assert main([*command, str(path)]) == 0
        told = " ".join(capsys.readouterr().err.split())
        assert f"note: {path}: left out objects that are not tensors: " in told
        assert name in told


def test_nothing_of_what_is_left_out_runs(torch: types.ModuleType, saved: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    evil = {"state_dict": _tensors(torch), "evil": Evil(), "twice": [Evil(), {"x": Evil()}]}
    with pytest.warns(UserWarning, match="left out"):
        assert list(checkpoint.load(saved(evil), only_tensors=True)) == list(LSTM)
    assert not (tmp_path / "ran").exists()


def test_weight_drop(tmp_path: Path) -> None:
    """The weights that were trained are taken, never those that the last dropout left."""
    trained, left = LSTM["weight_hh_l0"], 0 * LSTM["weight_hh_l0"]
    rest = {name: value for name, value in LSTM.items() if name != "weight_hh_l0"}
    inside = {f"rnn.module.{name}": value for name, value in rest.items()}
    plain = {f"rnn.{name}": value for name, value in rest.items()}
    raw, both = {"rnn.weight_hh_l0_raw": trained}, {"rnn.module.weight_hh_l0": left}
    # The tensors, where the module's weights are, and whether something is left of the last dropout.
    layouts = {
        "wrapped": (inside | both | raw, "rnn.module.", True),
        "in one module": (plain | {"rnn.weight_hh_l0": left} | raw, "rnn.", True),
        "both inside": (inside | both | {"rnn.module.weight_hh_l0_raw": trained}, "rnn.module.", True),
        "raw first": (raw | both | inside, "rnn.module.", True),
        "raw alone": (inside | raw, "rnn.module.", False),
    }
    for name, (tensors, prefix, dropped) in layouts.items():
        module = filled(lambda: jaxrnn.LSTM(3, 4, rngs=nnx.Rngs(0)))
        message = "after the last dropout.*raw=True.*--raw" if dropped else "--raw"
        for refused in (
            lambda tensors=tensors: checkpoint.find_rnns(tensors),
            lambda tensors=tensors, m=module, p=prefix: jaxrnn.load_state_dict(m, tensors, p),
        ):
            with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL)):
                refused()
        path = tmp_path / f"{name}.safetensors"
        checkpoint.save(path, tensors)
        assert main(["check", str(path)]) == 2
        assert main(["check", str(path), "--raw"]) == 0
        assert jaxrnn.load_state_dict(module, checkpoint.fold(tensors, raw=True), prefix) == ([], [])
        assert_close(module.weight_hh_l0[...], trained, atol=0)


def test_what_is_beside_a_modules_weights_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A scaled LSTM is no plain one."""
    tensors = {f"rnn.{name}": value for name, value in LSTM.items()}
    scales = {"rnn.weight_ih_l0_scale": np.ones(1), "rnn.bias_scale": np.ones(1), "rnn.other": np.ones(1)}
    checkpoint.save(tmp_path / "a.safetensors", tensors | scales)
    [found] = checkpoint.find_rnns(tensors | scales)
    assert sorted(found.beside) == ["bias_scale", "weight_ih_l0_scale"]
    for command in ("inspect", "check"):
        assert main([command, str(tmp_path / "a.safetensors")]) == 0
        assert "unknown to torch.nn.LSTM: bias_scale, weight_ih_l0_scale" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--json"]) == 0
    assert "weight_ih_l0_scale" in json.loads(capsys.readouterr().out)[0]["beside"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_checkpoint_in_several_files(suffix: str, tmp_path: Path) -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4, 2)
    tensors = parameters(spec, np.float32)
    files = [f"model-0000{k}-of-00002.{suffix}" for k in (1, 2)]
    where = {name: files["_l1" in name] for name in tensors}
    for file in files:
        checkpoint.save(tmp_path / file, {name: value for name, value in tensors.items() if where[name] == file})
    with pytest.raises(CheckpointError, match=f"one of 2 files .*\nput model.{suffix}.index.json beside it"):
        checkpoint.load(tmp_path / files[0])
    index = tmp_path / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    for path in (index, tmp_path, tmp_path / files[0], tmp_path / files[1]):
        assert_close(checkpoint.load(path), tensors, atol=0)
    assert [rnn.num_layers for rnn in checkpoint.find_rnns(checkpoint.load(tmp_path))] == [2]
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"its file {files[1]} is not there"):
        checkpoint.load(index)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "a damaged index"),
        ("[]", "a damaged index"),
        ('{"weight_map": {}}', "a damaged index"),
        ('{"weight_map": {"a": 1}}', "a damaged index"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "it lists files outside its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "it lists files outside its folder"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "is neither safetensors nor"),
        ("[" * 100_000, "a damaged index"),
    ],
)
def test_indices_that_are_none(text: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*{cause}.*\n"):
        checkpoint.load(path)


def test_archives_say_what_is_in_them(saved: Any, torch: types.ModuleType, tmp_path: Path) -> None:
    inside = saved(_tensors(torch))
    with tarfile.open(tmp_path / "a.nemo", "w") as archive:
        archive.add(inside, "model_weights.ckpt")
    assert _advice(tmp_path / "a.nemo", "unpack it, and give (the checkpoint) in it")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert _advice(tmp_path / "old.pt", "(load it with any torch)")
    with zipfile.ZipFile(tmp_path / "agent.zip", "w") as archive:
        for name in ("data", "pytorch_variables.pth", "policy.optimizer.pth", "policy.pth"):  # of Stable-Baselines3
            archive.write(inside, name)
    assert _advice(tmp_path / "agent.zip", "unzip it, and give one of them: (policy.pth), pytorch")
    with torch.package.PackageExporter(tmp_path / "package.pt") as exporter:
        exporter.save_text("a", "b", "c")
    assert _advice(tmp_path / "package.pt", "load it with (torch.package)")
    old = {"pickle_protocol": 4, "_use_new_zipfile_serialization": False}
    assert _advice(saved(_tensors(torch), **old), "save it again, (without pickle_protocol=)")


def test_a_prefix_that_fits_everything_is_advised() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.lstm, self.head = jaxrnn.LSTM(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    model = filled(lambda: Model(nnx.Rngs(0)))
    tensors = {f"model.{name}": value for name, value in jaxrnn.state_dict(model).items()}
    with pytest.raises(CheckpointError, match=r"\ngive prefix='model\.'"):
        jaxrnn.load_state_dict(model, tensors)
    assert jaxrnn.load_state_dict(model, tensors, prefix="model.") == ([], [])


@pytest.mark.parametrize("wrapper", ["module.", "module.module.", "_orig_mod.", "_fsdp_wrapped_module.", "net."])
def test_names_through_wrappers(wrapper: str, torch: types.ModuleType) -> None:
    """A module's weights, and its optimizer's names, as the README gives them."""
    theirs = torch.nn.LSTM(3, 4)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    theirs(torch.ones(2, 3))[0].sum().backward()
    optimizer.step()
    tensors = {wrapper + name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    prefix = wrapper if wrapper == "net." else ""
    module = filled(lambda: jaxrnn.LSTM(3, 4, rngs=nnx.Rngs(0)))
    assert jaxrnn.load_state_dict(module, tensors, prefix=prefix) == ([], [])
    checkpoint.optimizer_from_torch(optimizer.state_dict(), module, names=list(tensors), prefix=prefix)
    # And where only a part of a model is wrapped.
    inner = {f"rnn.{name}": value for name, value in tensors.items()}
    assert jaxrnn.load_state_dict(module, inner, prefix=f"rnn.{prefix}") == ([], [])


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("named", [True, False])
def test_frozen_and_unused_parameters_do_not_move(kind: str, named: bool, torch: types.ModuleType) -> None:
    """Whatever momentum and weight decay would do: two more steps in optax are torch's."""
    settings = {} if kind == "Adam" else {"weight_decay": 0.1, **({"momentum": 0.9} if kind == "SGD" else {})}
    values = {"frozen": normal(3), "trained": normal(3, seed=1), "unused": normal(3, seed=2)}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    theirs["frozen"].requires_grad_(False)
    optimizer = getattr(torch.optim, kind)(theirs.values(), lr=0.1, **settings)

    def step() -> None:
        optimizer.zero_grad()
        (theirs["frozen"] * theirs["trained"]).sin().sum().backward()
        optimizer.step()

    step()
    state = optimizer.state_dict()
    params = {name: value.detach().numpy().copy() for name, value in theirs.items()}
    names = list(params) if named else ["trained"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours, ours_state = checkpoint.optax_from_torch(state, params, names)
    assert [str(w.message).startswith("frozen, unused are not trained") for w in caught] == [True] * named
    for _ in range(2):
        step()
        gradients = jax.grad(lambda p: jax.numpy.sin(p["frozen"] * p["trained"]).sum())(params)
        with jax.numpy_dtype_promotion("standard"):  # which optax's adam needs
            updates, ours_state = ours.update(gradients, ours_state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, {name: value.detach().numpy() for name, value in theirs.items()})
