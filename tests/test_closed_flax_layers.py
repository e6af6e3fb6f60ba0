"""Nothing of Flax's layers is passed over: their own lists of settings, and each one set to another value."""

import inspect
import re
import types
import warnings
from collections.abc import Iterator
from typing import Any

import flax.linen.dtypes
import flax.nnx.nn.dtypes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close
from flax import nnx
from making import filled, filled_variables

import jaxrnn
from jaxrnn.checkpoint.flax_layers import TABLES

pytest_plugins = "shared_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once")
F = jnp.float64
N, T, C = 2, 6, 4
Settings = dict[str, Any]


@pytest.fixture(autouse=True)
def _one_operation_at_a_time() -> Iterator[None]:
    with jax.disable_jit(), jax.numpy_dtype_promotion("standard"):
        yield


# Torch's class and its arguments, and Flax's settings with which both compute the same without a warning.
_EXACT = {"epsilon": 1e-5, "use_fast_variance": False}
_FEATURES = {"in_features": C, "out_features": 6, "features": 6}
_CONV = (
    {"in_channels": C, "out_channels": 6, "kernel_size": 3},
    {**_FEATURES, "kernel_size": (3,), "padding": "VALID"},
)
SAME: dict[str, tuple[str, Settings, Settings]] = {
    **dict.fromkeys(("Linear", "Dense"), ("Linear", {"in_features": C, "out_features": 6}, _FEATURES)),
    "Embed": ("Embedding", {"num_embeddings": 9, "embedding_dim": 6}, {"num_embeddings": 9, "features": 6}),
    "Conv": ("Conv1d", *_CONV),
    "ConvTranspose": ("ConvTranspose1d", *_CONV),
    "LayerNorm": ("LayerNorm", {"normalized_shape": C}, _EXACT),
    "GroupNorm": ("GroupNorm", {"num_channels": C, "num_groups": 2}, {"num_groups": 2, **_EXACT}),
    "InstanceNorm": ("InstanceNorm1d", {"num_features": C, "affine": True}, _EXACT),
    "RMSNorm": ("RMSNorm", {"normalized_shape": C}, {"epsilon": float(np.finfo("f8").eps)}),
    "BatchNorm": ("BatchNorm1d", {"num_features": C}, {"momentum": 0.9, "use_running_average": True, **_EXACT}),
}


def _rounded(*arrays: Any, dtype: Any = None, inexact: bool = True) -> Any:
    arrays = arrays[0] if isinstance(arrays[0], tuple) else arrays  # NNX gives a tuple, Linen does not
    return [None if array is None else jnp.round(array, 1) for array in arrays]


def _doubled(*args: Any, **settings: Any) -> Any:
    return 2 * jax.lax.dot_general(*args, **settings)


def _convolved_twice(*args: Any, **settings: Any) -> Any:
    return 2 * jax.lax.conv_general_dilated(*args, **settings)


# Another value for each setting, for the class or for all; and what changes in torch with it.
_SCALED = {"use_scale": False, "use_bias": False}
OTHERS: dict[Any, tuple[Settings, Settings]] = {
    **{setting: ({setting: 8}, {setting: 8}) for setting in ("in_features", "out_features")},
    ("Dense", "features"): ({"features": 8}, {"out_features": 8}),
    ("Embed", "features"): ({"features": 8}, {"embedding_dim": 8}),
    **{
        (name, setting): ({setting: 8}, {torchs: 8})
        for name in ("Conv", "ConvTranspose")
        for setting, torchs in (
            ("features", "out_channels"),
            ("out_features", "out_channels"),
            ("in_features", "in_channels"),
        )
    },
    "num_embeddings": ({"num_embeddings": 12}, {"num_embeddings": 12}),
    "use_bias": ({"use_bias": False}, {"bias": False}),
    **{
        (name, setting): (_SCALED, {affine: False})
        for name, affine in (
            ("LayerNorm", "elementwise_affine"),
            ("GroupNorm", "affine"),
            ("InstanceNorm", "affine"),
            ("BatchNorm", "affine"),
            ("RMSNorm", "elementwise_affine"),
        )
        for setting in _SCALED
    },
    **{setting: ({setting: jnp.float64}, {}) for setting in ("dtype", "param_dtype", "preferred_element_type")},
    "precision": ({"precision": "highest"}, {}),
    "promote_dtype": ({"promote_dtype": _rounded}, {}),
    "dot_general": ({"dot_general": _doubled}, {}),
    "dot_general_cls": ({"dot_general_cls": lambda: _doubled}, {}),
    "conv_general_dilated": ({"conv_general_dilated": _convolved_twice}, {}),
    "conv_general_dilated_cls": ({"conv_general_dilated_cls": lambda: _convolved_twice}, {}),
    **{
        f"{weight}_init": ({f"{weight}_init": jax.nn.initializers.ones}, {})
        for weight in ("kernel", "bias", "scale", "embedding")
    },
    **{
        f"{weight}_metadata": ({f"{weight}_metadata": {"note": 1}}, {})
        for weight in ("kernel", "bias", "scale", "embedding")
    },
    # The numbers in these are random; the last two follow from others.
    **{
        setting: ({}, {})
        for setting in ("kernel", "bias", "scale", "embedding", "mean", "var", "kernel_shape", "feature_axis")
    },
    "kernel_size": ({"kernel_size": (2,)}, {"kernel_size": 2}),
    "strides": ({"strides": (2,)}, {"stride": 2}),
    "padding": ({"padding": 1}, {"padding": 1}),
    ("ConvTranspose", "padding"): ({"padding": ((1, 1),)}, {"padding": 1}),
    "kernel_dilation": ({"kernel_dilation": (2,)}, {"dilation": 2}),
    "mask": ({"mask": np.arange(3 * C * 6).reshape(3, C, 6) % 3 > 0}, {}),
    "input_dilation": ({"input_dilation": 2, "padding": 0}, {}),
    "feature_group_count": ({"feature_group_count": 2}, {"groups": 2}),
    "transpose_kernel": ({"transpose_kernel": True, "mask": None}, {}),
    "epsilon": ({"epsilon": 1e-3}, {"eps": 1e-3}),
    "momentum": ({"momentum": 0.5}, {"momentum": 0.5}),
    "reduction_axes": ({"reduction_axes": (-2, -1)}, {}),
    ("GroupNorm", "reduction_axes"): ({"reduction_axes": (-1,)}, {}),
    "feature_axes": ({"reduction_axes": 1, "feature_axes": 1}, {}),
    ("InstanceNorm", "feature_axes"): ({"feature_axes": 1}, {}),
    "axis": ({"axis": 1}, {}),
    "axis_name": ({"axis_name": "devices"}, {}),
    "axis_index_groups": ({"axis_index_groups": [[0], [1]]}, {}),
    "use_fast_variance": ({"use_fast_variance": True}, {}),
    "force_float32_reductions": ({"force_float32_reductions": False}, {}),
    "num_groups": ({"num_groups": 4}, {"num_groups": 4}),
    "group_size": ({"group_size": 1, "num_groups": None}, {"num_groups": 4}),
    "num_features": ({"num_features": 8}, {"num_features": 8}),
    **{(name, "num_features"): ({"num_features": 8}, {"normalized_shape": 8}) for name in ("LayerNorm", "RMSNorm")},
    ("GroupNorm", "num_features"): ({"num_features": 8}, {"num_channels": 8}),
    "use_running_average": ({"use_running_average": False}, {}),
    "rngs": ({"rngs": 1}, {}),
    "name": ({"name": "head"}, {}),
    "parent": ({"parent": None}, {}),
}
ROWS = [(kind, setting) for kind, table in TABLES.items() for setting in table]


class Pair:
    """A layer of Flax, with the numbers of torch's, as functions of the same input."""

    def __init__(self, torch: types.ModuleType, kind: type, changed: Settings, in_torch: Settings) -> None:
        torchs, arguments, settings = SAME[kind.__name__]
        self.torch = torch
        self.theirs = getattr(torch.nn, torchs)(**arguments | in_torch).double()
        random = np.random.RandomState(0)
        with torch.no_grad():
            for value in self.theirs.state_dict().values():
                if value.is_floating_point():  # positive: some are variances
                    value.copy_(torch.tensor(random.uniform(0.2, 1, tuple(value.shape)).astype(np.float32)))
        self.theirs.train(changed.get("use_running_average") is False)
        sizes = arguments | in_torch
        features = next(
            (sizes[k] for k in ("in_features", "in_channels", "num_features", "num_channels") if k in sizes), C
        )
        features = int(np.ravel(sizes.get("normalized_shape", features))[-1])
        self.last = kind.__name__ in ("Linear", "Dense", "Embed", "LayerNorm", "RMSNorm")
        self.as_torch = 1 in (changed.get("axis"), changed.get("feature_axes"))
        x = normal(N, T, features)
        self.x = np.arange(N * T).reshape(N, T) % 9 if kind.__name__ == "Embed" else x
        given = {"num_features": features, "param_dtype": F, "rngs": 0} | settings | changed
        names = inspect.signature(kind.__init__).parameters
        given = {name: value for name, value in given.items() if name in names}
        as_flax = self.x.swapaxes(1, 2) if self.as_torch else self.x
        if issubclass(kind, nnx.Module):
            self.ours = filled(lambda: kind(**given | {"rngs": nnx.Rngs(given["rngs"])}))
            nnx.update(self.ours, jax.tree.map(lambda a: jnp.asarray(a, F), nnx.state(self.ours)))
        else:
            self.ours = kind(**given)
            variables = self.on_devices(lambda: filled_variables(self.ours, as_flax))
            self.variables = jax.tree.map(lambda a: jnp.asarray(a, F), variables)
        self.as_flax = as_flax

    def on_devices(self, function: Any) -> Any:
        """Call where there is an axis of devices, if the layer reduces over one."""
        if not getattr(self.ours, "axis_name", None):
            return function()
        found: list[Any] = []
        jax.vmap(lambda _: found.append(function()), axis_name="devices")(jnp.zeros(2))
        return found[0]

    def load(self) -> list[str]:
        """Load torch's numbers, and return the warnings."""
        tensors = self.theirs.state_dict()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if isinstance(self.ours, nnx.Module):
                jaxrnn.load_state_dict(self.ours, tensors)
            else:
                load = jaxrnn.checkpoint.linen.load_state_dict
                loaded = self.on_devices(lambda: load(self.ours, self.variables, tensors, self.as_flax))
                self.variables = loaded.variables
        return [str(warning.message) for warning in caught]

    def same(self, as_torch: Any = lambda x: x) -> None:
        """Check that both compute the same; `as_torch` changes torch's input."""
        if isinstance(self.ours, nnx.Module):
            found = self.ours(self.as_flax)
        else:
            found = self.ours.apply(self.variables, self.as_flax, mutable=["batch_stats"])[0]
        x = as_torch(self.torch.tensor(self.x))
        expected = self.theirs(x if self.last else x.transpose(1, 2)).detach().numpy()
        assert_close(found, expected if self.last != self.as_torch else expected.swapaxes(1, 2))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize(("kind", "setting"), ROWS, ids=[f"{TABLES[kind].title}-{setting}" for kind, setting in ROWS])
def test_each_setting_with_another_value(torch: types.ModuleType, kind: Any, setting: str) -> None:
    row = TABLES[kind][setting]
    changed, in_torch = OTHERS.get((kind.__name__, setting)) or OTHERS[setting]
    pair = Pair(torch, kind, changed, in_torch)
    found = pair.load()
    if row.use == "neutral":
        assert found == []
    if row.use == "warned":
        [text] = found
        assert re.fullmatch(rf"{kind.__name__}: {setting}=.*\n{re.escape(row.words)}", text, re.S)
    remedies = [re.search(rf"{setting}=(\S+?),? (?:in Flax|$)|{setting}=(\S+)$", text) for text in found]
    if not found or setting in ("epsilon", "momentum"):  # torch has the same value
        pair.same()
    else:
        [written] = remedies
        assert written
        plain = Pair(torch, kind, {setting: _plain(written[1] or written[2])}, {})
        assert plain.load() == []
        plain.same()
    if setting == "input_dilation":
        assert "put input_dilation - 1 zeros between the inputs" in row.words
        pair.same(lambda x: torch.stack([x, 0 * x], dim=2).flatten(1, 2)[:, :-1])


def _plain(text: str) -> Any:
    """The value that a remedy writes."""
    return eval(text, {"jax": jax, "flax": flax})


def _own_list(kind: Any) -> set[str]:
    """The settings of a class: its constructor's arguments, and an NNX layer's attributes."""
    names = inspect.signature(kind.__init__).parameters.keys() - {"self"}
    if not issubclass(kind, nnx.Module):
        return set(names)
    sizes = {"num_features": C, "num_groups": 2} | SAME[kind.__name__][2]
    given = {name: value for name, value in sizes.items() if name in names}
    layer = filled(lambda: kind(**given, rngs=nnx.Rngs(0)))
    return names | {name for name in vars(layer) if not name.startswith("_")}


@pytest.mark.parametrize("kind", TABLES, ids=[table.title for table in TABLES.values()])
def test_the_tables_have_all_settings(kind: Any) -> None:
    if missing := _own_list(kind) - TABLES[kind].keys():
        pytest.fail(f"{TABLES[kind].title} has settings that its table has not: {sorted(missing)}")


def test_a_setting_that_no_table_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TABLES[nnx.Linear], "precision")
    with pytest.warns(UserWarning, match=r"^Linear: precision=None\njaxrnn does not know what it does"):
        jaxrnn.state_dict(filled(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0))))
