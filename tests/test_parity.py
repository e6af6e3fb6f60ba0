"""The parity suite: every case against the recorded results, those against a live torch, and faults turn it red."""

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from covering import covering

import jaxrnn
from parity import __main__ as runner
from parity import sides
from parity.cases import CASES, ENOUGH, KINDS, LAYERS, LENGTHS, NEAR, Case, NamedArrays
from parity.compare import Outcome, compare, pool
from parity.reference import Recorded, errors, live

RECORDED = Recorded()
SMALL = [case for case in CASES.values() if case.small]
HALF = [case for case in CASES.values() if case.inexact in ("bfloat16", "float16")]
CASE = CASES["GRU-layers2-bidirectional-hx"]
SEEDS = [case for case in CASES.values() if case.name.endswith("-seed0")]
BIG = [*SEEDS, CASES["GRU-long"]]


def _takes_long(case: Case) -> bool:
    """Whether a slow kind has what others have, too: second derivatives, chunks, steps, masks, patterns of lengths."""
    if case.second or case.way in ("chunked", "steps", "mask"):
        return case.kind in LAYERS.keys() - {"RNN_TANH"} or (case.second and case.way == "mask")
    return case.lengths not in (None, LENGTHS["unsorted"]) and case.kind not in ("RNN_TANH", "GRU")


def _settings(case: Case) -> dict[str, Any]:
    names = ("num_layers", "bidirectional", "bias", "batch_first")
    of_the_call = {"batched": case.batch is not None, "hx": case.hx, "way": case.way, "lengths": case.lengths}
    return {"kind": case.kind, **{name: case.arguments.get(name) for name in names}, **of_the_call, "2nd": case.second}


def _few(cases: Sequence[Case], quick: Sequence[Case], slow: Sequence[Case] = ()) -> pytest.MarkDecorator:
    """A few cases stand for all: the gate also runs `python -m parity`, which has them all."""
    marks = {case.name: pytest.mark.slow for case in slow} | {case.name: () for case in quick}
    params = [pytest.param(case, id=case.name, marks=marks.get(case.name, pytest.mark.thorough)) for case in cases]
    return pytest.mark.parametrize("case", params)


def _named(*names: str) -> list[Case]:
    return [CASES[name] for name in names]


def _measure(case: Case, side: sides.Side, *dtypes: str) -> str:
    outcome = compare(case, RECORDED(case), side, dtypes)
    assert outcome.failure() or outcome.errors.keys() >= set(dtypes)
    return outcome.failure()


def test_the_table_has_every_combination() -> None:
    assert len(SMALL) > 300
    whole = [case for case in SMALL if case.way == "whole" and case.steps and not case.second]
    layouts = {(c.arguments["bias"], c.arguments["batch_first"], c.batch is not None, c.hx) for c in whole}
    for one, other in itertools.combinations(range(4), 2):  # any two meet in every way
        assert {(layout[one], layout[other]) for layout in layouts} == set(itertools.product((False, True), repeat=2))
    for case in whole:  # and so they do for every kind, number of layers and direction
        same = ("num_layers", "bidirectional")
        alike = [c for c in whole if c.kind == case.kind and all(c.arguments[n] == case.arguments[n] for n in same)]
        assert len(alike) == len(layouts)
    assert len({case.name for case in CASES.values()}) == len(CASES)
    for words in ("layers3", "bidirectional", "nobias", "batch_first", "unbatched", "hx"):
        assert sum(words in case.name.split("-") for case in SMALL) > 50
    for way in ("lengths", "packed"):
        cases = [case for case in SMALL if case.way == way]
        # Unsorted lengths with hx given, for every kind, number of layers and direction; and every other pattern.
        modules = {(c.kind, c.arguments["num_layers"], c.arguments["bidirectional"]) for c in cases if c.hx}
        assert modules >= set(itertools.product(LAYERS, (1, 2, 3), (False, True)))
        assert {case.lengths for case in cases} >= {LENGTHS[name] for name in ("unsorted", "equal", "ones")}
    assert {case.kind for case in SMALL if case.way == "sorted"} == set(LAYERS)
    for way in ("chunked", "steps", "mask"):
        assert {case.kind for case in SMALL if case.way == way} == set(LAYERS)
    masked = {(case.kind, case.second, case.arguments.get("batch_first", False)) for case in SMALL if case.mask}
    assert masked == set(itertools.chain(*(((kind, False, True), (kind, True, False)) for kind in LAYERS)))
    assert {case.kind for case in CASES.values() if case.steps == 4096} == LAYERS.keys() - {"RNN_RELU"}
    assert {(case.kind, case.inexact) for case in HALF} == set(itertools.product(KINDS, ("bfloat16", "float16")))


@_few(SMALL, covering([case for case in SMALL if not _takes_long(case)], _settings))
def test_float64_is_torchs(case: Case) -> None:
    assert not _measure(case, sides.run_jaxrnn, "float64")


@pytest.mark.usefixtures("optimized")
@_few(BIG, _named("LSTMCell-accuracy-seed0", "GRU-long"))
def test_float32_is_as_close_to_the_truth_as_torchs(case: Case) -> None:
    outcome = compare(case, RECORDED(case), sides.run_jaxrnn)
    assert not outcome.failure()
    rows, _ = pool([outcome])
    assert rows
    for row in rows:
        assert row.rms is not None
        assert row.torch_rms is not None
        # One seed is no judgement, which is the runner's, over all of them; but a gross loss of accuracy shows.
        assert row.rms < (2 if row.count >= ENOUGH else 3) * row.torch_rms, row


@pytest.mark.usefixtures("optimized")
@_few(HALF, _named("RNN_TANH-bfloat16", "GRUCell-float16"))
def test_16_bits_are_one_rounding_from_the_truth_and_closer_than_torchs(case: Case) -> None:
    outcome = compare(case, RECORDED(case), sides.run_jaxrnn)
    assert not outcome.failure()
    rows, (overall,) = pool([outcome])
    assert overall.dtype == case.inexact
    for row in rows:
        assert row.rms is not None
        assert row.torch_rms is not None
        assert row.inexact < 1000 or row.rms < row.torch_rms, row


@pytest.mark.torch
@_few([*SMALL, *BIG, *HALF], [*SMALL[::7], *SEEDS, *HALF[::4]], [*SMALL, *BIG, *HALF])
def test_the_recorded_results_are_a_live_torchs(torch: types.ModuleType, case: Case) -> None:
    recorded, now = RECORDED(case), live(case, full=case.small)
    assert recorded.keys() == now.keys()
    for name in recorded.keys() & {"truth", "digest"}:
        assert_close({name: recorded[name]}, {name: now[name]}, atol=1e-13 * max(1.0, np.abs(now[name]).max()))
    if case.inexact:
        # Another processor rounds otherwise, but not by more or less as a whole.
        rms = [np.sqrt(record["errors"][:, 1].sum() / record["errors"][:, 0].sum()) for record in (recorded, now)]
        assert 0.5 < rms[0] / rms[1] < 2
        assert recorded["ulps"].sum() == now["ulps"].sum() == recorded["errors"][:, 0].sum()
        if case.steps:
            assert recorded["over_time"].shape == now["over_time"].shape


def test_every_case_is_recorded() -> None:
    for case in CASES.values():
        record = RECORDED(case)
        measured = {"errors", "ulps", *(["over_time"] if case.steps else [])} if case.inexact else set()
        assert record.keys() == {"truth" if case.small else "digest", *measured}
        assert all(len(record[name]) == len(case.measured()) for name in record.keys() & {"digest", "errors"})
    with pytest.raises(KeyError, match="python -m parity record"):
        RECORDED(dataclasses.replace(CASE, name="unheard of"))


def _relu_and_smallest(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    size = jnp.abs(gates[0])
    return jax.nn.relu(gates[0]), jnp.minimum(state[1], jnp.where(size == 0, jnp.inf, size))


# Four roundings of a number near 1.
NEAR_OF = {"bfloat16": 4 * 2.0**-9, "float16": 4 * 2.0**-12}
SMALLEST = jaxrnn.Cell("relu with its smallest argument", ("h",), ("h", "smallest"), _relu_and_smallest)


def _nearest_to_zero(case: Case) -> float:
    """The smallest argument of a relu in the case, exact zeros apart: those are the same for everyone."""
    parameters, inputs, cotangents = case.arrays()
    h_0 = inputs.get("h_0", np.zeros_like(cotangents["h_n"]))
    hx = (h_0, np.full_like(h_0, np.inf))
    if case.steps is None:
        state = jaxrnn.apply_cell(jaxrnn.CellSpec(SMALLEST, **case.arguments), parameters, inputs["input"], hx)
    else:
        _, state = jaxrnn.apply(jaxrnn.Spec(SMALLEST, **case.arguments), parameters, inputs["input"], hx)
    return float(state[1].min())


def test_no_relu_is_near_enough_to_zero_for_rounding_to_flip_it() -> None:
    # Not the small layers: there are too few numbers in them for it to happen, and each would compile.
    cases = [case for case in CASES.values() if "RELU" in case.kind and (not case.small or case.steps is None)]
    for case in cases:
        assert _nearest_to_zero(case) > NEAR_OF.get(case.inexact, NEAR), case.name
    skipped = dataclasses.replace(CASES["RNNCell_RELU-accuracy-seed0"], name="RNNCell_RELU-accuracy-seed23")
    assert _nearest_to_zero(skipped) < NEAR


def test_the_torch_that_recorded_is_named() -> None:
    assert all(re.match(r"\d+\.\d+", version) for version in RECORDED.versions)


@pytest.mark.parametrize("name", list(CASE.measured()))
def test_a_fault_in_any_array_is_seen_and_named(name: str) -> None:
    truth = RECORDED(CASE)

    def faulty(case: Case, dtype: str) -> NamedArrays:
        arrays = sides.run_jaxrnn(case, dtype)
        arrays[name] = arrays[name].copy()
        arrays[name].flat[0] += 1e-10
        return arrays

    assert compare(CASE, truth, faulty, ["float64"]).failure().startswith(f"{name} in float64 is off by ")


def test_a_fault_is_seen_where_only_a_digest_is_recorded() -> None:
    case = CASES["LSTMCell-accuracy-seed0"]
    arrays = sides.run_jaxrnn(case, "float64")
    for name in arrays:
        bad = {**arrays, name: arrays[name] * (1 + 1e-11)}
        assert name in compare(case, RECORDED(case), lambda case, dtype, bad=bad: bad, ["float64"]).failure()
        bad[name] = arrays[name][::-1]
        assert name in compare(case, RECORDED(case), lambda case, dtype, bad=bad: bad, ["float64"]).failure()


def test_nan_a_wrong_shape_and_a_crash_are_failures() -> None:
    arrays = sides.run_jaxrnn(CASE, "float64")
    record = RECORDED(CASE)
    for bad, message in (
        ({**arrays, "h_n": np.full_like(arrays["h_n"], np.nan)}, "h_n in float64 is off by nan"),
        ({**arrays, "h_n": arrays["h_n"][:-1]}, "the results should be"),
        ({**arrays, "h_n": arrays["h_n"].astype("float32")}, "TypeError"),
        ({name: array for name, array in arrays.items() if name != "h_n"}, "the results should be"),
    ):
        assert message in compare(CASE, record, lambda case, dtype, bad=bad: bad, ["float64"]).failure()
    assert "ZeroDivisionError" in compare(CASE, record, lambda case, dtype: {"h_n": 1 / 0}, ["float64"]).failure()


def test_errors() -> None:
    truth = np.array([3.0, -4.0])
    count, squares, worst = errors(truth + np.array([0.0, 0.5]), truth)
    assert (count, worst) == (2, 0.125)
    assert squares == pytest.approx(0.25 / 12.5)


def test_the_runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["--filter", "GRUCell-hx", "--json", str(out)]
    assert runner.main(arguments) == 0
    assert json.loads(out.read_text())
    green = capsys.readouterr().out

    def faulty(case: Case, dtype: str) -> NamedArrays:
        arrays = sides.run_jaxrnn(case, dtype)
        return {**arrays, "weight_hh.grad": arrays["weight_hh.grad"] * np.asarray(1 + 1e-4, dtype)}

    monkeypatch.setitem(sides.SIDES, "jaxrnn", faulty)
    assert runner.main(arguments) == 1
    red = capsys.readouterr().out
    assert "GRUCell-hx" in red
    assert "weight_hh.grad" in red
    assert green != red
    with pytest.raises(SystemExit) as stopped:
        runner.main(["--filter", "no such case"])
    assert stopped.value.code == 2


def test_the_runner_sees_float32_errors_that_only_many_numbers_show(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def inaccurate(case: Case, dtype: str) -> NamedArrays:
        arrays = sides.run_jaxrnn(case, dtype)
        if dtype == "float32":
            noise = np.random.RandomState(0).standard_normal(arrays["h_n"].shape)
            arrays["h_n"] = (arrays["h_n"] + 2e-7 * noise).astype(dtype)
        return arrays

    monkeypatch.setitem(sides.SIDES, "jaxrnn", inaccurate)
    out = tmp_path / "out.json"
    assert runner.main(["--filter", "LSTMCell-accuracy", "--json", str(out)]) == 1
    report = json.loads(out.read_text())
    assert not report["passed"]
    assert list(report["failures"]) == ["LSTMCell h_n", "all kinds all quantities"]
    assert "of torch's own, more than" in report["failures"]["LSTMCell h_n"]
    assert "FAIL LSTMCell h_n" in capsys.readouterr().out


def test_a_filter_ignores_case(chosen: list[str]) -> None:
    runner.main(["--filter", "grucell-HX"])
    assert chosen
    assert all(name.startswith("GRUCell-hx") for name in chosen)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cases that would run."""
    names: list[str] = []
    monkeypatch.setattr(runner, "_judge", lambda cases, *_: names.extend(case.name for case in cases))
    return names


@pytest.mark.usefixtures("chosen")
def test_a_platform_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def devices() -> None:
        raise RuntimeError("Unable to initialize backend")

    monkeypatch.setattr(runner.jax, "devices", devices)
    before = jax.config.jax_platforms
    try:
        with pytest.raises(SystemExit) as stopped:
            runner.main(["--platform", "gpu"])
    finally:
        jax.config.update("jax_platforms", before)
    assert stopped.value.code == 2
    assert "--platform gpu: JAX finds none here" in capsys.readouterr().err


def test_ctrl_c_shows_what_was_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    def stopping(case: Case, *arguments: Any) -> Outcome:
        if done:
            raise KeyboardInterrupt
        done.append(case.name)
        return compare(case, *arguments)

    monkeypatch.setattr(runner, "compare", stopping)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 1)
    assert runner.main(["--filter", "GRUCell-nobias", "--dtype", "float64"]) == 130
    output = capsys.readouterr()
    assert re.search(r"Stopped: 1 of \d+ cases were compared", output.err)
    assert "gives: 1 case," in output.out


@pytest.mark.slow
def test_recorded_results_need_no_torch() -> None:
    program = "import sys; from parity.__main__ import main; code = main(['--filter', 'GRUCell-hx'])"
    program += "; sys.exit(code or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True, capture_output=True)


def test_live_wants_a_torch_that_can(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "installed_torch", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        runner.main(["--live", "--filter", "GRUCell-hx"])
    assert stopped.value.code == 2
    assert "pip install 'jaxrnn[torch]'" in capsys.readouterr().err
    without = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr(runner, "installed_torch", lambda: without)
    with pytest.raises(SystemExit):
        runner.main(["--live", "cuda", "--filter", "GRUCell-hx"])
    assert "sees no GPU" in capsys.readouterr().err


# What each option is given.
VALUES = {"live": "", "filter": "GRUCell-hx", "dtype": "float64", "side": "linen", "key": "net", "inputs": "x.npy"}
VALUES |= {"platform": "tpu", "engine": "scan", "precision": "default", "json": "out.json", "report": "out.html"}


@pytest.fixture
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name in ((runner, "_judge"), (runner, "_compile"), (runner, "_model"), (runner.reference, "record")):
        monkeypatch.delattr(place, name)


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("task", runner.TASKS)
def test_options_that_a_task_does_not_read(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["no such.pt"] if task == "--model" else []
    assert set.union(*runner.TASKS.values()) == set(VALUES)
    for name in VALUES.keys() - runner.TASKS[task]:
        with pytest.raises(SystemExit) as stopped:
            runner.main([task, *model, f"--{name}", *filter(None, [VALUES[name]])])
        assert stopped.value.code == 2
        assert re.search(f"--{name} goes with .*, not with {task}", capsys.readouterr().err)


@pytest.mark.usefixtures("_nothing_runs")
def test_options_are_those_that_some_task_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    added: list[str] = []
    add = argparse.ArgumentParser.add_argument

    def noting(self: argparse.ArgumentParser, *names: Any, **settings: Any) -> argparse.Action:
        added.append(names[0])
        return add(self, *names, **settings)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", noting)
    with pytest.raises(SystemExit):
        runner.main(["--inputs", "no such.npy"])
    assert "--inputs goes with --model, not with compare, the default" in capsys.readouterr().err
    options = {name.removeprefix("--") for name in added if name.startswith("--")} - {"model", "compile-only"}
    assert options == set(VALUES)


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize(
    "tasks", [["record", "--model", "a.pt"], ["record", "--compile-only"], ["--model", "a.pt", "--compile-only"]]
)
def test_two_tasks(tasks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        runner.main(tasks)
    assert stopped.value.code == 2
    assert "cannot be combined: give one of them" in capsys.readouterr().err


@pytest.mark.torch
def test_the_runner_with_a_live_torch(torch: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--live", "--filter", "LSTMCell-nobias-unbatched-hx"]) == 0
    assert f"torch {torch.__version__} (live)" in capsys.readouterr().out
