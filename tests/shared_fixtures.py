"""Fixtures that files of tests ask for by name, with `pytest_plugins` and `usefixtures`."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile equal programs of a file once: what is not jitted is traced, lowered and compiled at each call."""
    values = str(tmp_path_factory.mktemp("compiled")), 0.0, -1
    before = [getattr(jax.config, name) for name in _SETTINGS]
    for new in (values, before):
        for name, value in zip(_SETTINGS, new, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if new is values:
            yield


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """Flax's cells and norms and optax's steps mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def as_keras_computes() -> Iterator[None]:
    """Keras relies on promotion, and its GRU without biases on float32."""
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        yield
