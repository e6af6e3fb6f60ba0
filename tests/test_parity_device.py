"""The report on a device, with a CPU as the device."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import pytest

from parity.timing import device
from parity.timing.device import Section


def _module(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(f"import json, sys, time\n{text}\n")
    return name


def test_one_section_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    good = "print('a <table>'); json.dump({'ms': 1.5}, open(sys.argv[-1], 'w'))"
    sections = [
        Section("first", [_module(tmp_path, "good", good)], 1, judges=True),
        Section("breaks", [_module(tmp_path, "bad", "raise MemoryError('out of memory')")], 1),
        Section("last", ["good"], 1),
    ]
    out = tmp_path / "new" / "report.json"
    assert device.write(out, 300, sections) == 0
    found = {each["section"]: each for each in json.loads(out.read_text())}
    assert [each["result"].split()[0] for each in found.values()] == ["done", "ended", "done"]
    assert found["first"]["figures"] == found["last"]["figures"] == {"ms": 1.5}
    page = out.with_suffix(".html").read_text()
    assert "a &lt;table&gt;" in page
    assert "MemoryError: out of memory" in page
    assert not re.search("src=|href=", page)  # nothing is loaded


@pytest.mark.slow
def test_one_section_that_hangs_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    hangs = _module(tmp_path, "slow", "print('begun', flush=True); time.sleep(300)")
    sections = [Section("hangs", [hangs], 1), Section("last", [_module(tmp_path, "good", "print('ended')")], 9)]
    assert device.write(tmp_path / "report", 100, sections) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert [each["printed"] for each in found] == ["begun\n", "ended\n"]
    assert found[0]["result"] == "stopped after its 10 seconds: what it had until then"


def test_parity_that_fails_fails_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sections = [Section("parity", [_module(tmp_path, "off", "sys.exit(1)")], 1, judges=True)]
    assert device.write(tmp_path / "report", 300, sections) == 1


def test_the_sections_are_commands_that_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for section in device.SECTIONS:
        assert importlib.util.find_spec(section.arguments[0])
    out = tmp_path / "environment.json"
    assert device.main(["environment", str(out)]) == 0
    assert json.loads(out.read_text())["jax"] == jax.__version__
    assert f"jax: {jax.__version__}" in capsys.readouterr().out
    assert all(section.share > 0 for section in device.SECTIONS)
    assert sum(section.judges for section in device.SECTIONS) == 2


def test_what_cannot_be_profiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def profiled(implementation: object, *others: object) -> dict[str, str]:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(device, "_profiled", profiled)
    found = device.profile(["small GRU"])
    assert {each["side"] for each in found} == {"jaxrnn", "flax.nnx"}
    assert {each["problem"] for each in found} == {"RuntimeError: no profiler"}


def test_a_cpu_launches_nothing() -> None:
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        [ours, theirs] = device.profile(["small GRU"])
    assert ours["events"] == "a CPU launches nothing"
    assert ours["wall ms"] > 0
    assert (ours["form"], theirs["side"]) == ("jaxrnn.GRU", "flax.nnx")
