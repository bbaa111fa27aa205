"""Breaks of what clipjax/_maths knows of formats: their blocks, scales and bytes."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant("_maths/float_blocks.py", "jnp.minimum(exponent, 1) << 1", "exponent << 1", "products", "every_format"),
    Mutant("_maths/integer_blocks.py", "- jnp.uint8(zero)", "- jnp.uint8(0)", "products", "every_format"),
    Mutant(
        "_maths/block_scales.py", "size * largest <= near", "size * largest < near", "block_scales", "digits and q5_0"
    ),
    Mutant(
        "_maths/block_scales.py",
        "cut = size if precision is None else grids.short(size, 24 - precision)",
        "cut = size",
        "formats_held",
        "unit_of_its_own and Q4_0",
    ),
    Mutant(
        "_maths/block_scales.py",
        "float_codes.F16) * largest, limit), low, near)",
        "float_codes.F16) * largest, limit), near, near)",
        "formats_held",
        "unit_of_its_own or infinite",
    ),
    Mutant(
        "_maths/block_scales.py",
        "(x[0] == y[0]) & (x[1] < y[1])",
        "(x[0] == y[0]) & (x[1] > y[1])",
        "formats",
        "gguf and Q4_0",
    ),
    Mutant(
        "_maths/block_scales.py",
        "elementwise.where(exceeds(near * largest, limit), float",
        "elementwise.where(near < 0, float",
        "block_scales",
        "exceeds and fp8_e4m3",
    ),
    Mutant(
        "_maths/float_codes.py", "under + ((significand >> shift) & 1) if", "under if", "formats", "numpy and fp8_e4m3"
    ),
    Mutant(
        "_maths/float_codes.py",
        "jnp.minimum(exponent, 0), 25)",
        "jnp.minimum(exponent, 0) * 0, 25)",
        "formats",
        "gguf and Q8_0",
    ),
    Mutant(
        "_maths/integer_blocks.py",
        "product = block_scales.within(x * block_scales.reciprocal(scale), -n - 1.0, n + 1.0)\n",
        "product = x * block_scales.reciprocal(scale)\n",
        "formats",
        "gguf and Q4_0",
    ),
    Mutant(
        "_maths/integer_blocks.py",
        "elementwise.where(block_scales.exceeds(level(top, (scale, minimum)), limit), within, scale)",
        "scale",
        "block_scales",
        "exceeds and q4_1",
    ),
    Mutant(
        "_maths/integer_blocks.py",
        "elementwise.where(block_scales.exceeds(level * scale, limit), code - jnp.sign(level), code)",
        "code",
        "block_scales",
        "exceeds and int4",
    ),
    Mutant(
        "_maths/integer_blocks.py",
        "where(high > -low, high, low)",
        "where(high >= -low, high, low)",
        "formats",
        "numpy and nbits",
    ),
    Mutant(
        "_maths/integer_blocks.py",
        "float_codes.signed(size, float_codes.bits(d) >> 31, F16)",
        "float_codes.signed(size, (d < 0).astype(jnp.uint32), F16)",
        "formats",
        "gguf and Q4_0",
    ),
    Mutant(
        "_maths/float_blocks.py", "(short <= ulp) & (k != 0)", "(short < 0) & (k != 0)", "formats", "gguf and MXFP4"
    ),
    Mutant(
        "_maths/float_blocks.py",
        "where(past, _floor(size, layout), found)",
        "where(past, found, found)",
        "formats",
        "again and MXFP4",
    ),
    Mutant("_maths/float_blocks.py", "jnp.uint32(1 << 21)", "jnp.uint32(1 << 22)", "formats", "numpy and mxfp4"),
    Mutant(
        "_maths/float_blocks.py", "negative &= ratio != 0 if", "negative &= ratio > 0 if", "formats", "numpy and nvfp4"
    ),
    Mutant("_maths/float_blocks.py", "(1 / largest) * 2688.0", "2688.0 / largest", "formats", "numpy and nvfp4"),
    Mutant(
        "_maths/float_blocks.py",
        "return total if precision is None else grids.short(total, 23)",
        "return total",
        "block_scales",
        "digits and nvfp4",
    ),
    Mutant(
        "_maths/float_blocks.py",
        "size - over.astype",
        "size - 0 * over.astype",
        "block_scales",
        "exceeds and mxfp4",
    ),
    Mutant("_maths/block_bytes.py", "np.uint16(242)", "np.uint16(0)", "formats", "gguf and TQ1_0"),
    Mutant("_maths/known_formats.py", "_told(other) == _told(form)", "True", "formats", "ones_own"),
    Mutant("_maths/format_blocks.py", "or (table and not kept)", "", "rows", "no_outputs"),
    Mutant(
        "_maths/block_scales.py",
        "elementwise.where(x < 0, below, above)",
        "elementwise.where(x < 0, above, below)",
        "block_scales",
        "two_sides and q4_0",
    ),
    Mutant("_maths/block_scales.py", "size * share <= narrow", "size < 0", "block_scales", "two_sides and tq2"),
    Mutant("_maths/block_scales.py", "size * share <= narrow", "size >= 0", "block_scales", "far_out and tq2"),
    Mutant("_maths/float_blocks.py", "code -= past.astype", "code -= 0 * past.astype", "block_scales", "nvfp4_lowers"),
    Mutant("_maths/integer_blocks.py", "block_scales.side(low, limit)", "limit[1]", "block_scales", "beside_zero"),
)
