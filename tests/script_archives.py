"""TorchScript archives by hand: the pickle of a module, and the code of its class."""

import io
import zipfile

import numpy as np

TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)
CODE = 'class M(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n  w : Tensor\n'


def script_object(state: bytes, kind: bytes = b"__torch__\nM") -> bytes:
    """An object of a class, with a state."""
    return b"c" + kind + b"\n)\x81" + state + b"b"


def script_archive(data: bytes, code: str = CODE, constants: bytes = b"\x80\x02).", **entries: bytes) -> bytes:
    file = io.BytesIO()
    texts = {"data.pkl": b"\x80\x02" + data + b".", "constants.pkl": constants, "code/__torch__.py": code.encode()}
    with zipfile.ZipFile(file, "w") as writer:
        for name, content in {"data/0": np.arange(4, dtype=np.float32).tobytes(), **texts, **entries}.items():
            kind = zipfile.ZIP_DEFLATED if name.startswith("code/") else zipfile.ZIP_STORED
            writer.writestr(f"model/{name}", content, kind)
    return file.getvalue()


def text(value: str) -> bytes:
    """The operation that puts a string there."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()
