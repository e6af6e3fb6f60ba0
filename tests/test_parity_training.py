"""Training in step with torch: the recorded runs are torch's, ours follow them, and what is set wrongly is seen."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from comparing import assert_close

from jaxrnn import TorchGenerator, checkpoint
from parity import __main__ as runner
from parity import training
from parity.cases import LAYERS, NamedArrays
from parity.reference import Recorded
from parity.training import RUNS, STEPS, Run, compare, run_torch

RECORDED = Recorded()
ADAMW, ADAM = RUNS["training-GRU-adamw"], RUNS["training-LSTM-adam"]
NESTEROV, VARIATIONAL = RUNS["training-RNN_RELU-nesterov"], RUNS["training-RNN_TANH-variational"]
SEEDED = RUNS["training-LSTM-seed"]


def _quick_and_slow(quick: Run, *slow: Run) -> pytest.MarkDecorator:
    params = [pytest.param(run, id=run.name, marks=pytest.mark.slow) for run in slow]
    return pytest.mark.parametrize("run", [pytest.param(quick, id=quick.name), *params])


def test_every_kind_and_optimizer_is_trained() -> None:
    assert {run.kind for run in RUNS.values()} == set(LAYERS)
    assert {run.optimizer for run in RUNS.values()} == {"SGD", "Adam", "AdamW"}
    assert any(run.settings.get("momentum") and not run.settings["nesterov"] for run in RUNS.values())
    assert all(run.dropout for run in RUNS.values())
    assert {run.clip is None for run in RUNS.values()} == {run.variational for run in RUNS.values()} == {True, False}
    for run in RUNS.values():
        losses = RECORDED.training(run)["losses"]
        assert len(losses) == STEPS
        assert losses[-10:].mean() < 0.9 * losses[:10].mean(), run.name  # it learns, so that every weight has moved
    with pytest.raises(KeyError, match="python -m parity record"):
        RECORDED.training(dataclasses.replace(ADAM, label="unheard of"))


@_quick_and_slow(NESTEROV, ADAMW, VARIATIONAL, SEEDED)
def test_ours_follows_the_record(run: Run) -> None:
    result = compare(run, RECORDED.training(run))
    assert not result.failure()
    assert max(result.losses, result.weights) < 1e-12
    assert result.ours == pytest.approx(result.torch, rel=1e-12)


@pytest.mark.torch
@_quick_and_slow(NESTEROV, ADAM, SEEDED)
def test_the_record_is_a_live_torchs(torch: types.ModuleType, run: Run) -> None:
    recorded, now = RECORDED.training(run), run_torch(run)
    assert np.array_equal(recorded["masks"], now["masks"])
    assert_close(recorded, now)


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_recorded_masks_are_those_of_the_seeds(run: Run) -> None:
    """Torch recorded them on a processor where it draws dropout by its own generator."""
    masks = [TorchGenerator(step).dropout_mask(run.mask_shape, run.dropout) for step in range(STEPS)]
    assert np.array_equal(np.packbits(masks), RECORDED.training(run)["masks"])


@pytest.mark.torch
def test_a_run_from_a_seed_starts_with_torchs_weights(torch: types.ModuleType) -> None:
    params, *_ = SEEDED.numbers()
    torch.manual_seed(SEEDED.seed)
    sizes = {"hidden_size": training.HIDDEN, "num_layers": training.LAYER_COUNT, "bidirectional": True}
    layers = torch.nn.LSTM(training.INPUT, **sizes, dtype=torch.float64)
    theirs = torch.nn.ModuleDict({"rnn": layers, "head": torch.nn.Linear(SEEDED.features, 1, dtype=torch.float64)})
    assert all(np.array_equal(params[name], value.numpy()) for name, value in theirs.state_dict().items())


@pytest.mark.slow
def test_another_seed_is_seen() -> None:
    result = compare(dataclasses.replace(SEEDED, seed=1), RECORDED.training(SEEDED))
    assert "are off by" in result.failure()


def _without_the_small_number(max_norm: float) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(max_norm)


FAULTS: dict[str, tuple[Run, Any]] = {
    "optax's clipping": (ADAM, ("clip_grad_norm", _without_the_small_number)),
    "decay inside Adam": (ADAMW, ("optax_from_torch", lambda state, params: _changed(state, params, decoupled=False))),
    "another eps": (ADAM, ("optax_from_torch", lambda state, params: _changed(state, params, eps=1.1e-8))),
    "heavy ball": (NESTEROV, ("optax_from_torch", lambda state, params: _changed(state, params, nesterov=False))),
}


def _changed(state: dict, params: NamedArrays, **changes: Any) -> Any:
    group = state["param_groups"][0]
    if "decoupled" in changes:
        changes = {"decoupled_weight_decay": changes["decoupled"]}
    return checkpoint.optax_from_torch({**state, "param_groups": [{**group, **changes}]}, params)


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=() if f == "heavy ball" else pytest.mark.slow) for f in FAULTS]
)
def test_a_wrong_setting_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, (name, wrong) = FAULTS[fault]
    monkeypatch.setattr(training, name, wrong)
    assert "are off by" in compare(run, RECORDED.training(run)).failure()


def test_one_other_mask_is_seen() -> None:
    record = RECORDED.training(NESTEROV)
    record["masks"] = record["masks"].copy()
    record["masks"][len(record["masks"]) // 2] ^= 1
    assert "the losses are off by" in compare(NESTEROV, record).failure()


def test_a_crash_and_nan_are_failures() -> None:
    record = RECORDED.training(NESTEROV)
    assert "KeyError" in compare(NESTEROV, {"losses": record["losses"]}).failure()
    assert "off by nan" in compare(NESTEROV, record | {"head.bias": record["head.bias"] * np.nan}).failure()


def test_the_runner_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert runner.main(["--filter", NESTEROV.name, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert NESTEROV.name in printed
    assert "1 trainings of 200 steps stay together" in " ".join(printed.split())
    [trained] = json.loads(out.read_text())["training"]
    assert trained["name"] == NESTEROV.name
    assert trained["losses"] < 1e-12
