"""The package as it is installed, as a wheel and editable, run from a folder that has no clone."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxrnn

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "examples" / "denoiser.safetensors"

Run = Callable[..., subprocess.CompletedProcess[str]]


def _missing() -> str:
    """What is not installed of what builds and installs a wheel without a network."""
    for name, least in (("pip", 23), ("setuptools", 77)):
        try:
            if int(importlib.metadata.version(name).partition(".")[0]) < least:
                return f"{name} is older than {least}: pip install --upgrade {name}"
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed: pip install 'jaxrnn[test]'"
    return ""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(_missing()), reason=_missing())]


def _call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def _pip(python: str | Path, *arguments: str | Path, cwd: Path) -> None:
    done = _call(sys.executable, "-m", "pip", "--python", python, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packed, because a build leaves folders behind, and packs what an earlier one left in them."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("jaxrnn", "parity"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the package, which borrows everything else from the one of the tests."""
    folder = tmp_path_factory.mktemp(request.param)
    environment = folder / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    base = {"base": str(environment), "platbase": str(environment)}
    borrowed = Path(sysconfig.get_path("purelib", "venv", base)) / "borrowed.pth"
    borrowed.write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    if request.param == "wheel":
        _pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
        [wheel] = folder.glob("*.whl")
        _pip(python, "install", "--no-deps", "--force-reinstall", wheel, cwd=folder)
    else:
        _pip(python, "install", "--no-deps", "--no-build-isolation", "-e", source, cwd=folder)
    return environment


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run a program of the environment, in an empty folder."""
    return lambda program, *arguments: _call(installed / "bin" / program, *arguments, cwd=tmp_path)


def test_all_of_it_is_there(installed: Path, source: Path, run: Run) -> None:
    done = run("python", "-c", "import jaxrnn, jaxrnn.parity as parity; print(jaxrnn.__path__[0], parity.__path__[0])")
    assert done.returncode == 0, done.stderr
    found = dict(zip(("jaxrnn", "parity"), map(Path, done.stdout.split()), strict=True))
    for name, folder in found.items():
        assert folder.is_relative_to(installed) or folder.is_relative_to(source), folder  # and not in the clone
        wanted = {path.relative_to(source / name) for path in (source / name).rglob("*") if path.is_file()}
        assert {path for path in wanted if path.suffix != ".pyc" and not (folder / path).is_file()} == set()


def test_parity_runs(run: Run, tmp_path: Path) -> None:
    done = run("jaxrnn", "parity", "--filter", "GRUCell-hx", "--json", "out.json", "--report", "out.html")
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["passed"]
    assert data["cases"] == 2
    assert "jaxrnn parity --filter GRUCell-hx" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
@pytest.mark.parametrize(
    ("module", "program"),
    [("jaxrnn", "speed"), ("jaxrnn.parity", ""), ("jaxrnn.parity.timing", "")],
    ids=["jaxrnn speed", "jaxrnn.parity", "jaxrnn.parity.timing"],
)
def test_modules_that_are_programs(module: str, program: str, run: Run) -> None:
    done = run("python", "-m", module, *program.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m {module} {program}".rstrip() + " [-h]")


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_recording_wants_a_clone(run: Run) -> None:
    done = run("jaxrnn", "parity", "record")
    assert done.returncode == 2
    assert "run `python -m parity record` in its root" in done.stderr


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_checkpoints_are_inspected(run: Run) -> None:
    done = run("jaxrnn", "inspect", CHECKPOINT)
    assert done.returncode == 0, done.stderr
    assert "decoder. GRU" in done.stdout
    assert run("jaxrnn", "--version").stdout == f"jaxrnn {jaxrnn.__version__}\n"
