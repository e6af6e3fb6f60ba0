"""What every test runs under: float64 at hand, no implicit dtype promotion, PyTorch only where a test asks for it."""

import types

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "torch: compares with a live PyTorch; skipped where there is none")


@pytest.fixture
def torch() -> types.ModuleType:
    """PyTorch, on one thread since tests run beside each other; skips the test where there is none."""
    module = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'jaxrnn[torch]'")
    module.set_num_threads(1)
    return module
