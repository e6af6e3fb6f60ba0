"""What every test runs under: float64 at hand, no implicit dtype promotion, PyTorch only where a test asks for it."""

import gc
import importlib.util
import os
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

WORTH_KEEPING = 0.3  # seconds that a program takes to compile; to keep them all would take longer than it saves

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes, in the tests' own process


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests of PyTorch, and leave out tests marked `thorough`, unless --thorough asks for them."""
    for item in items:
        if item.get_closest_marker("torch") or "torch" in getattr(item, "fixturenames", ()):
            item.add_marker("libraries")
    if not config.getoption("--thorough"):
        chosen = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("thorough")])
        items[:] = chosen


def pytest_configure(config: pytest.Config) -> None:
    # Most of the time goes to compiling, and this halves it; tests that read compiled programs ask for `optimized`.
    if not config.getoption("--optimized"):
        jax.config.update("jax_disable_most_optimizations", True)
        # Later releases of XLA do not know the flag, and stop the process: JAX's own, and a TPU's compiler.
        if jax.__version_info__ < (0, 11) and importlib.util.find_spec("libtpu") is None:
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    gc.set_threshold(100_000, 50, 100)  # what JAX traces and keeps would be searched again and again
    _keep_programs(config)
    for name, examples in (("quick", 100), ("thorough", 2500)):  # no deadline, for what is new compiles
        hypothesis.settings.register_profile(name, max_examples=examples, deadline=None)
    hypothesis.settings.load_profile("thorough" if config.getoption("--thorough") else "quick")


def _keep_programs(config: pytest.Config) -> None:
    """For the next run, those that take long to compile; JAX finds them by the program, versions and flags."""
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    folder = config.cache.mkdir("jax")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    if not hasattr(config, "workerinput"):
        for path in folder.glob("*"):
            if path.stat().st_mtime < time.time() - 7 * 24 * 3600:
                path.unlink(missing_ok=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="whole tables and more random inputs: minutes longer")
    parser.addoption("--fuzz", type=int, metavar="N", help="in test_fuzz.py: read N mutated files for each reader")
    parser.addoption("--fuzz-first", type=int, default=0, metavar="K", help="the number of the first of them")
    parser.addoption("--optimized", action="store_true", help="compile every program as users do: twice as long")


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """The parity runner sets JAX's precision of products: for the one test."""
    yield
    jax.config.update("jax_default_matmul_precision", None)


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compile as users do, for tests that read kernels, memory or collectives in the compiled program."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # what is kept tells less of itself
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether to take the time for everything."""
    return bool(request.config.getoption("--thorough"))


@pytest.fixture(scope="session")
def torch() -> types.ModuleType:
    """PyTorch, on one thread since tests run beside each other; skips the test where there is none."""
    module = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'jaxrnn[torch]'")
    module.set_num_threads(1)
    return module


@pytest.fixture
def refusal() -> Callable[[Path], str]:
    """A function that tells why `load` refuses a file, having checked that the message has path, cause and remedy."""
    from jaxrnn import checkpoint

    def refuse(path: Path) -> str:
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.load(path)
        path_and_cause, remedy = str(caught.value).split("\n")
        assert path_and_cause.startswith(f"{path}: ")
        assert remedy
        assert "weights_only" not in str(caught.value)
        return path_and_cause.removeprefix(f"{path}: ")

    return refuse
