"""A user's own checkpoint: every module in it beside torch's, on random and on given inputs, and where one is off."""

import json
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from comparing import assert_close

import jaxrnn
from parity import __main__ as runner
from parity import model, sides
from parity.cases import Case, NamedArrays

Specs = dict[str, jaxrnn.Spec | jaxrnn.CellSpec]
DENOISER = str(Path(__file__).parents[1] / "examples" / "denoiser.safetensors")


def _tensors(specs: Specs, numbers: Callable) -> dict[str, np.ndarray]:
    """The state dict of a model with a module at every prefix."""
    named = ((prefix + name, shape) for prefix, spec in specs.items() for name, shape in spec.shapes().items())
    return {name: numbers(shape).astype(np.float32) for name, shape in named}


def test_every_module_is_a_case(tmp_path: Path) -> None:
    specs: Specs = {
        "a.": jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 4, num_layers=2, bidirectional=True, proj_size=2),
        "b.": jaxrnn.Spec(jaxrnn.RNN_TANH, 3, 4, bias=False),
        "c.": jaxrnn.CellSpec(jaxrnn.GRU_CELL, 5, 4),
        "d.": jaxrnn.CellSpec(jaxrnn.RNN_TANH, 3, 4),
    }
    jaxrnn.checkpoint.save(tmp_path / "a.pt", _tensors(specs, np.ones))
    np.save(tmp_path / "x.npy", np.full((7, 2, 3), 5.0))
    cases = model.cases(str(tmp_path / "a.pt"), inputs=[str(tmp_path / "x.npy")])
    assert [(case.name, case.kind, case.steps) for case in cases] == [
        ("a (LSTM_PROJ) on random inputs", "LSTM_PROJ", 16),
        ("a (LSTM_PROJ) on given inputs", "LSTM_PROJ", 7),
        ("b (RNN_TANH) on random inputs", "RNN_TANH", 16),
        ("b (RNN_TANH) on given inputs", "RNN_TANH", 7),
        ("c (GRUCell) on random inputs", "GRUCell", None),
        ("d (RNNCell_TANH) on random inputs", "RNNCell_TANH", None),
    ]
    parameters, inputs, _ = cases[1].arrays()
    assert parameters.keys() == specs["a."].shapes().keys()
    assert np.all(inputs["input"] == 5.0)
    assert inputs["h_0"].shape == (4, 2, 2)


@pytest.mark.slow
@pytest.mark.torch
def test_the_runner_on_a_model(torch: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", DENOISER, "--json", str(tmp_path / "out.json")]
    for name, features in (("x.npy", 48), ("y.npy", 1)):
        np.save(tmp_path / name, np.random.RandomState(0).randn(5, 2, features))
        arguments += ["--inputs", str(tmp_path / name)]
    assert runner.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"jaxrnn gives what torch {torch.__version__} (live) gives: 4 cases" in " ".join(printed.split())
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["passed"]
    names = ["decoder (GRU) on random inputs", "decoder (GRU) on x.npy"]
    names += ["encoder (LSTM) on random inputs", "encoder (LSTM) on y.npy"]
    assert list(dict.fromkeys(row["kind"] for row in report["rows"])) == names
    for row in report["rows"]:  # torch's own float32 error stands beside ours
        assert 0 < row["worst"] < 4e-6
        assert row["torch_rms"] > 0


@pytest.mark.torch
def test_a_fault_in_a_model_is_located(
    torch: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, random = str(tmp_path / "model.pt"), np.random.RandomState(0)
    specs: Specs = {"cell.": jaxrnn.CellSpec(jaxrnn.LSTM_CELL, 3, 4), "decoder.": jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4)}
    jaxrnn.checkpoint.save(path, _tensors(specs, random.standard_normal))
    run = sides.run_jaxrnn

    def faulty(case: Case, dtype: str) -> NamedArrays:
        arrays = run(case, dtype)
        if case.kind == "GRU":
            arrays["h_n"] = arrays["h_n"] + 1e-3
        return arrays

    monkeypatch.setitem(sides.SIDES, "jaxrnn", faulty)
    assert runner.main(["--model", path]) == 1
    printed = capsys.readouterr().out
    assert "FAIL decoder (GRU) on random inputs: h_n in float64 is off by" in printed
    assert "WHERE decoder (GRU) on random inputs: first off at only h_n; no known mistake" in printed


def _chaotic(tmp_path: Path, scale: float, cell: jaxrnn.Cell, steps: int = 40, **settings: int) -> list[model.Module]:
    """Weights so large that rounding errors grow from step to step."""
    specs: Specs = {"a.": jaxrnn.Spec(cell, 3, 12, num_layers=2, bidirectional=True, **settings)}
    random = np.random.RandomState(0)
    tensors = _tensors(specs, lambda shape: random.uniform(-scale, scale, shape))
    jaxrnn.checkpoint.save(tmp_path / "a.pt", {name: array.astype(np.float64) for name, array in tensors.items()})
    np.save(tmp_path / "x.npy", random.standard_normal((steps, 2, 3)))
    return model.cases(str(tmp_path / "a.pt"), inputs=[str(tmp_path / "x.npy")])


@pytest.mark.torch
@pytest.mark.parametrize(("cell", "settings"), [(jaxrnn.GRU_CELL, {}), (jaxrnn.LSTM_CELL, {"proj_size": 5})])
def test_renumbering_changes_nothing_but_rounding(
    cell: jaxrnn.Cell, settings: dict[str, int], torch: types.ModuleType, tmp_path: Path
) -> None:
    for case in _chaotic(tmp_path, 0.3, cell, **settings):
        renumbering = model.Renumbering(case, seed=0)
        found, wanted = (sides.run_torch(each, "float64") for each in (renumbering.case, case))
        assert_close({name: renumbering.back(name, array) for name, array in found.items()}, wanted, atol=1e-13)
        assert all(not np.array_equal(found[name], wanted[name]) for name in wanted if name != "input.grad")
        assert model.with_limit(case, "cpu").limit is None
    cell_spec: Specs = {"c.": jaxrnn.CellSpec(cell, 3, 12)}
    jaxrnn.checkpoint.save(tmp_path / "c.pt", _tensors(cell_spec, np.random.RandomState(0).standard_normal))
    [case] = model.cases(str(tmp_path / "c.pt"))
    assert model.with_limit(case, "cpu").limit is None


@pytest.mark.torch
def test_the_limit_is_what_the_model_allows(
    torch: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's own results, renumbered and renumbered back, stand for ours: right, but not to 1e-12."""
    [_, case] = _chaotic(tmp_path, 10.0, jaxrnn.GRU_CELL)
    limit = model.with_limit(case, "cpu").limit
    assert limit is not None
    assert 1e-11 < limit < 1e-6
    mistake = 0.0

    def right(case: Case, dtype: str) -> NamedArrays:
        assert isinstance(case, model.Module)
        again = model.Renumbering(case, seed=99)
        found = {name: again.back(name, array) for name, array in sides.run_torch(again.case, dtype).items()}
        return found | {"h_n": found["h_n"] + mistake}

    monkeypatch.setitem(sides.SIDES, "jaxrnn", right)
    arguments = ["--model", str(tmp_path / "a.pt"), "--inputs", str(tmp_path / "x.npy")]
    monkeypatch.setenv("COLUMNS", "20")
    assert runner.main(arguments) == 0
    printed = capsys.readouterr().out
    assert " a (GRU) on given inputs " in printed  # a name is never folded
    printed = " ".join(printed.split())
    assert f"Up to {limit:.0e} counts as right for a (GRU) on given inputs" in printed
    mistake = 3 * limit
    assert runner.main(arguments) == 1
    assert "FAIL a (GRU) on given inputs: h_n in float64 is off by" in capsys.readouterr().out


@pytest.mark.torch
def test_a_mistake_in_float32_alone_fails(
    torch: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(case: Case, dtype: str) -> NamedArrays:
        found = sides.run_torch(case, dtype)
        return found | {"h_n": found["h_n"] + np.asarray(1e-4 if dtype == "float32" else 0.0, dtype)}

    monkeypatch.setitem(sides.SIDES, "jaxrnn", wrong)
    assert runner.main(["--model", DENOISER]) == 1
    assert "FAIL decoder (GRU) on random inputs: h_n in float32 is off by 0.0001" in capsys.readouterr().out
    assert runner.main(["--model", DENOISER, "--dtype", "float64"]) == 0


@pytest.mark.torch
def test_chaos_is_not_judged(
    torch: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _chaotic(tmp_path, 10.0, jaxrnn.GRU_CELL, steps=300)
    monkeypatch.setitem(sides.SIDES, "jaxrnn", sides.run_torch)
    assert runner.main(["--model", str(tmp_path / "a.pt"), "--inputs", str(tmp_path / "x.npy")]) == 1
    assert "FAIL a (GRU) on given inputs: not to be judged: torch's own results change by" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.pt"], "nothing.pt: no such file"),
        ([DENOISER, "--key", "net"], "a safetensors file has no dicts in it"),
        ([DENOISER, "--inputs", "x.npy"], "no module takes shape (5, 2, 7)"),
        ([DENOISER, "--inputs", "nope.npy"], "nope.npy: no such file"),
        ([DENOISER, "--inputs", "text.npy"], "text.npy: not a .npy file of numbers"),
        (["head.safetensors"], "no recurrent weights"),
    ],
)
def test_what_cannot_be_compared(
    torch: types.ModuleType,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.ones((5, 2, 7)))
    Path("text.npy").write_text("1 2 3")
    jaxrnn.checkpoint.save("head.safetensors", {"head.weight": np.ones(3)})
    assert runner.main(["--model", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(runner.sys.modules, "torch", None)
    assert runner.main(["--model", DENOISER]) == 2
    assert "jaxrnn check runs without" in capsys.readouterr().err
