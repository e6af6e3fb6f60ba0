"""The command line of the timings: `jaxrnn speed`, or `python -m parity.timing` from the root of a clone."""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import track

from jaxrnn.__main__ import with_examples

from ..compilers import TARGETS
from . import ahead, device, speed, sweep
from .workloads import WORKLOADS, Workload

SMALL = 1e9  # --quick times the workloads with fewer operations forward
EXTRAS = {"keras": "keras (pip install 'jaxrnn[speed]')", "torch": "torch (pip install 'jaxrnn[torch]')"}


def main(arguments: Sequence[str] | None = None, prog: str = f"python -m {__package__}") -> int:
    """Time the workloads and print a table. Returns the exit code. `prog` is the command that was used."""
    parser = argparse.ArgumentParser(
        prog=prog,
        **with_examples(
            "Time jaxrnn, Flax, Keras and PyTorch on the same workloads, on an otherwise idle machine.",
            f"{prog} --quick",
            f"{prog} --filter lstm --sides flax.nnx,torch",
            f"{prog} --sweep --filter gru --plot sweep.svg",
        ),
    )
    parser.add_argument("--repeats", type=int, help="runs of each side (default: 30; --sweep: 300)")
    parser.add_argument(
        "--seconds",
        type=float,
        help="stop a workload after this time, but not before 5 runs (default: 20; --quick: 5; --sweep: 3)",
    )
    parser.add_argument(
        "--devices", type=int, help="CPU devices (default: one for each core; --sweep, but for sharded: one)"
    )
    parser.add_argument(
        "--filter", default="", metavar="TEXT", help="only workloads with TEXT in their name; upper or lower case"
    )
    parser.add_argument(
        "--sides",
        help=f"what to time beside jaxrnn (default: {','.join(speed.SIDES)}; --sweep, which takes one: flax.nnx)",
    )
    parser.add_argument("--quick", action="store_true", help="only the small workloads, in about two minutes")
    parser.add_argument(
        "--sweep", action="store_true", help="layers of 32 to 512 units with 1 to 4,096 rows, in about ten minutes"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write all results to this file")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="also draw the ratios to this .svg or .png file")
    parser.add_argument(
        "--device-report",
        type=Path,
        metavar="OUT",
        help="run parity, speed and a profile on this device in --seconds (450), and write OUT.json and OUT.html",
    )
    parser.add_argument("--compile-only", action="store_true", help="only compile, for a device that is not here")
    parser.add_argument(
        "--platform", choices=["tpu", "cuda", *TARGETS], help="with --compile-only: all TPUs, all GPUs, or one of them"
    )
    parser.add_argument("--bundles", action="store_true", help="with --compile-only: also count a TPU's instructions")
    options = parser.parse_args(arguments)
    asked = {"jaxrnn", *(options.sides or ("flax.nnx" if options.sweep else ",".join(speed.SIDES))).split(",")}
    if unknown := asked - set(speed.SIDES):
        parser.error(f"--sides has {', '.join(sorted(unknown))}: there are {', '.join(speed.SIDES)}")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot draws with matplotlib: pip install 'jaxrnn[report]'")
    workloads = sweep.workloads() if options.sweep else WORKLOADS
    chosen = [
        w
        for w in workloads
        if options.filter.lower() in w.name.lower() and (not options.quick or w.operations() < SMALL)
    ]
    if (options.platform or options.bundles) and not options.compile_only:
        parser.error("--platform and --bundles are for --compile-only: add it")
    if not chosen:
        names = "; ".join(workload.name for workload in workloads)
        parser.error(f"no workload has {options.filter!r} in its name: there are {names}")
    if options.device_report:
        return device.write(options.device_report, options.seconds or device.SECONDS)
    if options.compile_only:
        return _compile_only(chosen, options)
    devices = 1 if options.sweep and "sharded" not in asked else os.cpu_count()
    jax.config.update("jax_num_cpu_devices", options.devices or devices)
    absent = {side for side in ("keras", "torch") if not importlib.util.find_spec(side)}
    absent |= {"sharded"} if len(jax.devices()) == 1 else set()
    absent |= {"graphs", "cudnn"} if jax.default_backend() != "gpu" else set()
    absent |= {"scan", "associative_scan"} if options.sweep else set()
    absent |= {"pallas"} if jax.default_backend() != "tpu" else set()
    left_out = [side for side in speed.SIDES if side in asked & absent]
    asked -= absent
    if options.sweep and len(asked & set(speed.THEIRS)) != 1:
        here = ", ".join(side for side in speed.THEIRS if side not in absent)
        parser.error(f"--sweep compares with one side: --sides has to name one of {here}")
    default = 3 if options.sweep else 5 if options.quick else 20
    seconds = default if options.seconds is None else options.seconds
    repeats = options.repeats or (300 if options.sweep else 30)

    rates = speed.product_rates([side for side in speed.SIDES if side in asked])
    results = speed.Results([])
    for workload in track(chosen, description="timing", console=Console(stderr=True), transient=True):
        measured = speed.measure(workload, asked, repeats, seconds, rates)
        results = speed.Results([*results.found.values(), *results.refused, *measured])
        jax.clear_caches()
        gc.collect()
        if options.json:  # each time, for all of it may take long
            everything = {
                "environment": device.versions(),
                "gemm_gflops": rates,
                "workloads": [workload._asdict() for workload in chosen],
                "results": [timed.json() for timed in results.found.values()],
                "refused": [dataclasses.asdict(timed) for timed in results.refused],
                "summary": results.summary(),
                "ratios": results.ratios(),
            }
            options.json.write_text(json.dumps(everything, indent=1) + "\n")
    curves = None
    if options.sweep:
        [side] = results.theirs
        ratios = (functools.partial(ratio, theirs=side) for ratio in (results.ratio, results.memory))
        of_time, of_memory = (sweep.curves(chosen, speed.PROGRAMS, ratio) for ratio in ratios)
        curves = of_time, of_memory
        sweep.show(*curves, side, Console())
        print(*results.in_words(), sep="\n")
    else:
        results.show(Console(), rates)
    print(", ".join(f"{name} {value}" for name, value in device.versions().items()))
    if left_out:
        print(f"Not available here: {', '.join(EXTRAS.get(side, side) for side in left_out)}.")
    if options.plot:
        _plot(results, options.plot, curves)
    return 0


def _plot(results: speed.Results, path: Path, curves: tuple[sweep.Curves, sweep.Curves] | None = None) -> None:
    """Draw the ratios, or the curves of a sweep, in the format of the path's suffix."""
    import matplotlib

    from ..style import STYLE
    from . import plots

    with matplotlib.rc_context(STYLE):
        if curves:
            figure = plots.sweep(*curves, results.theirs[0])
        else:
            figure = plots.ratios(results.ratios(), {side: side for side in results.theirs})
        figure.savefig(path)


def _compile_only(chosen: Sequence[Workload], options: argparse.Namespace) -> int:
    """Compile for devices that need not be here, and print the counts."""
    jax.config.update("jax_platforms", "cpu")
    found: list[ahead.Compiled] = []
    for target, (kind, _) in TARGETS.items():
        if options.platform in (None, target, kind):
            programs = ahead.compile_for(target, chosen, bundles=options.bundles)
            count = len(chosen) * len(ahead.PROGRAMS) * len(ahead.SIDES)
            found += track(programs, target, count, console=Console(stderr=True), transient=True)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(each) for each in found], indent=1) + "\n")
    return ahead.show(found, chosen, Console())


if __name__ == "__main__":
    from jaxrnn.__main__ import quietly

    sys.exit(quietly(main))
