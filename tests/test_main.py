"""The command line: what it prints and writes, its exit codes, and that a refusal leaves nothing behind."""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from arrays import parameters

import jaxrnn
import parity
from jaxrnn import checkpoint
from jaxrnn.__main__ import main
from jaxrnn.checkpoint import check
from parity import __main__ as runner
from parity.timing import __main__ as timings
from parity.timing import speed

LSTM = jaxrnn.Spec(jaxrnn.LSTM_CELL, 10, 20, num_layers=2, bidirectional=True, proj_size=5)
CELL = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 3, 4, bias=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of two recurrent modules and a head."""
    tensors = {f"encoder.{name}": value for name, value in parameters(LSTM, np.float32).items()}
    tensors |= {f"cell.{name}": value for name, value in parameters(CELL, jnp.bfloat16).items()}
    tensors["head.weight"] = np.ones((2, 10), np.float32)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, tensors)
    return path


def test_inspect_lists_every_recurrent_module(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    count = sum(int(np.prod(shape)) for shape in LSTM.shapes().values())
    assert rows["encoder."] == ["LSTM", "10", "20", "2", "yes", "yes", "5", "float32", f"{count:,}"]
    assert rows["cell."] == ["GRUCell", "3", "4", "1", "no", "no", "no", "bfloat16", "84"]
    assert lines[-1] == "Assumed, because the file does not say it: batch_first=False, dropout=0.0"


def test_convert_takes_a_module_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "encoder.safetensors"
    assert main(["convert", str(model), str(out), "--prefix", "encoder."]) == 0
    assert f"{len(LSTM.shapes())} tensors" in capsys.readouterr().out
    before, after = checkpoint.load(model), checkpoint.load(out)
    assert after.keys() == LSTM.shapes().keys()
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[f"encoder.{name}"])
    assert [path.name for path in tmp_path.iterdir() if path not in (model, out)] == []


def test_convert_without_prefix_takes_everything(model: Path, tmp_path: Path) -> None:
    assert main(["convert", str(model), str(tmp_path / "all.safetensors")]) == 0
    before, after = checkpoint.load(model), checkpoint.load(tmp_path / "all.safetensors")
    assert {name: value.tobytes() for name, value in before.items()} == {n: v.tobytes() for n, v in after.items()}


def _unwrapped(text: str) -> str:
    """What was wrapped, where the paths in it, of any length, happen to end a line."""
    return text.replace("\n  ", " ")


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return _unwrapped(output.err)


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_file_that_is_no_checkpoint(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, out = tmp_path / "page.pt", tmp_path / "out.safetensors"
    bad.write_text("<!DOCTYPE html><html></html>")
    message = _refused([command, str(bad), *([str(out)] if command == "convert" else [])], capsys)
    assert message.startswith(str(bad))
    assert "HTML" in message
    assert list(tmp_path.iterdir()) == [bad]
    assert "missing.pt" in _refused(
        [command, str(tmp_path / "missing.pt"), *([str(out)] * (command == "convert"))], capsys
    )


def test_an_existing_output_is_kept_unless_forced(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    assert "exists already" in _refused(["convert", str(model), str(out)], capsys)
    assert "no key starts with 'nobody.'" in _refused(
        ["convert", str(model), str(out), "--prefix", "nobody.", "--force"], capsys
    )
    assert out.read_bytes() == b"mine"
    assert main(["convert", str(model), str(out), "--force"]) == 0
    assert checkpoint.load(out).keys() == checkpoint.load(model).keys()


def test_a_file_without_recurrent_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "head.safetensors"
    checkpoint.save(path, {"head.weight": np.ones(3)})
    message = _refused(["inspect", str(path)], capsys)
    assert "no recurrent weights" in message
    assert "head.weight" in message


def test_the_module_runs_as_a_program(model: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "jaxrnn", "inspect", str(model)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "encoder." in run.stdout


@pytest.mark.torch
def test_nested_and_raw_weights_when_asked(
    torch: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {f"rnn.{name}": torch.tensor(value) for name, value in parameters(LSTM).items()}
    tensors["rnn.weight_hh_l0_raw"] = tensors.pop("rnn.weight_hh_l0")
    path, out = tmp_path / "model.pt", str(tmp_path / "out.safetensors")
    torch.save({"trainer": {"ema": tensors}}, path)
    assert main(["inspect", str(path)]) == 2
    assert "say which dict to read: key='trainer.ema', on the command line --key trainer.ema" in _unwrapped(
        capsys.readouterr().err
    )
    assert main(["inspect", str(path), "--key", "trainer.ema"]) == 2
    assert "rnn.weight_hh_l0 is missing" in _unwrapped(capsys.readouterr().err)
    assert main(["inspect", str(path), "--key", "trainer.ema", "--raw"]) == 0
    assert main(["convert", str(path), out, "--key", "trainer.ema", "--raw", "--prefix", "rnn"]) == 2
    assert "the prefix 'rnn' should end in a dot" in _unwrapped(capsys.readouterr().err)
    assert main(["convert", str(path), out, "--key", "trainer.ema", "--raw", "--prefix", "rnn."]) == 0
    assert checkpoint.load(out).keys() == LSTM.shapes().keys()


def test_inspect_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--json"]) == 0
    encoder, cell = json.loads(capsys.readouterr().out)
    assert (encoder["prefix"], encoder["kind"], encoder["proj_size"]) == ("encoder.", "LSTM", 5)
    assert encoder["assumed"] == {"batch_first": False, "dropout": 0.0}
    assert (cell["kind"], cell["dtype"], cell["bias"], cell["num_parameters"]) == ("GRUCell", "bfloat16", False, 84)


def test_convert_chooses_renames_and_casts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    chosen = ["--only-rnn", "--rename", "cell.=c.", "--rename", "encoder.=", "--dtype", "float16"]
    assert main(["convert", str(model), str(out), *chosen]) == 0
    capsys.readouterr()
    before, after = checkpoint.load(model), checkpoint.load(out)
    assert after.keys() == {*LSTM.shapes(), *(f"c.{name}" for name in CELL.shapes())}
    assert {value.dtype.name for value in after.values()} == {"float16"}
    np.testing.assert_array_equal(after["weight_hh_l0"], before["encoder.weight_hh_l0"].astype(np.float16))
    for wrong, message in {
        "--rename=cell.": "it should be A=B",
        "--rename=nobody=x": "no key starts with 'nobody'",
        "--rename=cell.weight_hh=cell.weight_ih": "two keys would have the same name",
    }.items():
        assert message in _refused(["convert", str(model), str(tmp_path / "b.pt"), wrong], capsys)
    checkpoint.save(model, {"large": np.array([1e5]), "count": np.array([10**6])})
    assert "large has numbers too large for float16" in _refused(
        ["convert", str(model), str(tmp_path / "b.pt"), "--dtype", "float16"], capsys
    )
    assert main(["convert", str(model), str(tmp_path / "b.pt"), "--dtype", "bfloat16"]) == 0
    assert {value.dtype.name for value in checkpoint.load(tmp_path / "b.pt").values()} == {"bfloat16", "int64"}


def test_diff(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.pt"
    assert main(["convert", str(model), str(other)]) == 0
    assert main(["diff", str(model), str(other)]) == 0
    tensors = checkpoint.load(model)
    assert f"all {len(tensors)} tensors are equal" in capsys.readouterr().out
    changed = tensors["encoder.weight_hh_l0"].copy()
    changed[0, :2] += np.float32([0.5, np.nan])
    kept = {**tensors, "encoder.weight_hh_l0": changed, "new": np.ones(1), "head.weight": np.ones(3, np.float32)}
    kept["cell.weight_ih"] = kept["cell.weight_ih"].astype(np.float32)
    del kept["encoder.bias_ih_l0"]
    checkpoint.save(other, kept)
    assert main(["diff", str(model), str(other)]) == 1
    lines = capsys.readouterr().out
    for line in (
        "encoder.weight_hh_l0: 2 of 400 numbers differ, by 0.5 at most, 1 of them NaN in",
        "encoder.bias_ih_l0: only in A",
        "new: only in B",
        "head.weight: shape (2, 10) in A, (3,) in B",
        "cell.weight_ih: dtype bfloat16 in A, float32 in B",
        f"5 of {len(tensors) + 1} tensors differ",
    ):
        assert line in lines
    assert main(["diff", str(other), str(other), "--json"]) == 0  # NaN is equal to NaN
    assert json.loads(capsys.readouterr().out) == {"equal": True, "tensors": len(kept), "differences": {}}
    changed[0, 1] = tensors["encoder.weight_hh_l0"][0, 1]
    checkpoint.save(other, {**tensors, "encoder.weight_hh_l0": changed})
    assert main(["diff", str(model), str(other), "--json"]) == 1
    [difference] = json.loads(capsys.readouterr().out)["differences"].values()
    assert difference == "1 of 400 numbers differ, by 0.5 at most"
    assert _refused(["diff", str(model), str(tmp_path / "missing.pt")], capsys)


def test_check(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        assert main(["check", str(model)]) == 0
    lines = capsys.readouterr().out
    assert "2 recurrent modules built and run in float64." in lines
    assert "PyTorch is not installed: nothing to compare with." in lines
    assert "not compared" in lines
    assert "batch_first=False" in lines
    different = check.Checked(True, 1e-3)
    monkeypatch.setattr("jaxrnn.__main__.check", lambda rnn, tensors, torch, run_code: different)
    assert main(["check", str(model), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["equal"]
    assert [module["difference"] for module in result["modules"]] == [1e-3, 1e-3]
    assert [module["kind"] for module in result["modules"]] == ["LSTM", "GRUCell"]


@pytest.mark.torch
def test_check_against_torch(torch: types.ModuleType, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(model)]) == 0
    lines = capsys.readouterr().out
    assert max(map(len, lines.splitlines())) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in lines.splitlines() if line.strip()}
    assert rows["encoder."][0::3] == ["LSTM", "equal"]
    assert rows["encoder."][4] == "torch.nn.LSTM"
    assert float(rows["cell."][2]) < 1e-14
    assert f"PyTorch is {torch.__version__}." in lines


def test_orbax_there_and_back(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, back = tmp_path / "model.orbax", tmp_path / "back.safetensors"
    assert main(["convert", str(model), str(out), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["out"], written["tensors"]) == (str(out), len(checkpoint.load(model)))
    assert "exists already" in _refused(["convert", str(model), str(out)], capsys)
    assert main(["convert", str(model), str(out), "--force"]) == 0
    assert main(["convert", str(out), str(back)]) == 0
    assert main(["diff", str(model), str(back)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "model.orbax", "back.safetensors"}


def test_numbers_that_are_not_finite_are_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = checkpoint.load(model)
    assert main(["inspect", str(model)]) == 0
    assert capsys.readouterr().err == ""
    tensors["encoder.bias_ih_l0"][3] = -np.inf
    checkpoint.save(model, tensors)
    for command in ("inspect", "check"):
        assert main([command, str(model)]) == 0
        message = _unwrapped(capsys.readouterr().err)
        assert message == f"warning: {model}: NaN or infinite numbers in encoder.bias_ih_l0\n"


def test_no_prefix_is_split_over_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piped, a line is as long as it has to be; on a narrow terminal, each field has its own."""
    prefix = "encoder." * 20
    params = parameters(jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4), np.float32)
    checkpoint.save(tmp_path / "a.safetensors", {prefix + name: value for name, value in params.items()})
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("enc")]
    assert line.split() == [prefix, "GRU", "3", "4", "1", "no", "yes", "no", "float32", "108"]
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    assert f"prefix: {prefix}\nkind: GRU\ninput: 3\n" in capsys.readouterr().out


def test_a_progress_bar_on_a_terminal(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main_module = sys.modules["jaxrnn.__main__"]
    shown = []

    class Terminal(main_module.Console):
        def __init__(self, **settings: object) -> None:
            super().__init__(file=io.StringIO(), force_terminal=True, width=100)
            shown.append(self.file)

    monkeypatch.setattr(main_module, "LARGE", 1)
    monkeypatch.setattr(main_module, "Console", Terminal)
    assert main(["convert", str(model), str(tmp_path / "out.pt")]) == 0
    reading, writing = (file.getvalue() for file in shown)
    total = sum(value.nbytes for value in checkpoint.load(model).values())
    assert f"reading {model.name}" in reading
    assert f"{2 * total / 1000:.1f} kB" in writing
    monkeypatch.setattr(main_module, "LARGE", 10**9)
    shown.clear()
    assert main(["convert", str(model), str(tmp_path / "other.pt")]) == 0
    assert [file.getvalue() for file in shown] == ["", ""]


def test_diff_of_a_nested_file_and_of_large_integers(
    torch: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = torch.tensor([2**53, 7])
    torch.save({"net": {"count": numbers, "on": torch.tensor([True, False])}}, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.orbax"), "--key", "net"]) == 0
    assert main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.orbax"), "--key", "net"]) == 0
    numbers[0] += 1
    torch.save({"net": {"count": numbers, "on": torch.tensor([True, True])}}, tmp_path / "c.pt")
    capsys.readouterr()
    arguments = ["diff", str(tmp_path / "a.pt"), str(tmp_path / "c.pt"), "--key", "net", "--other-key", "net"]
    assert main(arguments) == 1
    assert capsys.readouterr().out.splitlines() == [
        "count: 1 of 2 numbers differ, by 1 at most",
        "on: 1 of 2 numbers differ, by 1 at most",
        "2 of 2 tensors differ",
    ]


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clone's parity suite where an installed package has it."""
    monkeypatch.setitem(sys.modules, "jaxrnn.parity", parity)
    monkeypatch.setitem(sys.modules, "jaxrnn.parity.__main__", runner)
    monkeypatch.setitem(sys.modules, "jaxrnn.parity.timing.__main__", timings)


def test_without_arguments_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = {line.split()[0] for line in lines if line.startswith("    ") and line[4] != " "}
    assert commands == {"inspect", "scaffold", "convert", "diff", "check", "parity", "speed"}


COMMANDS = ["", "inspect", "convert", "diff", "check"]


def test_each_help_shows_examples_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(Path(__file__).parents[1] / "examples")
    examples: dict[str, None] = {}
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        shown = capsys.readouterr().out.partition("\nexamples:\n")[2].splitlines()
        assert len(shown) == 2
        assert all(line.startswith(f"  jaxrnn {command}") for line in shown)
        examples |= dict.fromkeys(shown)
    for line in examples:
        expected = 1 if "highlighter" in line else 0  # which differs
        assert main(line.split()[1:]) == expected, line


@pytest.mark.usefixtures("suite")
def test_the_suites_examples_are_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("_judge", "_model"):
        monkeypatch.setattr(runner, name, lambda *_: 0)
    monkeypatch.setattr(timings.jax.config, "update", lambda *_: None)  # in other tests' process, too late
    monkeypatch.setattr(speed, "product_rates", lambda sides: sys.exit("understood"))
    for command in ("parity", "speed"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = capsys.readouterr().out.partition("\nexamples:\n")[2].splitlines()
        assert len(lines) == {"parity": 2, "speed": 3}[command]
        for line in lines:
            if command == "parity":
                assert main(line.split()[1:]) == 0
            else:
                with pytest.raises(SystemExit, match="understood"):
                    main(line.split()[1:])


def test_what_was_taken_of_a_nested_file_is_told(
    torch: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: torch.tensor(value) for name, value in parameters(CELL).items()}
    path, out = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"model": tensors, "optimizer": {"lr": 0.1}, "epoch": 3}, path)
    told = f"note: {path}: took the tensors under 'model', and left out optimizer, epoch\n"
    for command in (["inspect", str(path)], ["convert", str(path), str(out)], ["inspect", str(path), "--key", "model"]):
        assert main(command) == 0
        assert _unwrapped(capsys.readouterr().err) == told
    torch.save({"runs": [{"net": tensors | {"step": 3}}, None]}, path)
    assert main(["inspect", str(path), "--key", "runs.0.net", "--json"]) == 0
    output = capsys.readouterr()
    assert "took the tensors under 'runs.0.net', and left out runs.1, runs.0.net.step" in _unwrapped(output.err)
    assert json.loads(output.out)
    torch.save(tensors, path)
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().err == ""


def test_diff_of_what_convert_took_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "encoder.pt")
    assert main(["convert", str(model), out, "--prefix", "encoder."]) == 0
    capsys.readouterr()
    assert main(["diff", str(model), out, "--prefix", "encoder."]) == 0
    assert main(["diff", out, str(model), "--other-prefix", "encoder."]) == 0
    assert capsys.readouterr().out == f"all {len(LSTM.shapes())} tensors are equal\n" * 2
    assert main(["diff", out, str(model), "--other-prefix", "cell."]) == 1
    assert "weight_hh_l1: only in A" in capsys.readouterr().out
    assert "no key starts with 'nobody.'" in _refused(["diff", str(model), out, "--prefix", "nobody."], capsys)


def test_ctrl_c_leaves_no_traceback(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxrnn.__main__.opened", stop)
    assert main(["inspect", str(model)]) == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"jaxrnn {jaxrnn.__version__}\n"


@pytest.mark.parametrize(("command", "message"), [("parity", "no case has"), ("speed", "no workload has")])
def test_the_suite_reads_its_own_arguments(
    suite: None, command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--filter", "no such thing"])
    assert stopped.value.code == 2
    assert f"jaxrnn {command}: error: {message}" in capsys.readouterr().err


def test_a_suite_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jaxrnn.parity", None)
    with pytest.raises(SystemExit, match=r"pip install -e \. in the clone"):
        main(["parity"])


def test_recording_without_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "installed_torch", lambda: None)
    monkeypatch.setattr(runner.reference, "record", list)  # which would write into the clone
    with pytest.raises(SystemExit) as stopped:
        runner.main(["record"])
    assert stopped.value.code == 2
    assert "pip install 'jaxrnn[torch]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "inspect {model}",
        "inspect {model} --json",
        "diff {model} {other}",
        "check {model}",
        "convert {model} {out}",
        "parity --filter GRUCell-nobias-unbatched-hx",
        "parity --help",
        "--help",
        "",
    ],
)
@pytest.mark.parametrize("buffering", [-1, 1], ids=["buffered", "by line"])
def test_output_that_is_no_longer_read(
    suite: None, buffering: int, command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.pt"
    checkpoint.save(other, {"new": np.ones(1)})
    unread, written = os.pipe()
    os.close(unread)
    with open(written, "w", buffering) as out:  # which writes what is left, as Python does when it exits
        monkeypatch.setattr(sys, "stdout", out)
        try:
            status = main(command.format(model=model, other=other, out=tmp_path / "out.pt").split())
        except SystemExit as stopped:  # of rich, which does the same
            status = stopped.code
    # Where argparse itself writes, it passes over what it cannot write.
    assert status == 1 or (status == 0 and buffering == 1 and (command == "" or "--help" in command))
