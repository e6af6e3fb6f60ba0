"""The report as a file: it needs nothing beside itself, and everything that was found is in it."""

import base64
import html.parser
import json
import re
import types
import xml.etree.ElementTree as xml
from pathlib import Path

import jax
import numpy as np
import pytest
from comparing import assert_close

from parity import __main__ as runner
from parity import compare, sides
from parity import html as html_of
from parity.cases import CASES, KINDS, Case, NamedArrays
from parity.compare import largest
from parity.reference import ULPS, Recorded, over_time, truth_of, ulps
from parity.report import Report

RECORDED = Recorded()


class Page(html.parser.HTMLParser):
    """What an HTML file shows, and what it asks for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = ""
        self.pictures: list[bytes] = []
        self.tags: set[str] = set()
        self.elsewhere: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attributes:
            kind, _, data = (value or "").partition(";base64,")
            if name == "src" and kind == "data:image/svg+xml":
                self.pictures.append(base64.b64decode(data, validate=True))
            elif name in ("src", "href", "srcset", "data", "action", "background") or name.startswith("on"):
                self.elsewhere.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.elsewhere += re.findall(r"url\(.*?\)|@import.*", data)
        elif self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.text += data


def _recorded(case: Case, dtype: str) -> NamedArrays:
    """A side that compiles nothing: torch's own results, with some rounding."""
    truth = truth_of(case, RECORDED(case))
    assert truth is not None
    return {name: (array * (1 + 1e-7 * (dtype == "float32"))).astype(dtype) for name, array in truth.items()}


def _texts(picture: bytes) -> list[str]:
    return ["".join(element.itertext()) for element in xml.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("red", [False, True], ids=["green", "red"])
def test_a_report_is_complete_and_needs_nothing_beside_itself(
    red: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def side(case: Case, dtype: str) -> NamedArrays:
        arrays = _recorded(case, dtype)
        if red and case.kind == "GRU":
            arrays["output"] = np.flip(arrays["output"])
        return arrays

    monkeypatch.setitem(sides.SIDES, "jaxrnn", side)
    page_path, data_path = tmp_path / "out & about.html", tmp_path / "out.json"
    command = ["--filter", "layers2-bidirectional-hx", "--report", str(page_path), "--json", str(data_path)]
    assert runner.main(command) == int(red)
    page, data = Page(page_path), json.loads(data_path.read_text())

    assert page.open == []
    assert not page.elsewhere
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    for picture in page.pictures:
        for element in xml.fromstring(picture).iter():
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#"), value
                assert "url(" not in value or "url(#" in value, value

    assert data["passed"] is not red
    assert ("Passed." if not red else "FAILED.") in page.text
    assert data["verdict"] in page.text
    for name, value in data["environment"].items():
        assert f"{name} {value}" in page.text
    assert f"python -m parity --filter layers2-bidirectional-hx --report '{page_path}'" in page.text
    assert "These are not all cases" in page.text
    assert len(data["failures"]) == (4 if red else 0)
    assert list(data["places"]) == (["GRU-layers2-bidirectional-hx"] if red else [])
    for name, words in (*data["failures"].items(), *data["places"].items()):
        assert f"{name} {words}" in page.text
    for row in data["rows"]:
        numbers = [f"{row['count']:,}"] + [f"{row[n]:.1e}" for n in ("float64", "worst", "rms") if row[n] is not None]
        assert f"{row['quantity']} {' '.join(numbers)}" in page.text

    # A picture of the errors in either dtype, with torch's beside ours in float32, and of the failure over time.
    assert len(page.pictures) == 2 + red
    *drift, double, single = map(_texts, page.pictures)
    kinds = {histogram["kind"] for histogram in data["histograms"]}
    assert kinds == {case.kind for case in CASES.values() if "layers2-bidirectional-hx" in case.name}
    for kind in kinds:
        assert any(text.startswith(f"{kind}, ") for text in double)
        assert any(text.startswith(f"{kind}, ") for text in single)
    assert "torch" in single
    assert "torch" not in double
    assert not red or "GRU-layers2-bidirectional-hx in float64" in drift[0]
    assert ("Errors over time" in page.headings) is red


def test_a_report_of_a_model_has_no_words_on_the_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sides.SIDES, "jaxrnn", _recorded)
    path, name = tmp_path / "out.html", "GRU-layers2-bidirectional-hx"
    case = CASES[name]
    outcome = compare.compare(case, RECORDED(case), _recorded, ["float64"])
    found = Report.of("jaxrnn", [outcome], [], "torch")
    found.drift = {f"{name} in float64": {"jaxrnn": [1e-16, 2e-16]}}
    html_of.write(path, found, "python -m parity --model a.pt", "model")
    page = Page(path)
    assert "Errors over time" in page.headings
    assert "Every kind and quantity, in float64" in page.headings
    for words in ("long sequences", "float32", "large cases", "not all cases", "rms ratio"):
        assert words not in page.text
    assert "At most 1e-12 counts as right in float64." in page.text
    assert "Each recurrent module of the checkpoint was run by itself." in page.text
    assert page.open == []


@pytest.mark.slow
def test_long_sequences_and_trainings_are_drawn(tmp_path: Path) -> None:
    page_path, data_path = tmp_path / "out.html", tmp_path / "out.json"
    for words, name, picture in (("RNN_TANH-long", "drift", 0), ("training-LSTM-adam", "training", 0)):
        assert runner.main(["--filter", words, "--report", str(page_path), "--json", str(data_path)]) == 0
        page, data = Page(page_path), json.loads(data_path.read_text())
        assert page.open == []
        assert any(words.removeprefix("training-") in text for text in _texts(page.pictures[picture]))
        if name == "drift":
            lines = data["drift"]["RNN_TANH-long in float32"]
            assert {line: len(values) for line, values in lines.items()} == {"jaxrnn": 64, "torch": 64}
            assert all(1e-9 < value < 1e-6 for values in lines.values() for value in values)
        else:
            torch, ours = data["training"][0]["curves"]
            assert len(torch) == len(ours) == 200
            assert max(abs(a - b) for a, b in zip(torch, ours, strict=True)) < 1e-9


def test_without_what_draws_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        runner.main(["--filter", "GRUCell-hx", "--report", "out.html"])
    assert stopped.value.code == 2
    assert "pip install 'jaxrnn[report]'" in capsys.readouterr().err


def test_units_in_the_last_place() -> None:
    truth = np.array([1.0, 1.0, 1.0, 1.0, -3.0, 0.0, 0.0, 1e-30, 3.25, 1.0])
    eps = 2.0**-23
    off = np.array([0.0, 0.5 * eps, 0.51 * eps, 4 * eps, 4 * eps, 0.0, 1e-3, 1e-30 * eps, 2 * eps, np.nan])
    counts = ulps(truth + off, truth, "float32")
    assert counts.sum() == truth.size
    found = {limit: count for limit, count in zip(ULPS, counts, strict=False) if count}
    assert found == {0.5: 3, 1.0: 2, 2.0: 2, 4.0: 1}
    assert counts[-1] == 2  # something where zero should be, and NaN
    assert ulps(np.array([1e-12]), np.zeros(1), "float64")[-1] == 1  # however little
    assert ulps(np.array([1 + 2.0**-7]), np.ones(1), "bfloat16").argmax() == ULPS.index(1.0)
    assert ulps(np.array([1 + 2.0**-9]), np.ones(1), "float16").argmax() == ULPS.index(2.0)


@pytest.mark.parametrize("name", ["GRU-layers1-hx", "GRU-layers1-batch_first-unbatched-hx", "GRU-layers1-batch_first"])
def test_the_error_over_time_is_of_the_right_axis(name: str) -> None:
    case = CASES[name]
    truth = np.random.RandomState(0).standard_normal(case.measured()["output"])
    noise = np.zeros_like(truth)
    axis = 1 if name.endswith("batch_first") else 0
    np.moveaxis(noise, axis, 0)[3] = 0.25
    found = over_time(case, truth + noise, truth)
    assert found.shape == (5,)
    assert_close(found, np.array([0, 0, 0, 0.25 / np.sqrt(np.mean(truth**2)), 0]), atol=1e-15)


def test_products_that_are_not_float32s_are_judged_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    case, relu = CASES["GRU-layers2-bidirectional-hx"], CASES["RNN_RELU-layers2-bidirectional-hx"]
    strict = largest(case, "float32"), largest(case, "float64")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (largest(case, "float32"), largest(case, "float64")) == strict  # precision is highest
    jax.config.update("jax_default_matmul_precision", "default")
    assert largest(relu, "float32") > largest(case, "float32") > 1000 * strict[0]
    assert largest(case, "float64") == strict[1]

    row = compare.Row("GRU", "float32", "output", inexact=20_000, rms=1e-3, torch_rms=1e-7)
    assert not row.failure()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")  # where they are float32's after all
    assert row.failure()
    assert largest(case, "float32") == strict[0]


@pytest.mark.parametrize("chosen", [pytest.param("highest", marks=pytest.mark.slow), "default"])
def test_the_precision_reaches_the_products(
    chosen: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = set()

    def side(case: Case, dtype: str) -> NamedArrays:
        arrays = sides.run_jaxrnn(case, dtype)
        seen.add(sides.precision())
        return arrays

    monkeypatch.setitem(sides.SIDES, "jaxrnn", side)
    assert runner.main(["--filter", "GRUCell-hx-second", "--precision", chosen]) == 0
    assert seen == {chosen}
    assert f"precision {chosen}" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_line_for_each_group_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def side(case: Case, dtype: str) -> NamedArrays:
        arrays = _recorded(case, dtype)
        return {name: array + (case.kind == "LSTM") for name, array in arrays.items()}

    monkeypatch.setitem(sides.SIDES, "jaxrnn", side)
    assert runner.main(["--filter", "layers2-hx", "--dtype", "float64"]) == 1
    lines = capsys.readouterr().err.splitlines()
    for kind in ("RNN_TANH", "RNN_RELU", "LSTM_PROJ", "GRU"):
        (line,) = [line for line in lines if line.startswith(f"{kind}: ")]
        assert "at most 0.0e+00 off in float64" in line
    (line,) = [line for line in lines if line.startswith("LSTM: ")]
    assert re.fullmatch(r"LSTM: (\d+) of \1 cases failed, the first is LSTM-layers2-hx", line)


@pytest.mark.torch
def test_second_order_is_a_live_torchs(torch: types.ModuleType) -> None:
    cases = [case for case in CASES.values() if case.second]
    assert {case.kind for case in cases} == set(KINDS)
    assert any(case.lengths for case in cases)
    case = CASES["LSTM_PROJ-layers2-bidirectional-hx-lengths-second"]
    found, truth = sides.run_torch(case, "float64"), truth_of(case, RECORDED(case))
    assert truth is not None
    orders = {name.partition(".")[2] for name in truth}
    assert orders == {"", "grad", "jvp", "hvp"}
    assert_close(found, truth, atol=1e-13)
    for name, array in truth.items():
        assert np.abs(array).max() > 1e-3, name  # a derivative of nothing would be equal to anything
