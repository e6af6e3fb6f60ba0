"""Compiling for a TPU that is not there: what is chosen, and what is said. The compiling itself wants libtpu."""

import itertools
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from rich.console import Console

from parity import __main__ as runner
from parity import compile
from parity.cases import CASES, LAYERS
from parity.compare import DTYPES


def test_every_shape_is_compiled_once() -> None:
    chosen = compile.programs(CASES.values(), DTYPES)
    names = {(case.name, dtype) for case, dtype in chosen}
    assert len(names) == len(chosen) < len(CASES)
    assert {dtype for _, dtype in chosen} == set(DTYPES)
    shapes = {name.rpartition("-seed")[0] for name, _ in names if "-seed" in name}
    assert shapes == {case.rpartition("-seed")[0] for case in CASES if "-seed" in case}
    exact = {case.kind for case, dtype in chosen if dtype == "float64"}
    assert exact == {case.kind for case in CASES.values()}  # a sample of each kind
    ragged = {(case.kind, case.way) for case, dtype in chosen if dtype == "float32" and case.way != "whole"}
    assert ragged == set(itertools.product(LAYERS, ("lengths", "packed", "sorted", "mask", "chunked", "steps")))
    for dtype in ("float32", "bfloat16", "float16"):
        wanted = {name.rpartition("-seed")[0] or name for name, case in CASES.items() if dtype in case.dtypes}
        found = {case.name for case, d in chosen if d == dtype and case.way == "whole"}
        assert {name.rpartition("-seed")[0] or name for name in found} == wanted
    assert compile.programs(CASES.values(), ["bfloat16"]) == [entry for entry in chosen if entry[1] == "bfloat16"]


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    good = compile.Program("GRU in float32, forward", 12, 3.5, 3_456_000)
    assert compile.show([good], Console(width=100)) == 0
    printed = capsys.readouterr().out
    assert "12 bytes" in printed
    assert "3,456" in printed
    assert "1 programs, forward and training, 0 of them" in printed
    assert "all devices, 0 with hidden units as well, all compile" in " ".join(printed.split())
    bad = compile.Program("LSTM in float32, training", problem="NotImplementedError: tanh")
    assert compile.show([good, bad], Console(width=100)) == 1
    printed = capsys.readouterr().out
    assert "FAIL LSTM in float32, training: NotImplementedError: tanh" in printed
    assert "do not all compile" in " ".join(printed.split())


def test_a_program_is_measured_and_what_it_exchanges_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["RNN_TANH-layers1-hx-lengths-unsorted"]
    mesh = Mesh(np.array(jax.devices()[:1]), "batch")
    program = compile._compile(case, "float32", "training", mesh)
    assert program.name == f"{case.name} in float32, training"
    assert program.operations > 5
    assert (program.collectives, program.problem) == (0, "")

    shared = Mesh(np.reshape(jax.devices()[:1], (1, 1)), ("batch", "model"))
    program = compile._compile(case, "float32", "training", shared)
    assert program.name == f"{case.name} in float32, training, sharing hidden units"
    assert (program.operations > 5, program.problem) == (True, "")

    both = types.SimpleNamespace(findall=lambda text: ["all-reduce", "all-gather"])
    monkeypatch.setattr(compile, "COLLECTIVE", both)
    program = compile._compile(case, "float32", "training", mesh)
    assert (program.collectives, program.problem) == (2, "training should not need all-gather")
    assert compile._compile(case, "float32", "forward", mesh).problem.endswith("all-gather, all-reduce")


def test_collectives_are_counted_once_each() -> None:
    text = """
      %all-reduce.3 = (f32[3]{0}, f32[4]{0}) all-reduce(%a, %b), replica_groups={}
      %ag-start = (f32[3], f32[12]) all-gather-start(%a), dimensions={0}
      %ag-done = f32[12] all-gather-done(%ag-start)
      %p = f32[3] collective-permute(%a), source_target_pairs={{0,1}}
      ROOT %fusion = f32[3] fusion(%all-reduce.3), calls=%c
    """
    assert compile.COLLECTIVE.findall(text) == ["all-reduce", "all-gather", "collective-permute"]


def test_only_for_a_tpu() -> None:
    with pytest.raises(SystemExit) as stopped:
        runner.main(["--compile-only"])
    assert stopped.value.code == 2


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no libtpu")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(SystemExit, match=r"the compiler for v5e does not start .*no libtpu"):
        list(compile.compile_all([]))
