"""Read mutated files by the thousand, within limits of time and memory; report what is neither read nor refused."""

import collections
import contextlib
import faulthandler
import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NamedTuple

from mutating import mutated, whole

from jaxrnn.checkpoint import CheckpointError

SECONDS = 10  # that a file may take: most take a thousandth of one
RESERVED = 4 << 30  # bytes that may be allocated beside what is there: threads reserve some for themselves
USED = 300 << 20  # bytes that a file may fill: readers' own limit is 64 MiB for a small file, of which they make copies
_MOST = 20  # kinds of failures, after which there is no need to go on
_STUCK = 300  # seconds after which code that Python cannot interrupt ends the process


class Reader(NamedTuple):
    """What reads files, and files that it reads.

    Attributes:
        name: for the command line.
        seeds: makes good files: bytes, or trees as in `mutating`, or a dict from name to these for a directory.
        file: the name of the file, or of the directory.
        read: reads the path. The random generator chooses among options.
        files: how many a quick run takes.
    """

    name: str
    seeds: Callable[[], list[Any]]
    file: str
    read: Callable[[Path, Random], object]
    files: int = 200


class Counts(NamedTuple):
    read: int
    refused: int
    seconds: float
    failures: list[str]

    def __str__(self) -> str:
        files = self.read + self.refused
        words = f"{files} files, {files / self.seconds:.0f} a second, {self.refused / max(files, 1):.0%} refused"
        return "\n".join([words, *self.failures])


def fuzz(reader: Reader, files: int, first: int = 0) -> Counts:
    """Read mutated files. Each depends on the reader's name and its own number alone.

    What comes of a file that is neither tensors, nor a `CheckpointError`, nor a warning of ours, is a failure.
    """
    seeds = reader.seeds()
    folder = Path(
        tempfile.mkdtemp(prefix=f"fuzz-{os.getpid()}-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    )
    failures: dict[str, list[int]] = collections.defaultdict(list)
    outcomes: collections.Counter[bool] = collections.Counter()
    for seed in seeds:  # for what reading imports
        _write(folder / reader.file, seed)
        with warnings.catch_warnings(), contextlib.suppress(CheckpointError):
            warnings.simplefilter("ignore")
            reader.read(folder / reader.file, Random(0))
    started = time.monotonic()
    gc.freeze()  # what is there by now need not be searched again
    with _limits(), open(folder / "number", "wb", buffering=0) as number:
        for index in range(first, first + files):
            if index % 100 == 0:
                gc.collect()  # pytest is told to do so rarely, and buffers of 1 MB would pile up
                faulthandler.dump_traceback_later(_STUCK, exit=True, file=sys.__stderr__)
            os.pwrite(number.fileno(), str(index).encode(), 0)  # if the process dies, the folder says of what
            random = Random(f"{reader.name} {index}")
            _write(folder / reader.file, _mutated(random, seeds))
            failure = _failure_of(reader, folder / reader.file, random, outcomes)
            if failure:
                failures[failure].append(index)
                if len(failures) == _MOST:
                    break
        faulthandler.cancel_dump_traceback_later()
    gc.unfreeze()
    shutil.rmtree(folder)
    lines = [
        f"{len(indices)} of number {indices[0]} and after: {failure}\n  again: pytest -n0 tests/test_fuzz.py "
        f"-k '{reader.name}' --fuzz 1 --fuzz-first {indices[0]}"
        for failure, indices in failures.items()
    ]
    return Counts(outcomes[True], outcomes[False], time.monotonic() - started, lines)


def _mutated(random: Random, seeds: list[Any]) -> Any:
    if not isinstance(seeds[0], dict):
        return mutated(random, seeds)
    files, kind = dict(random.choice(seeds)), random.random()
    changed = random.choice(list(files))
    if kind < 0.03:
        del files[changed]
    elif kind < 0.06:
        files[random.choice(list(files))] = files[changed]
    else:
        files[changed] = mutated(random, [seed[changed] for seed in seeds if changed in seed])
    return files


def _write(path: Path, content: Any) -> None:
    if not isinstance(content, dict):
        path.write_bytes(whole(content))
        return
    shutil.rmtree(path, ignore_errors=True)
    for name, each in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(whole(each))


def _failure_of(reader: Reader, path: Path, random: Random, outcomes: collections.Counter[bool]) -> str:
    """What went wrong with a file, and where."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            reader.read(path, random)
            outcomes[True] += 1
        except CheckpointError as error:
            outcomes[False] += 1
            if "\n" not in str(error).strip():
                return f"a refusal without a remedy: {error}"
        except Exception as error:
            return _described(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > USED // 1024:
        return "it takes much memory"
    for each in caught:
        if each.category is not UserWarning or ("\n" not in str(each.message) and ": " not in str(each.message)):
            return f"{each.category.__name__}: {str(each.message)[:150]} at {each.filename}:{each.lineno}"
    return ""


def _described(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "jaxrnn" in Path(frame.filename).parts] or frames
    places = dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (ours[-1], frames[-1]))
    return f"{type(error).__name__} at {', '.join(places)}"


class TooSlow(Exception):
    """A file took longer than it may."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limit the memory, and what takes too long."""
    handler = signal.signal(signal.SIGALRM, _too_slow)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + RESERVED, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)
