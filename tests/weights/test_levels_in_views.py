"""Levels of one leaf on a format: in a view of blocks, as a CPU computes them, and entry by entry, as others do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import formats
from clipjax._maths import format_blocks
from clipjax._weights import leaf_format

FORMS = [
    formats.q4_0(),
    formats.q4_1(),
    formats.q8_0(),
    formats.tq2_0(),
    formats.mxfp4(),
    formats.nvfp4(),
    formats.int4(32),
    formats.nbits(4, 16),
    formats.fp8_e4m3((2, 128)),
    formats.nf4(),
    formats.register(
        formats.Format(
            "test_levels_in_views",
            lambda x, limit, precision, axes: (jnp.max(jnp.abs(x), axis=axes, keepdims=True) / 3,),
            lambda x, scales, limit: jnp.trunc(jnp.minimum(jnp.abs(x), limit) / scales[0]).astype(jnp.int8),
            lambda codes, scales: codes * scales[0],
            code_bits=3,
            scale_bits=32,
            block=32,
        )
    ),
]


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_levels_in_a_view_are_those_of_entries(form, dtype):
    """Bit for bit, with limits that bind, zeros, subnormal and huge entries, and scales that are fitted to others."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 128, 3, 2), np.float32)
    x[0, :16], x[1, 5], x[1, 6], x[0, 20] = 0, 1e-40, -1e30, 65504
    x = jnp.asarray(x, dtype)
    plan = leaf_format.plan(form, (-2, -1), None, "kernel", x)
    for below, above in ((0.3, 1.1), (0.7, 0.7), (float(jnp.finfo(dtype).max),) * 2):
        limits = tuple(jnp.asarray(end, dtype).astype(jnp.float32) for end in (below, above))
        own = leaf_format.fit(plan, leaf_format.measure(plan, x / 2, ()), limits)

        def entries(x, own):
            wide = leaf_format._clipped(plan, x, (-own.low, own.high))
            limit = jnp.where(wide < 0, -own.low, own.high)
            scales = format_blocks.spread(own.scales, wide)
            return form.decode(form.encode(wide, scales, limit), scales)

        wide = x.astype(jnp.float32)
        found = jax.jit(lambda x, own: leaf_format.level(plan, x, own))(wide, own)
        same = jax.jit(entries)(wide, own)
        if not form.zero:  # a level on the other side of zero than its entry has the limit of its own side
            same = jnp.where((same >= own.low) & (same <= own.high), same, found)
        np.testing.assert_array_equal(found, same)
        assert found.min() >= own.low and found.max() <= own.high
