"""A report on the device in a few minutes: `jaxrnn speed --device-report OUT` writes OUT.json and OUT.html.

Each section runs in a separate process with a limit of time: a section that fails, hangs or takes all memory leaves the
others. Both files are written after each section.
"""

import html
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxrnn

from .workloads import WORKLOADS, Implementation, implementations, training

SECONDS = 450.0
STEPS = 5  # training steps in a profile
PARITY = __package__.rpartition(".")[0]


class Section(NamedTuple):
    """A part of the report.

    Attributes:
        title: the heading.
        arguments: the arguments of `python -m`. The name of a file to write figures to is added.
        share: the share of the time.
        judges: whether the report fails if the section does.
    """

    title: str
    arguments: Sequence[str]
    share: float
    judges: bool = False


def _parity(precision: str) -> Sequence[str]:
    return (PARITY, "--dtype", "float32", "--filter", "accuracy", "--precision", precision, "--json")


SECTIONS = [
    Section("Versions and the device", (f"{__package__}.device", "environment"), 1),
    Section("Parity with float32 products", _parity("highest"), 5, judges=True),
    Section("Parity with JAX's default products", _parity("default"), 5, judges=True),
    Section("Launches and memory, as profiled", (f"{__package__}.device", "profile"), 3),
    Section("Speed, small workloads", (__package__, "--quick", "--seconds", "2", "--json"), 8),
    Section("Speed, large workloads", (__package__, "--filter", "char-LM", "--seconds", "5", "--json"), 5),
]


def write(out: Path, seconds: float, sections: Sequence[Section] = SECTIONS) -> int:
    """Run the sections within so many seconds, and write both files after each. A suffix of `out` is replaced.

    Returns:
        The exit code: 1 if parity failed or did not run.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    found: list[dict[str, Any]] = []
    for index, section in enumerate(sections):
        left = sum(each.share for each in sections[index:])
        print(f"{section.title} ...", flush=True)
        found.append(_run_section(section, (end - time.monotonic()) * section.share / left))
        print(f"  {found[-1]['result']}", flush=True)
        out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        out.with_suffix(".html").write_text(_page(found))
    print(f"{out.with_suffix('.html')} shows it, {out.with_suffix('.json')} has all figures.")
    return int(any(each["failed"] for each in found))


def _run_section(section: Section, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        figures, printed = Path(folder) / "figures.json", Path(folder) / "printed"
        command = [sys.executable, "-m", *section.arguments, str(figures)]
        variables = os.environ | {"COLUMNS": "150", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
        begin = time.monotonic()
        with printed.open("w") as stream:  # a file keeps what was printed before the limit
            try:
                options: Any = {"stdout": stream, "stderr": subprocess.STDOUT, "env": variables, "timeout": seconds}
                code: int | None = subprocess.run(command, check=False, **options).returncode
                result = "done" if code == 0 else f"ended with exit code {code}"
            except subprocess.TimeoutExpired:
                code, result = None, f"stopped after its {seconds:.0f} seconds: what it had until then"
        try:
            numbers = json.loads(figures.read_text())
        except (OSError, ValueError):  # no file, or half of one
            numbers = None
        return {
            "section": section.title,
            "command": " ".join(["python", "-m", *section.arguments, "OUT"]),
            "result": result,
            "failed": section.judges and code != 0,
            "seconds": round(time.monotonic() - begin, 1),
            "printed": printed.read_text(errors="replace"),
            "figures": numbers,
        }


def _page(found: Sequence[dict[str, Any]]) -> str:
    parts = ["<!doctype html>", '<meta charset="utf-8">', "<title>jaxrnn on this device</title>"]
    parts.append("<style>body{font:15px sans-serif;margin:2em}pre{font:12px monospace;overflow-x:auto}</style>")
    parts.append("<h1>jaxrnn on this device</h1><ul>")
    parts += [f"<li>{html.escape(each['section'])}: {html.escape(each['result'])}</li>" for each in found]
    parts.append("</ul>")
    for each in found:
        printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", each["printed"]).strip()
        parts.append(f"<h2>{html.escape(each['section'])}</h2>")
        parts.append(f"<p><code>{html.escape(each['command'])}</code>, {each['seconds']} s, {each['result']}</p>")
        parts.append(f"<pre>{html.escape(printed)}</pre>")
    return "\n".join(parts) + "\n"


def versions() -> dict[str, Any]:
    """The versions of the packages and the devices."""
    names = ["jax", "flax", *(name for name in ("keras", "torch") if importlib.util.find_spec(name))]
    device = jax.devices()[0]
    devices = f"{len(jax.devices())} {device.platform} ({device.device_kind})"
    versions = {"jaxrnn": jaxrnn.__version__} | {name: importlib.metadata.version(name) for name in names}
    return versions | {"python": platform.python_version(), "devices": devices, "cores": os.cpu_count()}


def environment() -> dict[str, Any]:
    """The versions, what JAX says of the device, and the environment variables that change it."""
    device = jax.devices()[0]
    flags = {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_", "LIBTPU_"))}
    described = {"platform version": device.client.platform_version, "memory": device.memory_stats()}
    return versions() | described | {"set": flags}


def profile(names: Sequence[str] = ("small LSTM", "small GRU", "RL GRU")) -> list[dict[str, Any]]:
    """Profile training steps: kernels and graphs launched for each time step, and how long the device is busy."""
    backend = jax.default_backend()
    sides = {"cpu": ("jaxrnn",), "gpu": ("jaxrnn", "graphs", "cudnn"), "tpu": ("jaxrnn", "pallas")}
    found = []
    for workload in (workload for workload in WORKLOADS if workload.name in names):
        for each in implementations(workload, (*sides.get(backend, ("jaxrnn",)), "flax.nnx")):
            figures: dict[str, Any] = {"workload": workload.name, "form": each.name, "side": each.side}
            try:
                figures |= _profiled(each, workload.inputs(), workload.time, backend)
            except Exception as problem:  # an engine refuses, or the profiler fails: the others go on
                figures["problem"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            found.append(figures)
    return found


def _profiled(implementation: Implementation, inputs: Any, time_steps: int, backend: str) -> dict[str, Any]:
    step = jax.jit(training(implementation.run), compiler_options=implementation.compiler_options)
    arguments = jax.device_put((implementation.parameters, *inputs))
    jax.block_until_ready(step(*arguments))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            begin = time.perf_counter()
            for _ in range(STEPS):
                jax.block_until_ready(step(*arguments))
            wall = (time.perf_counter() - begin) / STEPS
        events = [] if backend == "cpu" else list(_device_events(folder))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    figures: dict[str, Any] = {"wall ms": 1e3 * wall, "peak MB so far": peak / 1e6 or None}
    if backend == "cpu":
        return figures | {"events": "a CPU launches nothing"}
    busy = sum(duration for _, duration in events) / STEPS
    return figures | {"events a time step": len(events) / STEPS / time_steps, "busy ms": busy / 1e6}


def _device_events(folder: str) -> Iterator[tuple[str, float]]:
    """The names and nanoseconds of all events on a device: in the streams of a GPU, or of the operations of a TPU."""
    for path in Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not (plane.name or "").startswith("/device:"):
                continue
            for line in plane.lines:
                if re.match(r"Stream|XLA Ops", line.name or ""):
                    yield from ((event.name, event.duration_ns) for event in line.events)


def main(arguments: Sequence[str]) -> int:
    """Print one section's figures, and write them to a file."""
    name, out = arguments
    figures: Any = profile() if name == "profile" else environment()
    Path(out).write_text(json.dumps(figures, indent=1, default=str) + "\n")
    for each in figures if isinstance(figures, list) else [figures]:
        texts = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in each.items()}
        print(", ".join(f"{key}: {text}" for key, text in texts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
