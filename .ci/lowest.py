"""Print pip constraints that pin every dependency of pyproject.toml to its lower bound."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in sorted({*project["dependencies"], *(r for name in sys.argv[1:] for r in extras[name])}):
    if bound := re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
