"""Settings that no state dict says: what differs from torch is warned of, and each remedy in a warning works."""

import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from flax import linen, nnx
from making import filled, filled_variables

import jaxrnn

pytest_plugins = "shared_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once", "standard_promotion")
F = jnp.float64
RNGS = nnx.Rngs(0)
REMEDY = re.compile(r"write (\w+)=(.+?) in Flax(?:, or (\w+)=(\S+) in torch)?")


def _warned(function: Callable[..., Any], *arguments: Any, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **settings)
    assert {warning.category for warning in caught} <= {UserWarning}
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message) for warning in caught]


# torch's and Flax's; an affine layer of 6 features.
NORMS: dict[str, tuple[Callable[[Any, Any], Any], dict[str, Any]]] = {
    "LayerNorm": (lambda nn, settings: nn.LayerNorm(6, **settings), {}),
    "GroupNorm": (lambda nn, settings: nn.GroupNorm(3, 6, **settings), {"num_groups": 3}),
    "InstanceNorm": (lambda nn, settings: nn.InstanceNorm1d(6, affine=True, **settings), {}),
    "RMSNorm": (lambda nn, settings: nn.RMSNorm(6, **settings), {}),
    "BatchNorm": (lambda nn, settings: nn.BatchNorm1d(6, **settings), {"use_running_average": False}),
}


class Wrapped(linen.Module):
    norm: linen.Module

    def __call__(self, x: Any) -> Any:
        return self.norm(x)


def _norm(name: str, api: str, **settings: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """What gives a state dict, and what calls the norm in training: its output, and a BatchNorm's running mean."""
    x = jnp.ones((4, 5, 6))
    settings = {**NORMS[name][1], "use_fast_variance": False, "param_dtype": F, **settings}
    if api == "linen":
        module = Wrapped(getattr(linen, name)(**settings))
        variables = filled_variables(module, x)

        def run(x: Any) -> Any:
            output, new = jax.jit(lambda x: module.apply(variables, x, mutable=["batch_stats"]))(x)
            return output, new["batch_stats"]["norm"]["mean"] if name == "BatchNorm" else ()

        return lambda: jaxrnn.checkpoint.linen.state_dict(module, variables, x), run
    ours = filled(lambda: nnx.Dict(norm=getattr(nnx, name)(6, **settings, rngs=nnx.Rngs(0))))
    nnx.update(ours, jax.tree.map(lambda array: array.astype(F), nnx.state(ours)))  # statistics are made in float32

    def run_nnx(x: Any) -> Any:
        return nnx.jit(lambda norm, x: norm(x))(ours.norm, x), ours.norm.mean[...] if name == "BatchNorm" else ()

    return lambda: jaxrnn.state_dict(ours), run_nnx


@pytest.mark.torch
@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize("name", NORMS)
def test_both_remedies_for_a_norm(torch: types.ModuleType, name: str, api: str) -> None:
    """Small inputs, to which epsilon matters, and statistics that are updated, to which momentum does."""
    x = 1e-2 * np.random.RandomState(0).randn(4, 5, 6)
    state_dict, run = _norm(name, api)
    texts = _warned(state_dict)
    remedies = [found.groups() for text in texts if (found := REMEDY.search(text))]
    owner = "Dict" if api == "nnx" else "Wrapped"
    assert [re.match(r"(\w+): norm\.(\w+)=", text)[2] for text in texts] == [remedy[0] for remedy in remedies]
    assert all(text.startswith(f"{owner}: norm.") for text in texts)
    assert [remedy[0] for remedy in remedies] == (["momentum"] if name == "BatchNorm" else ["epsilon"])

    def theirs(settings: dict[str, float], state_dict: Callable[[], Any]) -> Any:
        module = NORMS[name][0](torch.nn, settings).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = {key.removeprefix("norm."): torch.tensor(value) for key, value in state_dict().items()}
        module.load_state_dict(tensors, strict=False)
        first = torch.tensor(x)
        if name in ("BatchNorm", "InstanceNorm", "GroupNorm"):  # features first
            output = module(first.transpose(1, 2)).transpose(1, 2)
        else:
            output = module(first)
        return output.detach().numpy(), module.running_mean.numpy() if name == "BatchNorm" else ()

    before, default = theirs({}, state_dict), run(x)
    if name == "BatchNorm":  # the same output, but other statistics
        assert np.abs(before[1] - np.asarray(default[1])).max() > 1e-3
    else:
        assert np.abs(before[0] - np.asarray(default[0])).max() > 1e-4
    state_dict, run = _norm(name, api)
    in_torch = {remedy[2]: float(remedy[3]) for remedy in remedies}
    assert_close(theirs(in_torch, state_dict), run(x), atol=1e-7)
    in_flax = {remedy[0]: float(remedy[1]) for remedy in remedies}
    state_dict, run = _norm(name, api, **in_flax)
    assert _warned(state_dict) == []
    assert_close(theirs({}, state_dict), run(x), atol=1e-7)


def test_what_a_warning_says() -> None:
    model = nnx.Sequential(nnx.LayerNorm(3, rngs=RNGS), nnx.BatchNorm(3, epsilon=1e-3, rngs=RNGS))
    expected = [
        "Sequential: 0.epsilon=1e-06, where torch's default is eps=1e-05\n"
        "write epsilon=1e-05 in Flax, or eps=1e-06 in torch",
        "Sequential: 1.epsilon=0.001, where torch's default is eps=1e-05\n"
        "write epsilon=1e-05 in Flax, or eps=0.001 in torch",
        "Sequential: 1.momentum=0.99, where torch's default is momentum=0.1, which is 0.9 in Flax\n"
        "write momentum=0.9 in Flax, or momentum=0.01 in torch",
    ]
    assert _warned(jaxrnn.state_dict, model) == expected
    tensors = {"0.weight": np.ones(3), "0.bias": np.ones(3)}
    tensors |= {f"1.{name}": np.ones(3) for name in ("weight", "bias", "running_mean", "running_var")}
    assert _warned(jaxrnn.load_state_dict, model, tensors) == expected
    # Only of the layers that are loaded.
    some = {name: value for name, value in tensors.items() if name.startswith("0")}
    assert _warned(jaxrnn.load_state_dict, model, some, strict=False) == expected[:1]
    with warnings.catch_warnings():  # torch's model has them, too
        warnings.filterwarnings("ignore", r"Sequential: 0.epsilon")
        warnings.filterwarnings("ignore", r".*epsilon=0.001")
        warnings.filterwarnings("ignore", r".*momentum")
        jaxrnn.state_dict(model)
    module, x = linen.LayerNorm(), jnp.ones((2, 3))
    variables = filled_variables(module, x)
    expected = [expected[0].replace("Sequential: 0.", "LayerNorm: ")]
    assert _warned(jaxrnn.checkpoint.linen.state_dict, module, variables, x) == expected
    tensors = {"weight": np.ones(3), "bias": np.ones(3)}
    assert _warned(jaxrnn.checkpoint.linen.load_state_dict, module, variables, tensors, x) == expected


def test_a_norm_without_parameters() -> None:
    bare = nnx.LayerNorm(3, use_bias=False, use_scale=False, rngs=RNGS)
    [text] = _warned(jaxrnn.state_dict, nnx.List([bare]))
    assert text.startswith("List: 0.epsilon=1e-06")


@pytest.mark.parametrize(
    ("dtype", "silent"), [("float32", 1.1920929e-07), ("bfloat16", 1.19e-07), ("float64", 2.220446e-16)]
)
def test_torchs_rms_norm_goes_by_its_dtype(dtype: str, silent: float) -> None:
    jaxrnn.state_dict(nnx.RMSNorm(3, epsilon=silent, param_dtype=jnp.dtype(dtype), rngs=RNGS))
    [text] = _warned(jaxrnn.state_dict, nnx.RMSNorm(3, param_dtype=jnp.dtype(dtype), rngs=RNGS))
    assert f"eps=None, which is {silent:.3g} in Flax\nwrite epsilon={silent:.3g} in Flax, or eps=1e-06 in torch" in text


@pytest.mark.parametrize("make", [nnx.LayerNorm, nnx.RMSNorm])
def test_axes_over_which_torch_does_not_reduce(make: Any) -> None:
    epsilon = 1e-5 if make is nnx.LayerNorm else 1.19e-7
    [text] = _warned(jaxrnn.state_dict, make(3, epsilon=epsilon, reduction_axes=(-2, -1), rngs=RNGS))
    assert "reduction_axes=(-2, -1), where torch reduces over the axes of its weight\nwrite reduction_axes=-1" in text
    jaxrnn.state_dict(make(3, epsilon=epsilon, reduction_axes=(-1,), rngs=RNGS))


def _conv(make: Any, *settings: Any, **more: Any) -> Any:
    settings = (3, 2, *settings)
    return filled(lambda: make(*settings, **more, param_dtype=F, rngs=nnx.Rngs(0)))


def _linens(layer: Any) -> tuple[linen.Module, Any]:
    """The same convolution in Linen, with its variables."""
    names = ("kernel_size", "strides", "padding", "kernel_dilation", "transpose_kernel")
    settings = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    variables = {"params": {"kernel": layer.kernel[...], "bias": layer.bias[...]}}
    return getattr(linen, type(layer).__name__)(2, **settings, param_dtype=F), variables


def _in_torch(
    torch: types.ModuleType, layer: Any, x: np.ndarray, tensors: dict[str, np.ndarray], **padding: Any
) -> Any:
    """What torch's convolution gives for a Flax layer's tensors, channels last."""
    axes = len(layer.kernel_size)
    transpose = "Transpose" * isinstance(layer, nnx.ConvTranspose)
    make = getattr(torch.nn, f"Conv{transpose}{axes}d")
    settings = {"stride": layer.strides or 1, "dilation": layer.kernel_dilation or 1}
    theirs = make(3, 2, layer.kernel_size, **settings, **padding).double()
    theirs.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    return theirs(torch.tensor(np.moveaxis(x, -1, 1))).movedim(1, -1).detach()


# Settings, and what torch's convolution has in place of the padding that the warning proposes for Flax.
UNLIKE_TORCH: list[tuple[tuple, dict[str, Any], dict[str, Any]]] = [
    (((3,),), {"padding": "CIRCULAR"}, {"padding": "same"}),
    (((4, 3),), {"padding": "REFLECT"}, {"padding": "same"}),
    (((3,), 2), {"padding": "CIRCULAR"}, {"padding": 1}),
    (((3,),), {"padding": "CAUSAL", "kernel_dilation": 2}, {"padding": "same"}),
    (((4,),), {"padding": "SAME_LOWER"}, {"padding": "same"}),
    (((3,), 2), {}, {"padding": 1}),
    (((7, 3), (2, 1)), {"padding": "same"}, {"padding": (3, 1)}),
    (((3,), 2), {"kernel_dilation": 2}, {"padding": 2}),
]
LIKE_TORCH: list[tuple[tuple, dict[str, Any], dict[str, Any]]] = [
    (((3,),), {}, {"padding": 1}),
    (((4, 2),), {}, {"padding": "same"}),
    (((2,),), {"kernel_dilation": 3}, {"padding": "same"}),
    (((4,), 2), {}, {"padding": 1}),
    (((2, 1), (2, 3)), {}, {"padding": 0}),
    (((5,), 2), {"padding": 2}, {"padding": 2}),
    (((3,), 2), {"padding": "VALID"}, {}),
    (((3,), 2), {"padding": "SAME_LOWER"}, {"padding": 1}),
    (((1,),), {"padding": "CIRCULAR"}, {}),
]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("sizes", "settings", "padding"), UNLIKE_TORCH)
def test_a_padding_that_torch_lacks(torch: types.ModuleType, sizes: tuple, settings: dict, padding: dict) -> None:
    ours = _conv(nnx.Conv, *sizes, **settings)
    x = np.random.RandomState(0).randn(2, *[12] * len(ours.kernel_size), 3)
    [text] = _warned(jaxrnn.state_dict, ours)
    module, variables = _linens(ours)
    assert _warned(jaxrnn.checkpoint.linen.state_dict, module, variables, x) == [text]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = jaxrnn.state_dict(ours)
    found, silent = np.asarray(ours(x)), _in_torch(torch, ours, x, tensors, **padding)
    assert found.shape == silent.shape  # which is why nobody would notice
    assert np.abs(found - silent.numpy()).max() > 1e-2
    pads, mode = re.search(
        r"padding=0 after torch\.nn\.functional\.pad\(x, (\(.*?\))(?:, mode='(\w+)')?\)", text
    ).groups()
    first = torch.nn.functional.pad(torch.tensor(np.moveaxis(x, -1, 1)), eval(pads), mode or "constant")
    assert_close(_in_torch(torch, ours, first.movedim(1, -1).numpy(), tensors, padding=0).numpy(), found)
    ours.padding = eval(REMEDY.search(text)[2])
    assert_close(silent.numpy(), ours(x))
    assert _warned(jaxrnn.state_dict, ours) == []


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("sizes", "settings", "padding"), LIKE_TORCH)
def test_a_padding_that_torch_has(torch: types.ModuleType, sizes: tuple, settings: dict, padding: dict) -> None:
    ours = _conv(nnx.Conv, *sizes, **settings)
    x = np.random.RandomState(0).randn(2, *[12] * len(ours.kernel_size), 3)
    assert_close(_in_torch(torch, ours, x, jaxrnn.state_dict(ours), **padding).numpy(), ours(x))


TRANSPOSED: list[tuple[tuple, bool, dict[str, Any]]] = [
    (((3,), 2), True, {"padding": 1, "output_padding": 1}),
    (((5, 4), 2), True, {"padding": (2, 1), "output_padding": (1, 0)}),
    (((4,), 3), True, {"padding": 1, "output_padding": 1}),
    (((4,), 2), False, {"padding": 1}),
    (((3,), None), False, {"padding": 1}),
    (((2,), 3), False, {"output_padding": 1}),
    (((2,), 2), False, {}),
]


@pytest.mark.torch
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize(("sizes", "unlike", "padding"), TRANSPOSED)
def test_transposed_convolutions(
    torch: types.ModuleType, sizes: tuple, unlike: bool, padding: dict, transpose_kernel: bool
) -> None:
    ours = _conv(nnx.ConvTranspose, *sizes, transpose_kernel=transpose_kernel)
    x = np.random.RandomState(0).randn(2, *[6] * len(ours.kernel_size), 3)
    texts = _warned(jaxrnn.state_dict, ours)
    module, variables = _linens(ours)
    assert _warned(jaxrnn.checkpoint.linen.state_dict, module, variables, x) == texts
    assert len(texts) == unlike
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = jaxrnn.state_dict(ours)
    found, theirs = np.asarray(ours(x)), _in_torch(torch, ours, x, tensors, **padding).numpy()
    assert found.shape == theirs.shape
    if unlike:
        assert np.abs(found - theirs).max() > 1e-2
        cut = eval(re.search(r"padding=0 before torch\.nn\.functional\.pad\(y, (\(.*?\))\)", texts[0])[1])
        whole = _in_torch(torch, ours, x, tensors, padding=0).movedim(-1, 1)
        assert_close(torch.nn.functional.pad(whole, cut).movedim(1, -1).numpy(), found)
        ours.padding = eval(REMEDY.search(texts[0])[2])
        assert _warned(jaxrnn.state_dict, ours) == []
    assert_close(theirs, ours(x))


def test_a_circular_transposed_convolution() -> None:
    [text] = _warned(jaxrnn.state_dict, _conv(nnx.ConvTranspose, (3,), 2, padding="CIRCULAR"))
    assert text.startswith("ConvTranspose: padding='CIRCULAR', where torch only has padding_mode='zeros'\n")


@pytest.mark.torch
@pytest.mark.parametrize("make", [nnx.Conv, nnx.ConvTranspose])
def test_a_mask_is_in_the_kernel_that_torch_gets(torch: types.ModuleType, make: Any) -> None:
    mask = np.random.RandomState(1).randint(0, 2, (3, 3, 2))
    ours = _conv(make, (3,), padding="VALID", mask=jnp.asarray(mask))
    x = np.random.RandomState(0).randn(2, 9, 3)
    assert_close(_in_torch(torch, ours, x, jaxrnn.state_dict(ours), padding=0).numpy(), ours(x))
