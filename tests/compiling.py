"""How tests compile: as fast as can be, but in the files whose matter is what optimization does to the numbers.

Most of a test's time is XLA's. A file or a test that is marked `optimized` compiles as a user's program does. Inside of
other tests `with optimized():` does so for a function that is jitted there; what is in memory is not compiled again.
"""

import contextlib

import jax
from jax._src import compiler  # the one place that all programs pass, those of single operations too

# Code is generated in one part, as the other core has tests of its own; that changes no number.
ONE_PART = {"xla_cpu_parallel_codegen_split_count": 1}
# The older jaxlib compiles faster without its fusion emitters; newer ones have no such option.
QUICK = ONE_PART | {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    QUICK |= {"xla_cpu_use_fusion_emitters": False}

_users_options = compiler.get_compile_options
_overrides = QUICK


def _options(*args, env_options_overrides=None, **kwargs):
    return _users_options(*args, env_options_overrides=_overrides | (env_options_overrides or {}), **kwargs)


def install():
    """From here on, programs are compiled quickly."""
    compiler.get_compile_options = _options


@contextlib.contextmanager
def optimized():
    """A function that is jitted and called in this context is compiled as a user's program is."""
    global _overrides
    kept, _overrides = _overrides, ONE_PART
    try:
        yield
    finally:
        _overrides = kept
