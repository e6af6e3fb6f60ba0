"""Steps of torch's optimizers on a loss that needs no model."""

import types
from typing import Any

import numpy as np

SHAPES = {"w": (2, 3), "b": (3,), "v": (3,)}  # two of one shape


def gradient_of(value: Any, count: int) -> np.ndarray:
    """That of some loss, smaller and smaller, as the maximum in amsgrad wants it."""
    return np.cos(np.asarray(value) * 3 + count) / count


def torchs_step(torch: types.ModuleType, optimizer: Any, tensors: dict[str, Any], count: int) -> None:
    for tensor in tensors.values():
        tensor.grad = torch.tensor(gradient_of(tensor.detach(), count))
    optimizer.step()
