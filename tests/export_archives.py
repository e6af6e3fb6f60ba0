"""Files of torch.export by hand: the JSON that describes tensors and a graph, in a zip."""

import io
import json
import zipfile
from typing import Any

import numpy as np

import jaxrnn
from jaxrnn.checkpoint.formats.torch_zip import write

NUMBERS = np.arange(4, dtype=np.float32).tobytes()


def meta(*shape: int, **changes: Any) -> dict[str, Any]:
    """A contiguous float32 tensor as the JSON describes it."""
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    described: dict[str, Any] = {
        "dtype": 7, "layout": 7, "requires_grad": True, "device": {"type": "cpu", "index": None},
        "sizes": [{"as_int": n} for n in shape], "strides": [{"as_int": n} for n in strides],
        "storage_offset": {"as_int": 0},
    }  # fmt: skip
    return described | changes


def weights_config(**metas: Any) -> dict[str, Any]:
    return {
        "config": {
            name: {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": described}
            for name, described in metas.items()
        }
    }


def export_archive(weights: Any, nodes: Any = (), specs: Any = (), **entries: bytes) -> bytes:
    def text(value: Any) -> bytes:
        return value if isinstance(value, bytes) else json.dumps(value).encode()

    graph = {"graph_module": {"signature": {"input_specs": specs}, "graph": {"nodes": nodes}}}
    texts = {
        "data/weights/weight_0": NUMBERS,
        "data/weights/model_weights_config.json": text(weights),
        "data/constants/model_constants_config.json": text(weights_config()),
        "models/model.json": text(graph),
        "archive_format": b"pt2",
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as writer:
        for name, data in (texts | entries).items():
            kind = zipfile.ZIP_STORED if "/weight_" in name else zipfile.ZIP_DEFLATED
            writer.writestr(f"model/{name}", data, kind)
    return file.getvalue()


def node(op: str, weights: list[str], **settings: Any) -> dict[str, Any]:
    inputs = {"params": {"as_tensors": [{"name": f"p_{name}"} for name in weights]}, **settings}
    return {"target": f"torch.ops.aten.{op}", "inputs": [{"name": name, "arg": arg} for name, arg in inputs.items()]}


def export_of_an_lstm(**changes: Any) -> bytes:
    """A file with an LSTM of one layer and one unit."""
    shapes = jaxrnn.Spec(jaxrnn.LSTM_CELL, 1, 1).shapes()
    settings: dict[str, Any] = {
        "has_biases": {"as_bool": True}, "num_layers": {"as_int": 1}, "dropout": {"as_float": 0.0},
        "train": {"as_bool": False}, "bidirectional": {"as_bool": False}, "batch_first": {"as_bool": True},
    }  # fmt: skip
    specs = [{"parameter": {"arg": {"name": f"p_{name}"}, "parameter_name": name}} for name in shapes]
    weights = weights_config(**{name: meta(*shape) for name, shape in shapes.items()})
    call = node("lstm.input", [*shapes], **(settings | changes))
    return export_archive(weights, [call], specs, **{"data/weights/weight_0": NUMBERS})


def older_export(tensors: bytes, name: str = "serialized_state_dict.pt") -> bytes:
    """A file as torch before 2.8 wrote it."""
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w") as writer:
        writer.writestr("archive/data.pkl", b"\x80\x02}.")
    graph = json.dumps({"graph_module": {"signature": {"input_specs": []}, "graph": {"nodes": []}}}).encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        writer.writestr("serialized_exported_program.json", graph)
        writer.writestr(name, tensors)
        writer.writestr("serialized_constants.pt", empty.getvalue())
    return file.getvalue()


def torch_save(tensors: dict[str, np.ndarray]) -> bytes:
    class Named(io.BytesIO):
        name = "inside"

    file = Named()
    write(file, tensors, lambda count: None)
    return file.getvalue()
