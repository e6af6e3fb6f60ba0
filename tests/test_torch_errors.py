"""Every mistake that torch's own tests try with its recurrent modules: we raise the same type of error."""

import types
from typing import Any

import jax
import pytest
from flax import nnx

import jaxrnn

# What torch refuses and we take: another dtype than the weights', which promotes, as everywhere in JAX and Flax.
TAKEN = "input dtype .* does not match weight dtype"


def _samples(torch: types.ModuleType) -> list[tuple[str, Any]]:
    from torch.testing._internal import common_modules  # which needs expecttest, among the extra torch

    names = {getattr(torch.nn, n): n for n in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")}
    found = []
    for info in common_modules.module_db:
        if info.module_cls in names and info.module_error_inputs_func is not None:
            settings = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": False}
            samples = info.module_error_inputs_func(info, **settings)
            found += [(names[info.module_cls], sample) for sample in samples]
    return found


@pytest.mark.torch
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_mistakes_of_torchs_own_tests(torch: types.ModuleType, api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its tests let nobody set torch's flags from then on, as `parity` does.
    monkeypatch.setattr(torch.backends, "disable_global_flags", lambda: None)
    samples = _samples(torch)
    assert len(samples) >= 58
    taken = 0
    for name, sample in samples:
        made, called = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        settings = {key: value for key, value in made.kwargs.items() if key not in ("device", "dtype")}
        arguments = jax.tree.map(lambda a: a.numpy(), called.args) if called else ()

        def run(name: str = name, made: Any = made, settings: Any = settings, arguments: Any = arguments) -> None:
            if api == "nnx":
                nnx.eval_shape(lambda: getattr(jaxrnn, name)(*made.args, **settings, rngs=nnx.Rngs(0))(*arguments))
            else:
                module = getattr(jaxrnn.linen, name)(*made.args, **settings)
                jax.eval_shape(module.init, jax.random.key(0), *arguments)

        if TAKEN in sample.error_regex:
            with jax.numpy_dtype_promotion("standard"):
                run()
            taken += 1
            continue
        with pytest.raises(sample.error_type):
            run()
    assert taken == 3  # RNN, LSTM and GRU
