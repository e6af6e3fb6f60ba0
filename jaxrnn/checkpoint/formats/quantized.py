"""Weights of torch's quantized modules: what the pickle says of them, and the numbers that they stand for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, listed
from jaxrnn.checkpoint.formats.pickles import Other, Packed, StoredTensor
from jaxrnn.checkpoint.named import Names
from jaxrnn.checkpoint.stored import Value, read

BEFORE = "save the state_dict() of the model before it was quantized"
# The ends of names, after that of the module and a dot, or alone.
_LAYERS = "_all_weight_values.0.param"
_CELL = ("_packed_weight_ih", "_packed_weight_hh")
_LINEAR = "_packed_params._packed_params"
_UNUSED = ("_packed_params.dtype", "scale", "zero_point")  # of a linear layer, whose activations they are for
_AFFINE, _PER_CHANNEL = "torch.per_tensor_affine", "torch.per_channel_affine"


def is_packed(value: Any) -> bool:
    """Whether a value in a state dict holds tensors of a quantized module."""
    first = value[0] if type(value) is tuple and value else None
    return isinstance(value, Packed) or (isinstance(first, StoredTensor | Other) and len(value) == 2)


def _unpacked(tensors: Mapping[str, Any], halves: list[str], directions: Mapping[str, int]) -> dict[str, Any]:
    """A state dict with torch's usual names for the weights of quantized modules.

    The list `halves` gets the modules whose weights are rounded to float16. `directions` has 1 or 2 by the prefix of a
    module, where it is known.

    Raises:
        CheckpointError: a module is packed in a way that torch does not pack it, or its settings are in doubt.
    """
    found = Names[Any](BEFORE)
    linear = {name.removesuffix(_LINEAR) for name in tensors if name.endswith(_LINEAR)}
    for name, value in tensors.items():
        module, dot, leaf = name.rpartition(".")
        if any(name.endswith(each) and name.removesuffix(each) in linear for each in _UNUSED):
            continue
        weights: dict[str, Any] = {}
        try:
            if not is_packed(value):
                weights = {name: value}
            elif name.endswith(_LAYERS):
                weights = _layers(name.removesuffix(_LAYERS), tensors, halves, directions)
            elif name.endswith(_CELL):
                role = leaf.removeprefix("_packed_weight_")
                weights = _named(f"{module}{dot}weight_{role}", f"{module}{dot}bias_{role}", value)
            elif name.endswith(_LINEAR):
                prefix = name.removesuffix(_LINEAR)
                weights = _named(f"{prefix}weight", f"{prefix}bias", value)
            elif "_all_weight_values." not in name:
                raise ValueError(f"{name} is packed in an unknown way")
        except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            cause = f"damaged: the parts of the quantized {module} do not fit together: {error}"
            raise CheckpointError(f"{cause}\n{AGAIN}") from error
        for each, tensor in weights.items():
            found.put(each, tensor, name)
    return found


def _named(weight: str, bias: str, packed: Any) -> dict[str, Any]:
    """A weight and its bias, which may be None."""
    pair = packed.contents() if isinstance(packed, Packed) else packed
    tensors = [each for each in pair if isinstance(each, StoredTensor | Other)]
    if len(pair) != 2 or not tensors or pair[0] is not tensors[0] or len(tensors) + (pair[1] is None) != 2:
        raise ValueError("not a weight and a bias")
    return {weight: pair[0]} | ({} if pair[1] is None else {bias: pair[1]})


def _layers(prefix: str, tensors: Mapping[str, Any], halves: list[str], known: Mapping[str, int]) -> dict[str, Any]:
    """The weights of an LSTM or a GRU."""
    cells, index = [], 0
    while (packed := tensors.get(f"{prefix}_all_weight_values.{index}.param")) is not None:
        kind, _biases, _numbers, _reduce_range, pairs = packed.contents()
        cells.append(pairs)
        if kind == "quantized_fp16" and index == 0:
            halves.append(prefix)
        index += 1
    columns = [[_shape(pair.contents()[0])[1] for pair in pairs] for pairs in cells]
    inputs, hidden = [each[0] for each in columns], columns[0][1]
    fits = [
        directions
        for directions in ([known[prefix]] if prefix in known else (1, 2))
        if len(cells) % directions == 0
        and inputs == [inputs[0] if i < directions else directions * hidden for i in range(len(cells))]
    ]
    if not fits and prefix in known:
        raise ValueError("it says in how many directions it goes, and its weights do not fit")
    if len(fits) != 1:
        raise CheckpointError(
            f"{prefix} has two layers, or one layer in two directions, and the file does not say which\n{BEFORE}"
        )
    found: dict[str, Any] = {}
    for index, pairs in enumerate(cells):
        suffix = f"_l{index // fits[0]}" + "_reverse" * (index % fits[0])
        both = [
            _named(f"{prefix}weight_{role}{suffix}", f"{prefix}bias_{role}{suffix}", pair)
            for role, pair in zip(("ih", "hh"), pairs, strict=True)
        ]
        found |= dict(sorted((both[0] | both[1]).items(), key=lambda item: item[0].startswith(f"{prefix}bias")))
    return found


def _shape(tensor: StoredTensor | Other) -> tuple[int, ...]:
    stored = tensor.quantized[0] if isinstance(tensor, Other) and tensor.quantized else tensor
    if not isinstance(stored, StoredTensor) or len(stored.shape) != 2:
        raise ValueError("a weight that is not a matrix")
    return stored.shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to compute the numbers of quantized tensors.

    Attributes:
        stored: all tensors to read, with the numbers of quantized ones, and their scales under names of their own.
        scales: for each quantized tensor the scale and the zero, or the names under which they are stored, and the
            axis along which they go.
        halves: the modules whose weights are rounded to float16.
    """

    stored: dict[str, Any] = dataclasses.field(default_factory=dict)
    scales: dict[str, tuple[Any, Any, int]] = dataclasses.field(default_factory=dict)
    halves: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, tensors: Mapping[str, Any], directions: Mapping[str, int] = {}) -> "Plan":
        """Plan for a state dict that may have quantized modules in it.

        Args:
            tensors: its tensors and packed weights.
            directions: in how many directions layers go, by their prefixes, where it is known.
        """
        plan = cls()
        for name, value in _unpacked(tensors, plan.halves, directions).items():
            plan.stored[name] = value
            if not (isinstance(value, Other) and value.quantized):
                continue
            tensor, (scheme, scale, zero, *axis) = value.quantized
            scheme = getattr(scheme, "name", None)
            if scheme == _PER_CHANNEL and all(isinstance(each, StoredTensor) for each in (scale, zero)):
                scale_name, zero_name = f"{name}\0scale", f"{name}\0zero"
                plan.stored.update({name: tensor, scale_name: scale, zero_name: zero})
                plan.scales[name] = scale_name, zero_name, axis[0]
            elif scheme == _AFFINE and type(scale) is float and type(zero) is int and abs(zero) < 1 << 31:
                plan.stored[name] = tensor
                plan.scales[name] = scale, zero, 0
        return plan

    def dequantized(self, arrays: Mapping[str, Value]) -> tuple[dict[str, Value], list[str]]:
        """All arrays, and what to warn of."""
        beside = {each for scales in self.scales.values() for each in scales[:2] if isinstance(each, str)}
        found, worst = {name: array for name, array in arrays.items() if name not in beside}, 0.0
        for name, (scale, zero, axis) in self.scales.items():
            array = read(arrays[name])
            try:
                if isinstance(scale, str):
                    along = [1] * array.ndim
                    along[axis] = array.shape[axis]
                    scale, zero = (read(arrays[each]).reshape(along) for each in (scale, zero))
                scale = np.asarray(scale, np.float32)
                found[name] = (array.astype(np.float32) - np.asarray(zero, np.float32)) * scale
            except (ValueError, TypeError, IndexError) as error:
                raise CheckpointError(f"damaged: the scales of {name} do not fit it: {error}\n{AGAIN}") from error
            worst = max(worst, float(np.max(scale, initial=0)) / 2)
        words = [f"the weights of {listed(self.halves)} are rounded to float16"] if self.halves else []
        if self.scales:
            cause = f"each number is at most {worst:.2g} from the one before quantization"  # half a scale
            words.append(f"dequantized {listed(self.scales)}: {cause}; the quantized model also rounds its inputs")
        return found, words
