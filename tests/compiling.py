"""How tests compile: as fast as can be, but in the files whose matter is what optimization does to the numbers.

Most of a test's time is XLA's. A file or a test that is marked `optimized` compiles as a user's program does. Inside of
other tests `with optimized():` does so for a function that is jitted there; what is in memory is not compiled again.
"""

import contextlib
import threading

import jax
from jax._src import compiler  # the one place that all programs pass, those of single operations too
from jax._src.interpreters import mlir

# Code is generated in one part, as the other core has tests of its own; that changes no number.
ONE_PART = {"xla_cpu_parallel_codegen_split_count": 1}
QUICK = ONE_PART | {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# The older jaxlib compiles faster without its fusion emitters; newer ones have no such option.
OLDER = jax.__version_info__ < (0, 11)
if OLDER:
    QUICK |= {"xla_cpu_use_fusion_emitters": False}

_users_options = compiler.get_compile_options
_overrides = QUICK
_new_context = mlir.make_ir_context
_contexts = threading.local()


def _options(*args, env_options_overrides=None, **kwargs):
    return _users_options(*args, env_options_overrides=_overrides | (env_options_overrides or {}), **kwargs)


def _context():
    """A context of MLIR for ten programs of a thread, as newer versions of JAX have it: a new one takes 5 ms."""
    used, context = getattr(_contexts, "used", 0), getattr(_contexts, "context", None)
    if context is None or used % 10 == 0:
        _contexts.context = context = _new_context()
    _contexts.used = used + 1
    return context


def install():
    """From here on, programs are compiled quickly."""
    compiler.get_compile_options = _options
    if OLDER:
        mlir.make_ir_context = _context


@contextlib.contextmanager
def optimized():
    """A function that is jitted and called in this context is compiled as a user's program is."""
    global _overrides
    kept, _overrides = _overrides, ONE_PART
    try:
        yield
    finally:
        _overrides = kept
