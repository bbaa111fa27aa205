"""What the tests share: eight host devices, programs that are compiled once a run, strict promotion, real data."""

import contextlib
import functools
import gc
import os
import pathlib
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

MNIST = pathlib.Path(__file__).parents[2] / "shared" / "data" / "mnist"
COMPILED = pytest.StashKey[str]()
# Every program, however small, is kept: reading one takes a fifth of the time of compiling it.
KEPT = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}


def pytest_configure(config):
    """One folder of compiled programs for the workers, and for the processes that tests start, of this run alone.

    Who starts several runs (`make mutants`) names one folder for all of them.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.stash[COMPILED] = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="clipjax-compiled-")
        jax.config.update("jax_compilation_cache_dir", config.stash[COMPILED])
    for name, value in KEPT.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)
    config.pluginmanager.register(OneFile())


def pytest_unconfigure(config):
    if COMPILED in config.stash:
        shutil.rmtree(config.stash[COMPILED], ignore_errors=True)
        del os.environ["JAX_COMPILATION_CACHE_DIR"]


class OneFile:
    """A plugin, as a fixture of this folder would not reach the examples in clipjax/ and docs/."""

    # It trains 48 networks to compare optimizers; nothing in it depends on how they are compiled.
    quick = ("clipping.md",)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        """A worker holds the compiled programs of one file at a time; what the next needs of them is on disk."""
        with unoptimized() if item.path.name in self.quick else contextlib.nullcontext():
            done = yield
        if nextitem is None or nextitem.path != item.path:
            jax.clear_caches()
            gc.collect()
        return done


@contextlib.contextmanager
def unoptimized():
    """Whatever is compiled in this context is compiled as fast as can be."""
    from contract_row import QUICK  # which imports clipjax: not before its modules are collected

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick():
    """For a file of which compiling is most of the time, and in which no rounding or layout is the matter.

    What must be exact after optimization (landing, norms, passes over memory) does not use it.
    """
    with unoptimized():
        yield


@pytest.fixture(scope="module")
def strict():
    """No implicit promotion of dtypes or ranks: `pytestmark = pytest.mark.usefixtures("strict")` in a file."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def mnist_dir():
    """The folder with the four MNIST IDX files."""
    if not MNIST.is_dir():
        pytest.skip(f"no MNIST files at {MNIST}")
    return MNIST
