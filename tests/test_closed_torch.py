"""torch's live modules, attribute by attribute: each is used, changes nothing, or is named with a remedy that works."""

import contextlib
import re
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from comparing import assert_close
from flax import nnx

import jaxrnn
from jaxrnn.checkpoint import CheckpointError
from jaxrnn.checkpoint.torch_modules import ATTRIBUTES, CLASSES, GLOBALS, METHODS, PARAMETERS

pytest_plugins = "shared_fixtures"
pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("compiled_once")]
X = np.random.RandomState(0).randn(5, 2, 3)


def _module(torch: types.ModuleType, name: str = "LSTM", *sizes: int, **settings: Any) -> Any:
    torch.manual_seed(0)
    return getattr(torch.nn, name)(*(sizes or (3, 4)), **settings, dtype=torch.float64)


def _numbers(module: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _run(torch: types.ModuleType, module: Any) -> np.ndarray:
    x = torch.tensor(X[0] if isinstance(module, torch.nn.modules.rnn.RNNCellBase) else X)
    return _first(module(x)).detach().numpy()


def _ours(module: Any) -> np.ndarray:
    ours = jaxrnn.from_torch(module)
    return np.asarray(_first(ours(X[0] if "Cell" in type(ours).__name__ else X)))


def _refused(module: Any) -> tuple[str, str]:
    """The cause and the remedy of a refusal."""
    with pytest.raises(CheckpointError) as caught:
        jaxrnn.from_torch(module)
    cause, remedy = str(caught.value).split("\n")
    assert cause.startswith(f"{type(module).__name__}: ")
    return cause, remedy


def _follow(remedy: str, torch: types.ModuleType, module: Any, **more: Any) -> Any:
    """Do what a remedy says; the module that it makes, or that from_torch makes after it."""
    names = {"torch_module": module, "torch": torch, "jaxrnn": jaxrnn, "nnx": nnx, **more}
    exec(remedy.partition(": ")[2], names)
    return names.get("ours") or jaxrnn.from_torch(module)


# Each table has all that torch has.


def test_the_tables_have_every_attribute_and_method_of_torch(torch: types.ModuleType) -> None:
    classes = [getattr(torch.nn, name) for name in CLASSES]
    assert {name for cls in classes for name in vars(cls(2, 3))} <= ATTRIBUTES.keys()
    assert {name for cls in classes for each in cls.__mro__ for name in vars(each)} <= METHODS.keys()
    theirs = vars(torch.nn.modules.module)
    assert {name for name in theirs if name.startswith("_global_")} == GLOBALS.keys()
    assert {name for name in dir(torch.nn.Parameter) if re.fullmatch(r"_.*hooks", name)} < PARAMETERS.keys()


def test_a_class_of_torch_that_is_new_is_not_passed_over(torch: types.ModuleType) -> None:
    bases = torch.nn.modules.rnn.RNNBase, torch.nn.modules.rnn.RNNCellBase
    theirs = [each for each in vars(torch.nn).values() if isinstance(each, type) and issubclass(each, bases)]
    assert {each.__name__ for each in theirs} == {*CLASSES, "RNNBase", "RNNCellBase"}


# The walk: each row with another value.


@pytest.mark.parametrize("name", METHODS)
def test_what_a_subclass_overrides(torch: types.ModuleType, name: str) -> None:
    """What is neutral is not called by a call of the module; the rest is refused, and its weights can be taken."""
    classes = [getattr(torch.nn, each) for each in CLASSES if hasattr(getattr(torch.nn, each), name)]
    assert classes
    for cls in {classes[0], classes[-1]}:
        module, plain, calls = _module(torch, cls.__name__), _module(torch, cls.__name__), []

        def override(self: Any, *arguments: Any, cls: Any = cls, calls: list = calls, **settings: Any) -> Any:
            calls.append(arguments)
            return getattr(cls, name)(self, *arguments, **settings)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            object.__setattr__(module, "__class__", type(cls.__name__, (cls,), {name: override}))
        if name == "__dict__":  # with which torch itself can do nothing
            with pytest.raises(TypeError):
                _run(torch, module)
            return
        if METHODS[name].use == "neutral":
            calls.clear()
            assert_close(_run(torch, module), _run(torch, plain), atol=0)
            ours = jaxrnn.from_torch(module)
            assert not calls
        else:
            cause, remedy = _refused(module)
            assert f"torch_module.{name}=" in cause
            ours = _follow(remedy, torch, module)
        assert_close(jaxrnn.state_dict(ours), _numbers(plain), atol=0)


def _other(torch: types.ModuleType, module: Any, name: str) -> Any:
    """Another value of an attribute; an error if there is none to try."""
    value = vars(module)[name]
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 0.25
        case str():
            return value.replace("TANH", "RELU") if "TANH" in value else {"tanh": "relu"}.get(value, "GRU")
        case set():
            return {"x"}
    if "hook" in name:
        return name.endswith("hook") or {7: lambda module, *arguments: arguments[-1]}
    number = torch.nn.Parameter(torch.ones(2))
    others = {
        "_parameters": lambda: {**value, "extra": number},
        "_buffers": lambda: {**value, "extra": torch.ones(2)},
        "_modules": lambda: {**value, "head": torch.nn.Linear(2, 2)},
        "_flat_weights": lambda: [weight * 2 for weight in value],
        "_flat_weights_names": lambda: value[::-1],
        "_flat_weight_refs": lambda: [None for _ in value],
        "_all_weights": lambda: [],
        "_compiled_call_impl": lambda: module._call_impl,
    }
    return others[name]()


@pytest.mark.parametrize("kind", ["RNN", "GRUCell", "RNNCell"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if row.use == "used" else name for name, row in ATTRIBUTES.items()],
)
def test_an_attribute_with_another_value(torch: types.ModuleType, name: str, kind: str) -> None:
    module = _module(torch, kind, **({"num_layers": 2} if kind == "RNN" else {})).eval()
    own = vars(module)
    if name not in own and name != "_compiled_call_impl":
        assert any(name in vars(_module(torch, each)) for each in CLASSES)
        return
    before = _run(torch, module)
    own.setdefault("_compiled_call_impl", None)
    own[name] = _other(torch, module, name)
    if ATTRIBUTES[name].use == "warned":
        with pytest.warns(UserWarning, match=f"torch_module.{name}=.* is not as in torch") as caught:
            assert_close(_ours(module), before)
        _follow(str(caught[0].message).partition("\n")[2], torch, module)
        return
    try:
        expected = _run(torch, module)
    except (RuntimeError, ValueError, AttributeError, TypeError, IndexError, AssertionError):
        with contextlib.suppress(ValueError):  # there is nothing to compare with
            jaxrnn.from_torch(module)
        return
    try:
        found = _ours(module)
    except CheckpointError as error:
        assert ATTRIBUTES[name].use in ("refused", "used")
        remedy = str(error).partition("\n")[2]
        ours = _follow(remedy, torch, module)
        x = X[0] if "Cell" in kind else X
        assert_close(_first(ours(x)), before if ATTRIBUTES[name].use == "refused" else _run(torch, module))
    else:
        assert_close(found, expected)


@pytest.fixture
def hooks(torch: types.ModuleType) -> Iterator[dict[str, Any]]:
    """torch's dicts of hooks of all modules, empty, and as they were after the test."""
    own = vars(torch.nn.modules.module)
    before = {name: own[name] for name in GLOBALS}
    for name, value in before.items():
        own[name] = type(value)() if hasattr(value, "clear") else value
    yield own
    own.update(before)


@pytest.mark.parametrize("name", GLOBALS)
def test_a_hook_of_all_modules(torch: types.ModuleType, name: str, hooks: dict[str, Any]) -> None:
    module, plain = _module(torch), _module(torch)
    expected = _run(torch, plain)
    if hasattr(hooks[name], "clear"):
        hooks[name][7] = lambda *arguments: None
    else:
        hooks[name] = True
    use = GLOBALS[name].use
    if use == "neutral":
        assert_close(_ours(module), expected)
    elif use == "refused":
        ours = _follow(_refused(module)[1], torch, module)
        assert_close(_first(ours(X)), expected)
    else:
        with pytest.warns(UserWarning, match=f"torch.nn.modules.module.{name}=") as caught:
            assert_close(_ours(module), expected)
        _follow(str(caught[0].message).partition("\n")[2], torch, module)


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_a_parameter_has_beside_numbers(torch: types.ModuleType, name: str) -> None:
    module = _module(torch, "GRUCell")
    if name == "requires_grad":
        module.weight_hh.requires_grad_(False)
        module.bias_ih.requires_grad_(False)
    elif name == "_backward_hooks":
        module.weight_hh.register_hook(lambda gradient: 2 * gradient)
    else:
        module.weight_hh.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.warns(UserWarning, match=name) as caught:
        ours = jaxrnn.from_torch(module)
    assert_close(ours(X[0]), _run(torch, module))
    remedy = str(caught[0].message).partition("\n")[2]
    if name != "requires_grad":
        _follow(remedy, torch, module)
        return
    names: dict[str, Any] = {"nnx": nnx}
    exec(remedy.partition(": ")[2], names)
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(ours, names["wrt"]))} == {"weight_ih", "bias_hh"}
    jaxrnn.from_torch(module.requires_grad_(False))  # all of it: to be called, not trained


# Each finding.


def _with_forward(torch: types.ModuleType, name: str) -> Any:
    cls = getattr(torch.nn, name)

    def forward(self: Any, *arguments: Any) -> Any:
        return cls.forward(self, *(2 * argument for argument in arguments))

    return type("Doubled", (cls,), {"forward": forward})(3, 4).double()


def _with_a_call_further_up(torch: types.ModuleType) -> Any:
    """Its `__call__` is that of a class after torch.nn.GRU, but before torch.nn.Module."""

    class Doubling(torch.nn.Module):
        def __call__(self, x: Any) -> Any:
            return super().__call__(2 * x)

    return type("Doubled", (torch.nn.GRU, Doubling), {})(3, 4).double()


def _with_property(torch: types.ModuleType) -> Any:
    cell = _module(torch, "GRUCell")
    weight = cell.weight_hh
    vars(cell)["weight_hh"] = 2 * weight.detach()
    return cell


def _hooked(torch: types.ModuleType, register: str, **settings: Any) -> Any:
    module = _module(torch)
    getattr(module, register)(lambda module, *arguments: None, **settings)
    return module


def _replaced(torch: types.ModuleType) -> Any:
    module = _module(torch)
    forward = module.forward
    module.forward = lambda x: forward(2 * x)
    return module


UNLIKE: dict[str, tuple[Callable[[types.ModuleType], Any], str]] = {
    "forward of layers": (lambda torch: _with_forward(torch, "LSTM"), "torch_module.forward="),
    "forward of a cell": (lambda torch: _with_forward(torch, "GRUCell"), "torch_module.forward="),
    "call of another base": (_with_a_call_further_up, "torch_module.__call__="),
    "forward of the instance": (_replaced, "torch_module.forward="),
    "a weight of the instance": (_with_property, "torch_module.weight_hh="),
    "pre-hook": (lambda torch: _hooked(torch, "register_forward_pre_hook"), "torch_module._forward_pre_hooks="),
    "pre-hook, keywords": (
        lambda torch: _hooked(torch, "register_forward_pre_hook", with_kwargs=True),
        "torch_module._forward_pre_hooks=",
    ),
    "hook": (lambda torch: _hooked(torch, "register_forward_hook"), "torch_module._forward_hooks="),
    "hook, always": (
        lambda torch: _hooked(torch, "register_forward_hook", always_call=True),
        "torch_module._forward_hooks=",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_module_that_computes_something_else(torch: types.ModuleType, name: str) -> None:
    make, words = UNLIKE[name]
    module = make(torch)
    cause, remedy = _refused(module)
    assert words in cause
    ours = _follow(remedy, torch, module)
    plain = _module(torch, type(ours).__name__)
    plain.load_state_dict(module.state_dict())
    assert_close(_first(ours(X[0] if "Cell" in type(ours).__name__ else X)), _run(torch, plain))


class _Scale:
    """A parametrization without weights of its own, of which a file holds nothing."""

    @staticmethod
    def make(torch: types.ModuleType) -> Any:
        return type("Scale", (torch.nn.Module,), {"forward": lambda self, weight: 3 * weight})()


def _parametrized(torch: types.ModuleType, *norms: str) -> Any:
    module = _module(torch)
    for norm in norms:
        if norm == "scale":
            torch.nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", _Scale.make(torch))
        else:
            getattr(torch.nn.utils.parametrizations, norm)(module, "weight_hh_l0")
    return module


@pytest.mark.parametrize("norms", [("weight_norm", "scale"), ("spectral_norm", "scale"), ("scale",), ("orthogonal",)])
@pytest.mark.parametrize("saved", [False, True])
def test_parametrizations_that_fold_does_not_know(torch: types.ModuleType, norms: tuple, saved: bool) -> None:
    module = _parametrized(torch, *norms).eval()
    expected = _run(torch, module)
    _, remedy = _refused(module)
    if saved:  # torch says in its state dict, beside the tensors, which modules there are
        ours = jaxrnn.LSTM(3, 4, param_dtype="float64", rngs=nnx.Rngs(0))
        with pytest.raises(CheckpointError, match="a parametrization computes weight_hh_l0 from parametrizations"):
            jaxrnn.load_state_dict(ours, module.state_dict())
    assert_close(_first(_follow(remedy, torch, module)(X)), expected)


@pytest.mark.parametrize("parametrized", [False, True])
def test_spectral_norm_in_training(torch: types.ModuleType, parametrized: bool) -> None:
    norm = (torch.nn.utils.parametrizations if parametrized else torch.nn.utils).spectral_norm
    module = norm(_module(torch), "weight_hh_l0")
    module(torch.tensor(X))
    cause, remedy = _refused(module)
    assert "spectral_norm changes weight_hh_l0 at every call" in cause
    ours = _follow(remedy, torch, module)
    assert_close(_first(ours(X)), _run(torch, module))


def _in_parts(torch: types.ModuleType, utility: str) -> Any:
    """A module of which a utility of torch's computes a weight."""
    import torch.nn.utils.prune

    module = _module(torch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if utility == "pruned":
            torch.nn.utils.prune.random_unstructured(module, "weight_hh_l0", amount=0.5)
        else:
            utilities = torch.nn.utils.parametrizations if utility == "parametrized" else torch.nn.utils
            utilities.weight_norm(module, "weight_hh_l0")
    return module


@pytest.mark.parametrize("name", ["weight_norm", "pruned", "parametrized"])
def test_parts_of_weights_are_folded(torch: types.ModuleType, name: str) -> None:
    module = _in_parts(torch, name)
    assert_close(_ours(module), _run(torch, module))
    if name == "pruned":  # with a method of one's own
        hook = next(iter(module._forward_pre_hooks.values()))
        hook.__class__ = type("Own", (type(hook),), {"apply_mask": lambda self, module: 2 * module.weight_hh_l0_orig})
        assert "_forward_pre_hooks=" in _refused(module)[0]
    elif name == "parametrized":
        module.parametrizations.weight_hh_l0[0].register_forward_hook(lambda *arguments: None)
        assert "get_submodule('parametrizations.weight_hh_l0.0')._forward_hooks=" in _refused(module)[0]


def _twice(owner: Any, name: str) -> None:
    """Make an instance's method return twice what it returned."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *arguments: 2 * method(*arguments))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        ("weight_norm", lambda helper: setattr(helper, "dim", 1)),
        ("weight_norm", lambda helper: _twice(helper, "compute_weight")),
        ("pruned", lambda helper: _twice(helper, "apply_mask")),
        ("parametrized", lambda helper: setattr(helper[0], "dim", 1)),
        ("parametrized", lambda helper: _twice(helper[0], "forward")),
        ("parametrized", lambda helper: _twice(helper, "forward")),
    ],
)
def test_a_utility_that_was_changed(torch: types.ModuleType, make: str, change: Callable[[Any], None]) -> None:
    module = _in_parts(torch, make)
    expected = _run(torch, module)
    [helper] = module.parametrizations.values() if make == "parametrized" else module._forward_pre_hooks.values()
    change(helper)
    cause, remedy = _refused(module)
    assert "weight_hh_l0 is not what torch's utility makes of its parts" in cause
    assert_close(_first(_follow(remedy, torch, module)(X)), expected)


def test_two_utilities_on_one_weight(torch: types.ModuleType) -> None:
    import torch.nn.utils.prune

    module = _module(torch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module, "weight_hh_l0")
    torch.nn.utils.prune.random_unstructured(module, "weight_hh_l0_v", amount=0.5)
    assert "two of torch's utilities are stacked on weight_hh_l0" in _refused(module)[0]


def test_a_class_of_torch_that_was_patched(torch: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, forward = _run(torch, _module(torch, "GRU")), torch.nn.GRU.forward
    monkeypatch.setattr(torch.nn.GRU, "forward", lambda self, x, hx=None: forward(self, 2 * x, hx))
    cause, remedy = _refused(module := _module(torch, "GRU"))
    assert "torch_module.forward=" in cause
    assert_close(_first(_follow(remedy, torch, module)(X)), plain)


def test_the_remedy_keeps_the_evaluation_mode(torch: types.ModuleType) -> None:
    module = torch.nn.LSTM(3, 4, 2, dropout=0.5, dtype=torch.float64)
    module.register_forward_hook(lambda *arguments: None)
    assert not _follow(_refused(module)[1], torch, module).deterministic
    ours = _follow(_refused(module.eval())[1], torch, module)
    assert ours.deterministic
    assert_close(_first(ours(X)), _run(torch, module))


@pytest.mark.parametrize(("name", "tied"), [("LSTM", ("hh_l0", "hh_l1")), ("GRUCell", ("ih", "hh"))])
def test_tied_weights(torch: types.ModuleType, name: str, tied: tuple[str, str]) -> None:
    first, second = (f"weight_{each}" for each in tied)
    module = _module(torch, name, 4, 4, **({"num_layers": 2} if name == "LSTM" else {}))
    setattr(module, second, getattr(module, first))
    with pytest.warns(UserWarning, match=f"{first}, {second} are one parameter\nours train apart") as caught:
        ours = jaxrnn.from_torch(module)
    exec(str(caught[0].message).partition("to tie them, ")[2], {"ours": ours})
    assert getattr(ours, first) is getattr(ours, second)


def test_a_weight_that_something_outside_computes(torch: types.ModuleType) -> None:
    """As weight drop does it, which keeps the trained weight in the module around it."""
    module = _module(torch)
    trained = module.weight_hh_l0.detach()
    del module._parameters["weight_hh_l0"]
    module.weight_hh_l0 = torch.nn.functional.dropout(trained, 0.5)
    cause, remedy = _refused(module)
    assert "weight_hh_l0 is no parameter: something outside the module computes it" in cause
    ours = _follow(remedy, torch, module, weight=trained)
    assert_close(_first(ours(X)), _run(torch, module))


@pytest.mark.parametrize("kind", ["parameter", "buffer", "module"])
def test_what_is_beside_the_weights(torch: types.ModuleType, kind: str) -> None:
    module = _module(torch, "GRUCell")
    values = {"parameter": torch.nn.Parameter(torch.ones(2)), "buffer": torch.ones(2), "module": torch.nn.Linear(2, 2)}
    getattr(module, f"register_{kind}")("extra", values[kind])
    cause, remedy = _refused(module)
    assert re.search("it has extra.* beside the weights of its class", cause)
    assert_close(_follow(remedy, torch, module)(X[0]), _run(torch, module))


@pytest.mark.slow
def test_a_cell_without_biases_and_layers_with_another_nonlinearity(torch: types.ModuleType) -> None:
    """torch goes by the parameters, and by `mode`."""
    cell, rnn = _module(torch, "GRUCell"), _module(torch, "RNN")
    cell.bias_ih = cell.bias_hh = None
    assert_close(_ours(cell), _run(torch, cell))
    rnn.nonlinearity = "relu"
    assert_close(_ours(rnn), _run(torch, rnn))
    rnn.bias_ih_l0 = None
    cause, remedy = _refused(rnn)
    assert "it has no bias_ih_l0" in cause
    assert_close(_first(_follow(remedy, torch, rnn)(X)), _first(rnn.double()(torch.tensor(X))).detach().numpy())


def test_weights_that_torch_computes_with_and_does_not_save(torch: types.ModuleType) -> None:
    module = _module(torch)
    module._flat_weights[1] = torch.nn.Parameter(2 * module.weight_hh_l0.detach())
    module._flat_weight_refs[1] = None
    cause, remedy = _refused(module)
    assert "its _flat_weights, with which torch computes, are not its parameters" in cause
    assert_close(_first(_follow(remedy, torch, module)(X)), _run(torch, module))


def test_a_module_without_numbers(torch: types.ModuleType) -> None:
    weights = _module(torch).state_dict()
    module = torch.nn.LSTM(3, 4, device="meta")
    cause, remedy = _refused(module)
    assert "weight_ih_l0 has no numbers yet" in cause
    assert_close(_first(_follow(remedy, torch, module, tensors=weights)(X)), _run(torch, _module(torch)))
    lazy = torch.nn.ModuleDict({"head": torch.nn.LazyLinear(2)})
    ours = nnx.Dict(head=nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(CheckpointError, match=r"head.weight is a lazy tensor"):
        jaxrnn.load_state_dict(ours, lazy.state_dict())


@pytest.mark.parametrize("name", ["module", pytest.param("_orig_mod", marks=pytest.mark.slow)])
def test_wrappers_and_quantized_modules(torch: types.ModuleType, name: str) -> None:
    plain = _module(torch)
    wrapped = torch.nn.DataParallel(plain) if name == "module" else torch.compile(plain, backend="eager")
    with pytest.raises(TypeError, match=f"give the module in it, torch_module.{name}$"):
        jaxrnn.from_torch(wrapped)
    jaxrnn.from_torch(getattr(wrapped, name))
    with pytest.raises(TypeError, match="give the module that was quantized, or save its state_dict"):
        jaxrnn.from_torch(torch.ao.nn.quantizable.LSTM(3, 4))


@pytest.mark.slow
def test_a_subclass_that_computes_the_same(torch: types.ModuleType) -> None:
    class Named(torch.nn.LSTM):
        unit = "step"

        def __init__(self, *sizes: int, note: str) -> None:
            super().__init__(*sizes)
            self.note, self.dropped = note, torch.nn.Dropout(0.5)

        def steps(self, x: Any) -> Any:
            return self(x)

    module = Named(3, 4, note="a").double()
    module.compile(backend="eager")
    module.flatten_parameters = lambda: None  # as wrappers for weight drop have it
    assert_close(_ours(module), _run(torch, module))
