"""What files say beside tensors, and checkpoints in several files: no tensor, file or entry is passed over."""

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from comparing import assert_close
from reading import loaded

from jaxrnn.checkpoint import CheckpointError, load, save
from jaxrnn.checkpoint.formats.nested import METADATA
from jaxrnn.checkpoint.formats.safetensors import METADATA as SAFETENSORS
from jaxrnn.checkpoint.tables import UNKNOWN

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def _write(folder: Path, one: dict[str, Any], two: dict[str, Any], listed: dict[str, str], **more: Any) -> Path:
    save(folder / ONE, one)
    save(folder / TWO, two)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed, **more}))
    return folder / INDEX


def test_two_files_with_the_same_tensor(tmp_path: Path) -> None:
    a, b = np.ones(2), np.array([0.0, np.nan])
    listed = {"a": ONE, "b": TWO}
    tensors, words = loaded(_write(tmp_path, {"a": a}, {"a": a, "b": b}, listed))
    assert (sorted(tensors), words) == (["a", "b"], [])
    path = _write(tmp_path, {"a": a}, {"a": 2 * a, "b": b}, listed)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {ONE} and {TWO} are both read as a\nsave the whole checkpoint again"


def test_what_the_index_does_not_list_is_named(tmp_path: Path) -> None:
    a, b = np.ones(2), np.zeros(3)
    path = _write(tmp_path, {"a": a}, {"b": b, "c": b}, {"a": ONE, "b": TWO})
    tensors, words = loaded(path)
    assert (sorted(tensors), words) == (["a", "b"], [f"left out c of {TWO}: add them to weight_map to load them"])
    tensors, words = loaded(_write(tmp_path, {"a": a}, {"b": b, "c": b}, {"a": ONE, "b": TWO, "c": TWO}))
    assert (sorted(tensors), words) == (["a", "b", "c"], [])
    tensors, words = loaded(_write(tmp_path, {"a": a}, {"b": b}, {"a": ONE}))
    assert (sorted(tensors), words) == (
        ["a"],
        [f"left out the files {TWO}: add their tensors to weight_map to load them"],
    )
    tensors, words = loaded(_write(tmp_path, {"a": a}, {"b": b}, {"a": ONE, "b": TWO}, quantized=True))
    assert words == [f"the index has quantized=True: {UNKNOWN}"]


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    path = _write(tmp_path, {"a": np.ones(2)}, {"b": np.ones(2)}, {"a": ONE, "b": TWO})
    path.write_text(path.read_text().replace('"b"', '"a"'))
    with pytest.raises(CheckpointError, match="a damaged index of a checkpoint: ValueError it has two entries a\n"):
        load(path)
    path.write_text(f'{{"weight_map": {{"a": "{ONE}"}}, "weight_map": {{"b": "{TWO}"}}}}')
    with pytest.raises(CheckpointError, match="it has two entries weight_map\n"):
        load(path)


@pytest.mark.torch
def test_what_torchs_modules_write_into_metadata_is_in_the_table(torch: types.ModuleType) -> None:
    import torch.ao.nn.qat
    import torch.ao.nn.quantized.dynamic

    left, versions = [torch.nn.Module], set()
    while left:
        kind = left.pop()
        versions.add(kind._version)
        left += [each for each in kind.__subclasses__() if each.__module__.startswith("torch.")]
    assert not list(METADATA.findings({"version": max(versions)}))
    assert {*versions} <= {*METADATA["version"].plain}
    model = torch.nn.ModuleList([torch.nn.utils.spectral_norm(torch.nn.Linear(2, 2)), torch.nn.BatchNorm1d(2)])
    assert {key for each in model.state_dict()._metadata.values() for key in each} == METADATA.keys()


@pytest.mark.torch
@pytest.mark.parametrize("name", [*METADATA, "new"])
@pytest.mark.parametrize("legacy", [False, True])
def test_metadata_of_torch_with_another_value(torch: types.ModuleType, name: str, legacy: bool, tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.BatchNorm1d(2)})
    tensors = model.state_dict()
    tensors._metadata["a"][name] = tensors._metadata["b"][name] = 7
    torch.save({"model": tensors}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    found, words = loaded(tmp_path / "a.pt")
    assert_close(found, {key: value.numpy() for key, value in tensors.items()}, atol=0)
    known = name in METADATA and METADATA[name].use == "neutral"
    assert [text.partition("\n")[0] for text in words] == ([] if known else [f"the state dict of a, b has {name}=7"])


@pytest.mark.parametrize("value", ["pt", "np", "numpy", None, "mlx", "flax", "tf"])
def test_formats_of_safetensors(value: str | None, tmp_path: Path) -> None:
    assert SAFETENSORS["format"].plain == ("pt", "np", "numpy")
    metadata = {"note": "x"} | ({} if value is None else {"format": value})
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "a.safetensors", metadata)
    if value in ("pt", "np", "numpy", None):
        load(tmp_path / "a.safetensors")
    else:
        with pytest.warns(UserWarning, match=f"a.safetensors: it says format='{value}'\nlayouts may not be torch's"):
            load(tmp_path / "a.safetensors")
