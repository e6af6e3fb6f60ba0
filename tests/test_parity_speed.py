"""The timing program: what it times is the same network on every side, and its arithmetic. No time is asserted."""

import collections
import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types
import xml.etree.ElementTree as xml
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from jax.experimental import rnn as cudnn
from rich.console import Console

from jaxrnn.engines.cudnn import CuDNN
from parity.timing import __main__ as timings
from parity.timing import speed, sweep
from parity.timing.speed import Results, Timed, Turn
from parity.timing.workloads import WORKLOADS, Torch, Workload, implementations, to_keras

TINY = [
    Workload("ragged", "LSTM", 4, 7, 3, 5, bidirectional=True, ragged=True),
    Workload("gated", "GRU", 4, 7, 3, 5),
    Workload("layers", "RNN", 4, 7, 3, 5, num_layers=2, bidirectional=True, nonlinearity="relu"),
    Workload("projected", "LSTM", 4, 7, 3, 5, proj_size=2),
]
RESET = Workload("reset", "GRU", 16, 20, 3, 5, reset=True)
DEEP = [Workload(f"deep {k}", k, 4, 7, 3, 5, 2, bidirectional=True, ragged=True) for k in ("LSTM", "GRU", "RNN")]
FEW = [TINY[1], TINY[3], *DEEP]
ROOT = Path(__file__).parents[1]


def _few_of(workloads: list[Workload], *quick: Workload) -> list:
    return [pytest.param(w, id=w.name, marks=() if w in quick else pytest.mark.slow) for w in workloads]


def _timed(workload: str, side: str, *times: float, program: str = "training", form: str = "") -> Timed:
    return Timed(workload, program, side, form, operations=6_000_000, times=list(times))


def test_every_workload_is_in_the_table() -> None:
    def sizes(kinds: str, *sizes: int, **more: Any) -> list[tuple]:
        return [Workload("", kind, *sizes, **more)[1:] for kind in kinds.split()]

    wanted = [
        *sizes("LSTM", 16, 400, 160, 320, num_layers=5, bidirectional=True),
        *sizes("LSTM", 20, 35, 650, 650, num_layers=2),
        *sizes("LSTM GRU", 64, 256, 512, 1024),
        *sizes("GRU", 128, 128, 64, 256),
        *sizes("GRU", 1024, 128, 64, 128, reset=True),
        *sizes("GRU", 4096, 32, 64, 128, reset=True),
        *sizes("LSTM GRU", 32, 100, 8, 32),
        *sizes("LSTM GRU", 256, 100, 32, 128, num_layers=2),
        *sizes("GRU", 1, 1000, 64, 128),
        *sizes("GRU", 1, 1, 64, 256),
        *sizes("GRU", 16, 4096, 256, 256),
        *sizes("LSTM", 32, 400, 160, 320, num_layers=2, bidirectional=True, ragged=True),
        *sizes("RNN", 32, 100, 128, 256, nonlinearity="relu"),
        *sizes("LSTM", 32, 200, 160, 512, proj_size=256),
        *sizes("LSTM GRU", 32, 100, 32, 128),
        *sizes("LSTM GRU", 16, 64, 256, 256),
        *sizes("minGRU", 32, 128, 256, 256),
        *sizes("minGRU", 8, 4096, 256, 256),
        *sizes("minGRU", 1, 65536, 256, 256),
    ]
    assert {workload[1:] for workload in WORKLOADS} == set(wanted)
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS) == len(wanted)
    quick = [workload for workload in WORKLOADS if workload.operations() < timings.SMALL]
    assert len(WORKLOADS) / 4 < len(quick) < len(WORKLOADS) / 2


def test_lengths_are_from_half_of_the_time_to_all_of_it() -> None:
    (workload,) = (workload for workload in WORKLOADS if workload.ragged)
    x, kwargs = workload.inputs()
    assert x.shape == (400, 32, 160)
    assert x.dtype == np.float32
    lengths = kwargs["lengths"]
    assert lengths.shape == (32,)
    assert lengths.min() >= 200
    assert lengths.max() <= 400


def test_one_step_in_fifty_is_reset() -> None:
    for workload in (workload for workload in WORKLOADS if workload.reset):
        reset = workload.kwargs()["reset"]
        assert reset.shape == (workload.time, workload.batch)
        assert reset.mean() == pytest.approx(0.02, rel=0.05)
    assert RESET.kwargs()["reset"].sum() > 2


def test_operations() -> None:
    first = 4 * 5 * (3 + 2) + 2 * 5  # four gates of 5 from 3 inputs and 2 projected states, projected to 2
    second = 4 * 5 * (2 * 2 + 2) + 2 * 5  # from both directions of the first layer
    both = Workload("", "LSTM", 4, 7, 3, 5, num_layers=2, bidirectional=True, proj_size=2)
    assert both.operations() == 2 * 4 * 7 * 2 * (first + second)
    assert Workload("", "GRU", 4, 7, 3, 5).operations() == 2 * 4 * 7 * 3 * 5 * (3 + 5)
    lengths = TINY[0].kwargs()["lengths"]
    whole = TINY[0]._replace(ragged=False).operations()
    assert TINY[0].operations() * 4 * 7 == whole * lengths.sum()  # what is padding is no work


def _sides_of_the_truth(workload: Workload, sides: Collection[str]) -> list[str]:
    """The side of each implementation, all of which give the exact outputs."""
    x, kwargs = workload.inputs()
    exact = speed.truth(workload)
    assert exact.dtype == np.float64
    names = []
    for each in implementations(workload, sides):
        outputs = jax.jit(each.run)(each.parameters, x, kwargs)
        assert outputs.dtype == np.float32
        assert_close({each.side: outputs}, {each.side: exact}, atol=1e-6, rtol=1e-7)
        names.append(each.side)
    return names


@pytest.mark.parametrize("workload", _few_of([*TINY, RESET], TINY[0], TINY[3], RESET))
def test_every_jax_side_computes_the_same(workload: Workload) -> None:
    sides = ["jaxrnn", "sharded", "flax.nnx", "flax.linen"]
    names = _sides_of_the_truth(workload, sides)
    assert set(names) == set(sides[: 2 if workload.proj_size else 4])  # Flax has no projection
    assert len(names) == {"ragged": 6, "projected": 2}.get(workload.name, 4)  # and two cells for an LSTM


def test_a_cell_of_ours_is_run_by_each_engine_and_by_no_library() -> None:
    workload = Workload("linear", "minGRU", 4, 7, 3, 5, bidirectional=True)
    names = _sides_of_the_truth(workload, [side for side in speed.SIDES if side not in ("graphs", "pallas", "cudnn")])
    assert names == ["jaxrnn", "sharded", "scan", "associative_scan"]
    assert list(speed.prepare(workload, ["keras", "torch"])) == []


def test_torch_and_keras_have_no_resets() -> None:
    assert list(speed.prepare(RESET, ["keras", "torch"])) == []


def test_an_engine_that_refuses_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    workload = next(each for each in TINY if each.proj_size)
    found = speed.measure(workload, ["jaxrnn", "pallas"], 5, 1.0, {"jaxrnn": 1.0, "pallas": 1.0})
    assert {(each.side, bool(each.problem)) for each in found} == {("jaxrnn", False), ("pallas", True)}
    speed.Results(found).show(Console(width=150), {"jaxrnn": 1.0})
    assert f"pallas does not run {workload.name}: engine='pallas' cannot run this" in capsys.readouterr().out


@pytest.mark.libraries
@pytest.mark.skipif(not importlib.util.find_spec("keras"), reason="Keras is not installed")
@pytest.mark.parametrize("workload", _few_of(FEW, TINY[1]))
def test_keras_computes_the_same(workload: Workload) -> None:
    x, kwargs = workload.inputs()
    found = {}
    for each in implementations(workload, ["jaxrnn", "keras"]):

        def loss(x: jax.Array, parameters: Any, run: Callable = each.run) -> tuple[jax.Array, jax.Array]:
            outputs = run(parameters, x, kwargs)
            return jnp.sum(outputs**2), outputs

        found[each.side] = jax.jit(jax.grad(loss, has_aux=True))(x, each.parameters)
    assert found.keys() == ({"jaxrnn"} if workload.proj_size else {"jaxrnn", "keras"})  # it has no projection
    for side, (by_x, outputs) in found.items():
        assert_close({side: outputs}, {side: speed.truth(workload)}, atol=1e-6, rtol=1e-7)
        assert_close({f"gradient of {side}": by_x}, {f"gradient of {side}": found["jaxrnn"][0]}, atol=1e-5)


@pytest.mark.parametrize("workload", _few_of(FEW, TINY[1]))
def test_cudnn_computes_the_same(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """With JAX's reference in place of what only a GPU has."""

    def reference(x: Any, h: Any, c: Any, packed: Any, lengths: Any, *arguments: Any) -> Any:
        *sizes, dropout, bidirectional, _ = arguments
        assert packed.shape == (cudnn.get_num_params_in_lstm(*sizes, bidirectional),)
        weights = cudnn.unpack_lstm_weights(packed, *sizes, bidirectional)
        return cudnn.lstm_ref(x, h, c, *weights, lengths, *sizes, dropout, bidirectional)

    monkeypatch.setattr(CuDNN, "has_gpu", lambda _: True)
    monkeypatch.setattr(cudnn, "lstm", reference)
    there = workload.kind == "LSTM" and not workload.proj_size
    assert _sides_of_the_truth(workload, ["cudnn"]) == ["cudnn"] * there


def test_both_biases_reach_keras() -> None:
    """In the workloads the second is zero."""
    weights = {"weight_ih_l0": np.zeros((3, 1)), "weight_hh_l0": np.zeros((3, 1))}
    biases = {"bias_ih_l0": np.array([1, 2, 3]), "bias_hh_l0": np.array([40, 50, 60])}
    np.testing.assert_array_equal(to_keras("GRU", weights | biases)[2], [[2, 1, 3], [50, 40, 60]])
    weights["weight_hh_l0"] = np.zeros((3, 3))
    np.testing.assert_array_equal(to_keras("RNN", weights | biases)[2], [41, 52, 63])


@pytest.mark.torch
@pytest.mark.parametrize("workload", _few_of(FEW, TINY[1]))
def test_torch_computes_the_same(workload: Workload, torch: types.ModuleType) -> None:
    there = Torch(workload)
    assert_close({"output": there.inference().numpy()}, {"output": speed.truth(workload)}, atol=1e-6)
    x, kwargs = workload.inputs()
    each = next(implementations(workload, ["jaxrnn"]))
    loss, (by_parameters, by_x) = jax.jit(
        jax.value_and_grad(lambda parameters, x: jnp.sum(each.run(parameters, x, kwargs) ** 2), (0, 1))
    )(each.parameters, x)
    for _ in range(2):  # the second step's gradients are its own
        assert there.training().item() == pytest.approx(float(loss), rel=1e-5)
        assert_close({"x": there.x.grad.numpy()}, {"x": by_x}, atol=1e-5)
        found = {name: parameter.grad.numpy() for name, parameter in there.module.named_parameters()}
        assert_close(found, by_parameters, atol=1e-4)


def test_ratios_and_their_geometric_mean() -> None:
    found = [_timed("a", "jaxrnn", 1, 2, 9), _timed("a", "sharded", 1, 1, 1), _timed("b", "jaxrnn", 4)]
    found += [_timed("a", "flax.nnx", 16), _timed("b", "flax.nnx", 2), _timed("a", "torch", 3)]
    results = Results(found)
    assert results.ratio("a", "training", "flax.nnx") == 8  # one device beside one device
    assert results.ratio("a", "training", "torch") == 3  # all cores beside all cores
    assert results.ratio("b", "training", "torch") is None
    assert results.ratio("a", "inference", "torch") is None
    nnx, torch = results.summary()
    assert nnx == {"program": "training", "side": "flax.nnx", "mean": pytest.approx(2), "worst": 0.5, "in": "b"}
    assert torch == {"program": "training", "side": "torch", "mean": pytest.approx(3), "worst": 3, "in": "a"}
    assert found[0].gflops == 3  # 6 million in 2 ms


def test_memory_is_ours_over_theirs() -> None:
    memory = {("a", "jaxrnn"): 6.0, ("a", "flax.nnx"): 2.0, ("b", "jaxrnn"): 1.0, ("b", "flax.nnx"): 4.0}
    memory |= {("c", "jaxrnn"): 1.0, ("c", "flax.nnx"): 0.0}
    found = [dataclasses.replace(_timed(*key, 1.0), temporary_mb=value) for key, value in memory.items()]
    results = Results([*found, _timed("a", "torch", 1.0)])
    assert results.memory("b", "training", "flax.nnx") == 0.25
    assert results.memory("c", "training", "flax.nnx") is results.memory("a", "training", "torch") is None
    flax, torch = results.in_words()
    assert flax.endswith("at worst 1.00, in a; we take at most 3.00 times its memory, in a")
    assert "memory" not in torch


def test_all_take_turns_and_the_slower_implementation_no_more_than_two(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate(itertools.repeat(1.0))  # a second for each look at it
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    called: list[str] = []

    def turn(side: str, form: str, seconds: int) -> Turn:
        def call() -> None:
            called.append(form)
            for _ in range(seconds):
                speed.time.perf_counter()

        return _timed("a", side, form=form), call

    turns = [turn("jaxrnn", "ours", 20), turn("flax.nnx", "slow", 5), turn("flax.nnx", "fast", 2)]
    found = speed.take_turns(turns, repeats=7, seconds=1e9)
    assert collections.Counter(called) == {"ours": 7, "fast": 7, "slow": 2}
    assert set(called[:3]) == set(called[3:6]) == {"ours", "fast", "slow"}
    assert {timed.side: (timed.form, timed.ms) for timed in found} == {
        "jaxrnn": ("ours", 21000),
        "flax.nnx": ("fast", 3000),
    }
    called.clear()
    speed.take_turns(turns[:1], repeats=100, seconds=1)
    assert called == ["ours"] * speed.LEAST  # however long they take


def test_a_sweep_has_fewer_steps_where_it_is_large() -> None:
    found = {workload.name: workload for workload in sweep.workloads()}
    assert len(found) == len(sweep.KINDS) * len(sweep.UNITS) * len(sweep.ROWS)
    for workload in found.values():
        assert sweep.STEPS[1] <= workload.time <= sweep.STEPS[0]
        assert workload.operations() <= sweep.LARGE or workload.time == sweep.STEPS[1]
    small, large = found["GRU 128, 1 rows"], found["LSTM 512, 4,096 rows"]
    assert small[1:6] == ("GRU", 1, 64, 64, 128)
    assert large[1:6] == ("LSTM", 4096, 16, 256, 512)


def test_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(workload: Workload, sides: set[str], *others: Any) -> list[Timed]:
        assert sides == {"jaxrnn", "flax.nnx"}
        flax = {"inference": 2 * workload.batch, "training": workload.hidden_size / 10}
        both = [
            (program, *each) for program in flax for each in (("jaxrnn", 1.0, 3.0), ("flax.nnx", flax[program], 2.0))
        ]
        return [
            Timed(workload.name, program, side, "", 1, temporary_mb=memory, times=[ms])
            for program, side, ms, memory in both
        ]

    monkeypatch.setattr(sweep, "ROWS", (2, 1024))
    monkeypatch.setattr(sweep, "UNITS", (4, 8))
    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "product_rates", lambda sides: {})
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # too late in this process
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    assert timings.main(["--sweep", "--filter", "gru", "--json", str(out), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["GRU", "inference", "2", "4.00", "4.00", "1.50", "1.50"] in lines
    assert ["GRU", "training", "1,024", "0.40", "0.80", "1.50", "1.50"] in lines
    assert (
        "training: flax.nnx takes 0.57 times our time, at worst 0.40, in GRU 4, 2 rows; we take at most 1.5" in printed
    )
    found = json.loads(out.read_text())
    assert [each["batch"] for each in found["workloads"]] == [2, 1024, 2, 1024]
    assert [line["memory"] for line in found["summary"]] == [1.5, 1.5]
    texts = {element.text for element in xml.parse(picture).iter("{http://www.w3.org/2000/svg}text")}
    assert {"GRU, training", "4 hidden units", "1,024", "jaxrnn's memory / flax.nnx's"} <= texts


@pytest.mark.slow
def test_the_program_on_two_devices(tmp_path: Path) -> None:
    code = """
from parity.timing import __main__ as timings
from parity.timing.workloads import Workload
ragged = Workload("of three rows", "RNN", 3, 7, 3, 5, bidirectional=True, ragged=True)
timings.WORKLOADS = [Workload("tiny RNN", "RNN", 4, 7, 3, 5), ragged]
options = "--devices 2 --repeats 3 --sides sharded,flax.nnx,cudnn --json out.json --plot out.svg".split()
raise SystemExit(timings.main(options))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("tiny RNN") >= 2  # inference and training
    assert "training: flax.nnx takes" in run.stdout
    assert "Not available here: cudnn." in run.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert [workload["name"] for workload in found["workloads"]] == ["tiny RNN", "of three rows"]
    entries = {(entry["workload"], entry["program"], entry["side"]): entry for entry in found["results"]}
    sides = [("tiny RNN", side) for side in ("jaxrnn", "sharded", "flax.nnx")]
    sides += [("of three rows", side) for side in ("jaxrnn", "flax.nnx")]  # which two devices cannot share
    assert set(entries) == {(name, program, side) for name, side in sides for program in speed.PROGRAMS}
    for (_, program, _), entry in entries.items():
        assert len(entry["times"]) == 3
        assert entry["minimum_ms"] <= entry["ms"]
        assert min(entry["compile_s"], entry["temporary_mb"], entry["gflops"], entry["share"]) > 0
        if program == "inference":
            assert entry["error"] < 1e-6
    assert [(line["program"], line["side"]) for line in found["summary"]] == [
        ("training", "flax.nnx"),
        ("inference", "flax.nnx"),
    ]
    texts = {element.text for element in xml.parse(tmp_path / "out.svg").iter("{http://www.w3.org/2000/svg}text")}
    assert {"tiny RNN", "of three rows", "flax.nnx"} <= texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sides=haiku", "--sides has haiku"),
        ("--filter=CNN", "no workload"),
        ("--sweep --sides=sharded", "--sweep compares with one side: --sides has to name one of flax.nnx, flax.linen"),
    ],
)
def test_what_is_not_there_is_told(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # too late in this process
    with pytest.raises(SystemExit):
        timings.main(options.split())
    assert message in capsys.readouterr().err
