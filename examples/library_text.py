"""The source of Python's standard library: a text that every machine with Python has, to train language models on."""

import functools
import sysconfig
from pathlib import Path

import numpy as np

MODULES = """argparse ast calendar configparser dataclasses difflib doctest enum fractions ftplib functools inspect
ipaddress mailbox pdb pickle pickletools random shutil smtplib socket statistics subprocess tarfile threading typing"""
CHARACTERS, ROWS, TIME = 128, 32, 32  # of ASCII; of a batch


@functools.cache
def text() -> tuple[np.ndarray, np.ndarray]:
    """The modules' ASCII characters as numbers: what to train on, and (512, 64), passages held out from all over."""
    sources = (Path(sysconfig.get_path("stdlib"), f"{name}.py").read_bytes() for name in MODULES.split())
    characters = np.frombuffer(b"".join(sources), np.uint8)
    characters = characters[characters < CHARACTERS].astype(np.int32)
    passages = characters[: len(characters) // 512 * 512].reshape(-1, 512)
    chosen = np.linspace(0, len(passages) - 1, 64).astype(int)
    return np.delete(passages, chosen, axis=0).ravel(), passages[chosen].T


def batch(step: int, rows: int = ROWS) -> np.ndarray:
    """What a step sees, (TIME + 1, rows): the text is a ring, in which each row goes on from where it was."""
    characters, _ = text()
    places = np.arange(rows) * (len(characters) // rows) + step * TIME
    return characters.take(places + np.arange(TIME + 1)[:, None], mode="wrap")
