"""Closed tables: what becomes of a setting, and that none is passed over."""

import numpy as np
import pytest

from jaxrnn.checkpoint import CheckpointError
from jaxrnn.checkpoint.named import Names
from jaxrnn.checkpoint.tables import USED, Table, neutral, refused, warned

TABLE = Table(
    "a class",
    {
        "units": USED,
        "name": neutral("a name"),
        "activation": refused("tanh", None, remedy="write a cell"),
        "reverse": warned(False, remedy="flip the input"),
    },
)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"units": 3, "name": "a", "activation": "tanh", "reverse": False}, []),
        ({"activation": None}, []),
        ({"activation": "relu"}, ["refused activation='relu'"]),
        ({"reverse": True, "activation": 0}, ["warned reverse=True", "refused activation=0"]),
        ({"reverse": 0}, ["warned reverse=0"]),
        ({"activation": np.ones(2)}, ["refused activation=array([1., 1.])"]),
        ({"new": 1}, ["unknown new=1"]),
        ({"new": None}, ["unknown new=None"]),
    ],
    ids=str,
)
def test_what_becomes_of_settings(settings: dict[str, object], words: list[str]) -> None:
    assert [f"{finding.row.use} {finding}" for finding in TABLE.findings(settings)] == words


def test_a_name_is_taken_once() -> None:
    names = Names[int]("rename one of them")
    names.put("a.b", 1, "a/b")
    with pytest.raises(CheckpointError, match=r"^a/b and a\.b are both read as a\.b\nrename one of them$"):
        names.put("a.b", 2, "a.b")
    assert names == {"a.b": 1}
