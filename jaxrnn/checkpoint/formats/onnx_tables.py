"""The closed tables of ONNX: what becomes of each field of a model, a graph, a function, and a node."""

from collections.abc import Sequence

from jaxrnn.checkpoint.tables import UNKNOWN, USED, Row, Table, neutral, refused, warned

INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
OUTPUTS = ("Y", "Y_h", "Y_c")
# As Keras's go_backwards, whose output is not flipped back.
_FLIP = (
    "flip its input and its output along the time axis: jaxrnn.flip_sequences(x, lengths, batch_first=x.ndim > 2 and "
    "batch_first), where lengths may be None"
)
_AS_HX = warned(None, remedy="give it to each call as hx")


def _operator(kind: str, versions: Sequence[int], **more: Row) -> Table:
    """What becomes of a node's attributes, inputs and outputs. A node with one that is refused is left out."""
    rows = {
        **dict.fromkeys(("X", "W", "R", "B", "hidden_size", "Y"), USED),
        "sequence_lens": warned(None, remedy="give them to each call as lengths"),
        "initial_h": _AS_HX,
        "Y_h": neutral("an output"),
        "direction": warned("forward", "bidirectional", remedy=_FLIP),  # "reverse", for others are refused
        **dict.fromkeys(("activations", "activation_alpha", "activation_beta", "clip"), USED),  # see onnx_activations
        "layout": refused(0, 1, remedy=""),  # 1: said as batch_first
        "output_sequence": neutral("whether Y is an output"),
        "since_version": warned(*versions, remedy=UNKNOWN),
    }
    return Table(f"ONNX's {kind}", rows | more)


OPERATORS = {
    "LSTM": _operator(
        "LSTM", (1, 7, 14, 22),
        initial_c=_AS_HX, P=USED, Y_c=neutral("an output"), input_forget=refused(0, remedy=""),
    ),
    "GRU": _operator(
        "GRU", (1, 3, 7, 14, 22),
        linear_before_reset=refused(1, remedy="where torch's GRU has 1"),
    ),
    "RNN": _operator("RNN", (1, 7, 14, 22)),
}  # fmt: skip
_NAME, _TEXT = neutral("a name"), neutral("text for people")
_DEVICES = neutral("on which devices it runs")
MODEL = Table(
    "ONNX's ModelProto",
    {
        **dict.fromkeys(("graph", "functions", "opset_import"), USED),
        **dict.fromkeys(("producer_name", "producer_version", "domain", "model_version"), _NAME),
        "ir_version": neutral("the version of the file's format"),
        "doc_string": _TEXT,
        "metadata_props": _TEXT,
        "training_info": neutral("how to train it, which no runtime uses to run it"),
        "configuration": _DEVICES,
    },
)
GRAPH = Table(
    "ONNX's GraphProto",
    {
        **dict.fromkeys(("node", "initializer", "sparse_initializer", "input", "value_info"), USED),
        "name": _NAME,
        "doc_string": _TEXT,
        "metadata_props": _TEXT,
        "output": neutral("which values are returned"),
        "quantization_annotation": neutral("which values are scales of others; nodes do the computing"),
    },
)
NODE = Table(
    "ONNX's NodeProto",
    {
        **dict.fromkeys(("input", "output", "name", "op_type", "domain", "overload", "attribute"), USED),
        "metadata_props": USED,
        "doc_string": _TEXT,
        "device_configurations": _DEVICES,
    },
)
FUNCTION = Table(
    "ONNX's FunctionProto",
    {
        **dict.fromkeys(("name", "domain", "overload", "input", "node", "opset_import", "value_info"), USED),
        "attribute_proto": USED,
        "attribute": neutral("names of attributes, to which its nodes refer"),
        "output": neutral("which values are returned"),
        "doc_string": _TEXT,
        "metadata_props": _TEXT,
    },
)
