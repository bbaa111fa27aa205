"""A state of one format that meets another one, another axis or other params: one error, before anything is done."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import formats

RNG = np.random.default_rng(0)
SQUARE = {"dense": {"kernel": jnp.asarray(RNG.normal(size=(64, 64)), jnp.float32)}}
HELD, STATE = clipjax.hold_once(clipjax.fake_quantize(formats.q4_0()), SQUARE)
GRID = clipjax.hold_once(clipjax.fake_quantize(4), SQUARE)
TILES = formats.fp8_e4m3((32, 32))
MINE = r"^`state` must belong .* uint16\[2, 64\] of 'q4_0' with outputs \(1,\) at 'dense/kernel', where "

OTHERS = {
    "dtype": (clipjax.fake_quantize(formats.mxfp4()), MINE + r"\"mxfp4.* has uint8\[2, 64\]\. Start anew"),
    "number": (clipjax.fake_quantize(formats.q4_1()), MINE + r"'q4_1' .* has uint16\[2, 64\], uint16\[2, 64\]"),
    "whole": (clipjax.fake_quantize(formats.nvfp4()), MINE + r"\"nvfp4.* has uint8\[4, 64\], float32\[\]"),
    "axis": (clipjax.fake_quantize(formats.q4_0(), axis=0), MINE + r"'q4_0' with outputs \(0,\) has uint16\[64, 2\]"),
    "grid": (clipjax.fake_quantize(4), "scales of a format at 'dense/kernel', where a grid has steps"),
}
ALIKE = {
    "q4_0": (clipjax.fake_quantize(formats.q5_0()), HELD, STATE),
    "axis": (
        clipjax.fake_quantize(TILES, axis=0),
        *clipjax.hold_once(clipjax.fake_quantize(TILES), SQUARE),
    ),
}


def update(tx, params, state):
    return tx.update(jax.tree.map(jnp.zeros_like, params), state, params)


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_layout_is_refused_everywhere(name):
    tx, match = OTHERS[name]
    chained = optax.chain(optax.sgd(0.1), tx)
    for call in (
        lambda: clipjax.check(HELD, STATE, tx),
        lambda: clipjax.check(HELD, (chained.init(HELD)[0], STATE), chained),
        lambda: clipjax.hold_once(tx, HELD, STATE),
        lambda: update(tx, HELD, STATE),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_inside_of_jit_the_error_has_what_is_known_there():
    tx = clipjax.fake_quantize(formats.q4_1())
    with pytest.raises(ValueError, match=r"uint16\[2, 64\] of a format at 'dense/kernel', where 'q4_1' with"):
        jax.jit(lambda state: update(tx, HELD, state))(STATE)


def test_a_grid_is_no_format():
    with pytest.raises(ValueError, match="no scales of a format at 'dense/kernel', where 'q4_0' has some"):
        clipjax.check(*GRID, clipjax.fake_quantize(formats.q4_0()))


@pytest.mark.parametrize("name", ALIKE)
def test_of_scales_that_are_laid_alike_an_update_fits_new_ones_and_others_refuse_them(name):
    tx, params, state = ALIKE[name]
    for call in (lambda: clipjax.check(params, state, tx), lambda: clipjax.hold_once(tx, params, state)):
        with pytest.raises(ValueError, match=r"^`state` must belong .* of '.*' with outputs \(1,\) at 'dense/kernel'"):
            call()
    updates, new = jax.jit(lambda: update(tx, params, state))()
    found = clipjax.quantized(optax.apply_updates(params, updates), new)["dense"]["kernel"]
    assert (found.format, found.axis) == {"q4_0": ("q5_0", (1,)), "axis": (TILES.name, (0,))}[name]
    assert not clipjax.check(optax.apply_updates(params, updates), new, tx)


@pytest.mark.parametrize("shape", [(63, 64), (96, 64), (64, 32), (64, 8, 8), (64,)])
def test_params_of_another_shape_are_refused(shape):
    params = {"dense": {"kernel": jnp.zeros(shape)}}
    got = r"uint16\[2, 64\] of 'q4_0' at 'dense/kernel', which has shape"
    for call in (clipjax.quantized, clipjax.check, clipjax.summarize):
        with pytest.raises(ValueError, match=got):
            call(params, STATE)
