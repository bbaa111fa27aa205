"""What the tests share: eight host devices, compiled programs on disk, strict promotion and real data where asked for."""

import gc
import os
import pathlib
import shutil
import sys
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# A fresh folder for each run: both workers, and the processes that tests start, read what one of them has compiled.
# Whoever starts several runs (`make mutants`) gives all of them one folder.
_OWN_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _OWN_CACHE = tempfile.mkdtemp(prefix="clipjax-compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

MNIST = pathlib.Path(__file__).parents[2] / "shared" / "data" / "mnist"


def pytest_unconfigure():
    if _OWN_CACHE:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module():
    """A worker holds the compiled programs of one module at a time; what another module needs too is read from disk."""
    yield
    jax.clear_caches()
    gc.collect()
    if path := os.environ.get("CLIPJAX_TEST_MEMORY"):
        import resource
        with open(path, "a") as file:
            now = int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
            file.write(f"{os.getpid()} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} {now:.0f} {os.environ.get('PYTEST_CURRENT_TEST')}\n")


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
