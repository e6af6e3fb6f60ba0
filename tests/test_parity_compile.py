"""Compiling for a TPU that is not there: what is chosen, and what is said. The compiling itself wants libtpu."""

import pytest
from rich.console import Console

from parity import __main__ as runner
from parity import compile
from parity.cases import CASES
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
    for dtype in ("float32", "bfloat16", "float16"):
        wanted = {name.rpartition("-seed")[0] or name for name, case in CASES.items() if dtype in case.dtypes}
        assert {name.rpartition("-seed")[0] or name for name, found in names if found == dtype} == wanted
    assert compile.programs(CASES.values(), ["bfloat16"]) == [entry for entry in chosen if entry[1] == "bfloat16"]


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    good = compile.Program("GRU in float32, forward", 12, 3456)
    assert compile.show([good], Console(width=100)) == 0
    printed = capsys.readouterr().out
    assert "12 bytes" in printed
    assert "3,456" in printed
    assert "1 programs, forward and training, all compile" in printed
    bad = compile.Program("LSTM in float32, training", problem="NotImplementedError: tanh")
    assert compile.show([good, bad], Console(width=100)) == 1
    printed = capsys.readouterr().out
    assert "FAIL LSTM in float32, training: NotImplementedError: tanh" in printed
    assert "do not all compile" in printed


def test_only_for_a_tpu() -> None:
    with pytest.raises(SystemExit) as stopped:
        runner.main(["--compile-only"])
    assert stopped.value.code == 2


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(compile.topologies, "get_topology_desc", refuse)
    with pytest.raises(SystemExit, match=r"cannot describe a TPU .*no libtpu"):
        compile.compile_all([], lambda: None)
