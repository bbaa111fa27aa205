"""Tests compile quickly, and those marked `optimized` as a user's program: without this the marks could be idle."""

import compiling
import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def levels(monkeypatch):
    """The optimization level that each program asks for, None for the default."""
    found, users_options = [], compiling._users_options

    def options(*args, env_options_overrides, **kwargs):
        found.append(env_options_overrides.get("xla_backend_optimization_level"))
        return users_options(*args, env_options_overrides=env_options_overrides, **kwargs)

    monkeypatch.setattr(compiling, "_users_options", options)
    return found


def compile_one():
    jax.jit(lambda x: 3 * x + 1).lower(jax.ShapeDtypeStruct((3,), jnp.float32)).compile()


def test_programs_compile_quickly(levels):
    compile_one()
    with compiling.optimized():
        compile_one()
    assert levels == [0, None]


@pytest.mark.optimized
def test_marked_tests_compile_as_users_do(levels):
    compile_one()
    assert levels == [None]
