"""How much memory it takes to refuse files."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_PROGRAM = """
import importlib, resource, sys
import jaxrnn
from jaxrnn.__main__ import main
for package in sys.argv[1].split():
    importlib.import_module(package)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for path in sys.argv[2:]:
    assert main(["inspect", path]) == 2, path
print((peak() - before) * (1 if sys.platform == "darwin" else 1024))
"""


def memory_to_refuse(paths: Iterable[Path], packages: str = "") -> int:
    """The bytes by which a process grows while it refuses files, after it has imported packages."""
    command = [sys.executable, "-c", _PROGRAM, packages, *map(str, paths)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
