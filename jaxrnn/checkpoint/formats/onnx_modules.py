"""Put recurrent nodes of an ONNX model together as torch has them: layers of one module, each module once."""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.cells import Cell
from jaxrnn.checkpoint.errors import CheckpointError
from jaxrnn.checkpoint.formats import onnx_run
from jaxrnn.checkpoint.formats.onnx_graph import Graph
from jaxrnn.checkpoint.formats.reading import words_on_cell
from jaxrnn.checkpoint.named import Names, Origin
from jaxrnn.checkpoint.stored import equal

_MOST = 2_000


class OnnxLayer(NamedTuple):
    """A recurrent node.

    Attributes:
        node: its name, and in which graph it is.
        prefix: what the names of its weights start with.
        level: which layer of torch's module it is, if the names of its weights in the file say it.
        kind: "LSTM", "GRU" or "RNN".
        cell: the `jaxrnn.Cell` that computes the same.
        said: its settings, as `Described.said` has them.
        places: the graphs and names of its weights.
        weights: torch's, by name without the layer, for each direction.
        lengths: the graph and name of its sequence_lens.
        reverse: whether it runs backward alone.
        above: the graph and name of what makes its input, if that could be the layer below.
        output: the graph and name of its output.
        starts: the graphs and names of its first states.
        original: the node itself.
    """

    node: str
    prefix: str
    level: int | None
    kind: str
    cell: Cell
    said: dict[str, Any]
    places: tuple[tuple[Graph, str], ...]
    weights: list[dict[str, np.ndarray]]
    lengths: tuple[Graph, str]
    reverse: bool
    above: tuple[Graph, str] | None
    output: tuple[Graph, str]
    starts: tuple[tuple[Graph, str], ...]
    original: onnx_run.OnnxNode

    def continues(self, other: "OnnxLayer") -> bool:
        """Whether torch has both as layers of one module."""
        if self.reverse or other.reverse:
            return False
        one, two = self.weights[0], other.weights[0]
        hidden = two["weight_hh"].shape[1]
        same = (self.prefix, self.kind, self.said, self.lengths, len(self.weights)) == (
            other.prefix, other.kind, other.said, other.lengths, len(other.weights),
        )  # fmt: skip
        same = same and one["weight_hh"].shape == two["weight_hh"].shape and one.keys() == two.keys()
        if self.level is not None and other.level is not None:
            return same and self.level == other.level + 1
        same = same and self.above == other.output and one["weight_ih"].shape[1] == hidden * len(self.weights)
        # The layers of a module start at once.
        return same and not any(graph.comes_from(name, other.output) for graph, name in self.starts)

    def repeats(self, other: "OnnxLayer") -> bool:
        """Whether both are calls of one module. Branches may have the same weights, or others of the same names."""
        if (self.kind, self.said, self.reverse) != (other.kind, other.said, other.reverse):
            return False
        if len(self.weights) != len(other.weights):
            return False
        names = [(each.prefix, [name for _, name in each.places]) for each in (self, other)]
        alike = names[0] == names[1] or (self.level, self.prefix) == (other.level, other.prefix) != (None, self.prefix)
        # The second call of a module, as torch's exporter numbers it.
        alike = alike or re.fullmatch(re.escape(other.prefix[:-1]) + r"_\d+\.", self.prefix) is not None
        return self.places == other.places or (alike and all(map(_equal_all, self.weights, other.weights)))


class OnnxContents(NamedTuple):
    """What there is in the graphs.

    Attributes:
        layers: recurrent nodes.
        left_out: other recurrent nodes, and why.
        odd: the prefixes of nodes that torch has no layer for.
        loops: nodes that may be recurrences, and whether there are products of matrices in them.
        activations: for each path of a module, the operators Tanh and Relu in it.
        words: warnings.
    """

    layers: list[OnnxLayer]
    left_out: list[str]
    odd: set[str]
    loops: dict[str, bool]
    activations: dict[str, set[str]]
    words: list[str]


def put_layers(found: OnnxContents, tensors: Names[Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Origin]]:
    """Put the weights of all layers under torch's names; return what the file says of modules, and the originals."""
    if len(found.layers) > _MOST:  # each is compared with all
        cause = f"it has {len(found.layers)} recurrent nodes, and {_MOST} are the most that are read"
        raise CheckpointError(f"{cause}\nsave the weights in another format, such as .safetensors")
    modules: list[list[OnnxLayer]] = []
    for layer in found.layers:
        stack = next((stack for stack in modules if layer.continues(stack[-1])), None)  # with the same weights, too
        same = next((other for each in modules for other in each if layer.repeats(other)), None)
        if same is not None and stack is None:
            if layer.above == same.output and (layer.level is not None or layer.prefix != same.prefix):
                found.words.append(
                    f"the node {layer.node} has the weights of {same.node}, and takes its output: "
                    f"call the module {same.prefix!r} again, on its own output"
                )
            continue
        if stack:
            stack.append(layer)
        else:
            modules.append([layer])
    taken: dict[str, str] = {}
    said: dict[str, dict[str, Any]] = {}
    origins: dict[str, Origin] = {}
    for stack in modules:
        # Upper layers alone, as if the first is left out, are no whole module.
        first = f"{stack[0].prefix}l{stack[0].level}." if stack[0].level else stack[0].prefix
        prefix, number = first, 1
        while prefix in taken:
            prefix, number = f"{first}{number}.", number + 1
        if prefix != first:
            two = f"the nodes {taken[first]} and {stack[0].node} have the prefix {first!r}"
            found.words.append(f"{two}: load the second with the prefix {prefix!r}, or give the nodes other names")
        taken[prefix] = stack[0].node
        run = functools.partial(onnx_run.run, [layer.original for layer in stack])
        origins[prefix] = Origin(f"ONNX's {stack[0].kind}", {}, run, exact=False)
        if stack[0].said:
            said[prefix] = stack[0].said
        for level, layer in enumerate(stack):
            for suffix, weights in zip(("", "_reverse"), layer.weights, strict=False):
                for role, array in weights.items():
                    tensors.put(f"{prefix}{role}_l{level}{suffix}", array, f"{role} of the node {layer.node}")
        found.words.extend(f"{prefix or 'the RNN'} {text}" for text in words_on_cell(stack[0].cell))
        if stack[0].said.get("batch_first"):
            found.words.append(
                f"{prefix or stack[0].node} has layout=1, which weights do not say: make the module with "
                "batch_first=True"
            )
    return said, origins


def _equal_all(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
