"""What the tests share: eight host devices, programs that are compiled once a run, strict promotion, real data."""

import contextlib
import gc
import os
import pathlib
import shutil
import tempfile
import zlib

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import compiling
import jax
import jax.monitoring
import pytest

from clipjax._files import saving

MNIST = pathlib.Path(__file__).parents[2] / "shared" / "data" / "mnist"
HELD = 600  # programs in memory before they are dropped
TRAINING = ("clipping.md", "formats.md", "pruning.md", "quantizing.md", "shrinking.md")
COMPILED = pytest.StashKey[str]()
# Every program, however small, is kept: reading one takes a fifth of the time of compiling it.
KEPT = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}


def pytest_addoption(parser):
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="of each test's cases every N-th alone")


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
    compiling.install()
    config.pluginmanager.register(Programs())
    config.pluginmanager.register(Sample(config.getoption("--one-in")))


def pytest_unconfigure(config):
    if COMPILED in config.stash:
        shutil.rmtree(config.stash[COMPILED], ignore_errors=True)
        del os.environ["JAX_COMPILATION_CACHE_DIR"]


class Sample:
    """Every N-th case of each test that has several, so that each test runs.

    Where the counting begins depends on the test's name: else all would leave out the same column of a table.
    """

    def __init__(self, one_in):
        self.one_in = one_in

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        """Behind `-m`, which leaves out slow cases."""
        cases, kept, left = {}, [], []
        for item in items:
            if hasattr(item, "callspec"):
                cases.setdefault((item.path, item.originalname), []).append(item)
        chosen = set()
        for (_, name), group in cases.items():
            first = zlib.crc32(name.encode()) % min(self.one_in, len(group))
            chosen.update(group[first :: self.one_in])
        for item in items:
            (left if hasattr(item, "callspec") and item not in chosen else kept).append(item)
        items[:] = kept
        if left:
            config.hook.pytest_deselected(items=left)


class Programs:
    """A plugin, as a fixture of this folder would not reach the examples in clipjax/ and docs/."""

    def __init__(self):
        self.held = 0
        self.optimized = False
        jax.monitoring.register_event_duration_secs_listener(self.count)

    def count(self, event, *_, **__):
        self.held += event == "/jax/core/compile/backend_compile_duration"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        """What is compiled alike stands together in a file: between the two kinds all programs are dropped."""
        places = {item.path: i for i, item in reversed(list(enumerate(items)))}
        items.sort(key=lambda item: (places[item.path], _optimized(item)))

    def pytest_collection_finish(self):
        """What is there stays. Tracing makes many objects that live on, among which there is little to collect."""
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)

    def drop(self):
        self.held = 0
        jax.clear_caches()
        gc.collect()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        """A worker holds some hundred compiled programs at a time; what a test needs of the others is on disk."""
        if _optimized(item) != self.optimized:  # programs in memory do not know how they were compiled
            self.optimized = _optimized(item)
            self.drop()
        with compiling.optimized() if self.optimized else contextlib.nullcontext():
            done = yield
        if self.held > HELD and (nextitem is None or nextitem.path != item.path):
            self.drop()
        return done


def _optimized(item):
    """Marked tests, and on newer versions of JAX the examples whose output a reader compares.

    Without those that train many networks. `.ci/run` runs all on the newest version too.
    """
    if isinstance(item, pytest.DoctestItem):
        return not compiling.OLDER and item.path.name not in TRAINING
    return item.get_closest_marker("optimized") is not None


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


@pytest.fixture
def listed(monkeypatch):
    """Files with an entry for each leaf, however small the tree."""
    monkeypatch.setattr(saving, "SMALL", -1)
