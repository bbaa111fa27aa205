"""What the tests share: eight host devices, strict promotion where a file asks for it, real data where it is."""

import os
import pathlib

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

MNIST = pathlib.Path(__file__).parents[2] / "shared" / "data" / "mnist"


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
