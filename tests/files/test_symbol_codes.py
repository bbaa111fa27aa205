"""Symbols, frequencies, grids and books, each against what it claims: the entropy, the bits, the step."""

import jax.numpy as jnp
import numpy as np
import pytest

from clipjax._files import alphabets, ans, byte_stream, leaf_codec, step_search, symbol_codes
from clipjax._maths.grids import short

RNG = np.random.default_rng(0)


def entropy(x):
    """Bytes of an ideal order-0 code."""
    _, counts = np.unique(x, return_counts=True)
    return -np.sum(counts * np.log2(counts / counts.sum())) / 8


def normal(size, *shape):
    """Symbols below `size`, about normal."""
    return np.clip(np.rint(RNG.normal(size=shape) * size / 8 + size / 2), 0, size - 1).astype(
        symbol_codes.symbol_dtype(size)
    )


def encoded(symbols, size, zero=None):
    """The bytes, which are as many as promised or a few less, and those of packed codes."""
    encoding, packed = symbol_codes.encoding(symbols, size, zero)
    data = bytearray()
    encoding.write(data)
    assert encoding.size - 16 < len(data) <= 1.0001 * encoding.size + 1
    return data, packed


def round_trip(symbols, size, zero=None):
    data, packed = encoded(symbols, size, zero)
    cursor = byte_stream.Cursor(data)
    back = symbol_codes.decode(cursor, symbols.shape, size)
    assert back.dtype == symbols.dtype and cursor.left == 0
    np.testing.assert_array_equal(back, symbols)
    assert len(data) <= packed + 1
    return data


@pytest.mark.parametrize("size", [2, 3, 15, 255, 4000])
def test_order_0_reaches_the_entropy(size):
    """Within 0.1 %, table and flush apart; 300,000 symbols are more than one chunk."""
    x = normal(size, 300, 1000)
    data = round_trip(x, size)
    assert symbol_codes.NAMES[data[0]] == "order 0"
    assert len(data) <= 1.001 * entropy(x) + 2 * size + 16


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 256, 257, 60_000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 3), (0, 4), (1000, 300)])
def test_uniform_symbols_are_packed(size, shape):
    x = RNG.integers(0, size, shape).astype(symbol_codes.symbol_dtype(size))
    data = round_trip(x, size)
    if size in (2, 4, 16, 256) and x.size:
        assert symbol_codes.NAMES[data[0]] == "packed"
        assert len(data) == 1 + -(-x.size * (size - 1).bit_length() // 8)


def lines(rows, columns):
    """Zeros in rows and columns of unlike density, some of them dead."""
    density = RNG.beta(0.5, 2, (rows, 1)) * RNG.beta(0.5, 0.5, (1, columns)) * (RNG.random((rows, 1)) > 0.2)
    return np.where(RNG.random((rows, columns)) < density, normal(15, rows, columns), 7).astype(np.uint8)


@pytest.mark.parametrize("shape", [(784, 300), (100, 120), (2000, 200), (40, 3000)])
def test_densities_beat_the_entropy(shape):
    x = lines(*shape)
    data = round_trip(x, 15, zero=7)
    assert symbol_codes.NAMES[data[0]] == "rows and columns"
    assert len(data) < 0.95 * entropy(x)


def test_dead_rows_cost_next_to_nothing():
    x = np.full((784, 100), 3, np.uint8)
    x[300:500] = normal(7, 200, 100)
    which = entropy(np.arange(784) // 200 == 1)  # bytes that say which rows are alive
    assert len(round_trip(x, 7, zero=3)) < entropy(x[300:500]) + which + 50


def test_alike_lines_are_coded_plainly():
    x = np.where(RNG.random((300, 300)) < 0.1, normal(15, 300, 300), 7).astype(np.uint8)
    assert symbol_codes.NAMES[round_trip(x, 15, zero=7)[0]] == "order 0"


def test_small_frequencies_are_near_and_whole():
    counts = np.array([0, 1, 2, 1000, 999_999, 3])
    for width in (1, 2):
        mantissa = {1: 4, 2: 11}[width]
        stored = ans._to_small(counts, width, mantissa)
        read = ans._from_small(stored, mantissa)
        assert stored.max() < 256**width and read[0] == 0 and (read == np.rint(read)).all()
        near = read[3:5] / read[4] * counts[4] / counts[3:5]
        np.testing.assert_allclose(near, 1, rtol=2.0**-mantissa)
    assert ans._from_small(np.array([65535]), 11)[0] * 65536 < 2.0**60


def test_the_code_is_the_same_on_every_machine():
    """Bytes written once: a coder that derived other models from the same table would fail here, not in a file."""
    x = (np.arange(1000) ** 2 % 97 % 15).astype(np.uint8).reshape(20, 50)
    data, _ = encoded(x, 15)
    assert (len(data), data[:40].hex()) == GOLDEN


GOLDEN = (494, "0101dffaf5fafaf5fad4e5efefe4efeee47798cdc0225d4a433f0b9c089de4ab56fe68ea6d55b51f")


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x01\x01", b"\x03", b"\x01\x03" + bytes(9), b"\x01\x01" + bytes(50)])
def test_nonsense_is_no_code(data):
    with pytest.raises(ValueError, match="payload"):
        symbol_codes.decode(byte_stream.Cursor(data), (5, 5), 9)


def test_numbers_have_limits():
    assert byte_stream.Cursor(byte_stream.whole(300)).whole(300) == 300
    with pytest.raises(ValueError, match="above 299"):
        byte_stream.Cursor(byte_stream.whole(300)).whole(299)
    with pytest.raises(ValueError, match="above"):
        byte_stream.Cursor(b"\x80" * 30).whole(1 << 60)


def found(x):
    """Symbols and alphabet, after they gave back the bits."""
    symbols, alphabet = alphabets.find(x)
    assert alphabets.read(symbols, alphabet, x.dtype).tobytes() == np.ascontiguousarray(x).tobytes()
    assert symbols.max(initial=0) < alphabet.size
    return symbols, alphabet


@pytest.mark.parametrize("levels", [3, 300, 20_000])
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_a_book_has_every_value_that_repeats(levels, dtype):
    """Beyond the sample and beyond the slots of the hash."""
    values = np.unique(RNG.integers(0, 1 << 30, levels)).astype(dtype)
    x = values[RNG.integers(0, values.size, 200_000)]
    x[5] = 1 << 31  # occurs once
    _, alphabet = found(x)
    once = np.unique(x, return_counts=True)[1] == 1
    assert alphabet.escapes.size <= once.sum() + (0 if levels < 20_000 else 2000)
    assert alphabet.book.size <= values.size


def test_dense_floats_have_no_book():
    assert alphabets.find(RNG.normal(size=200_000).astype(np.float32)) is None


def test_pruned_floats_escape():
    x = np.where(RNG.random(200_000) < 0.9, 0, RNG.normal(size=200_000)).astype(np.float32)
    _, alphabet = found(x)
    assert abs(alphabet.escapes.size - (x != 0).sum()) < 100


def step(*shape, bits=4, low=0.05):
    return np.asarray(short(jnp.asarray(RNG.uniform(low, 4 * low, shape), jnp.float32), bits))


def test_one_step_is_found_without_its_first_multiples():
    """The greatest common divisor, not the smallest value."""
    s = step()
    x = RNG.integers(4, 20, 4000).astype(np.float32) * s
    _, alphabet = found(x)
    assert alphabet.grid.step.ravel().tolist() == [s] and alphabet.book.size == alphabet.escapes.size == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("s", [0.05, 1e-4, 0.3, 1.0, 7.7])
def test_steps_whose_multiples_are_rounded(dtype, s):
    codes = np.clip(np.rint(RNG.normal(size=(100, 50)) * 20), -100, 100).astype(np.float32) + 0
    x = (codes * np.float32(s)).astype(dtype)
    symbols, alphabet = found(x)
    assert alphabet.grid is not None
    np.testing.assert_array_equal(symbols.astype(int) + alphabet.grid.low, codes)


def test_a_value_is_on_a_grid_only_with_its_bits():
    x = np.array([[0.0, -0.0, 0.5, np.nan, np.inf, 0.75000006]], np.float32)
    code = step_search.codes(x, np.full((1, 1), 0.25, np.float32))
    assert code.tolist() == [[0, step_search.OFF, 2, step_search.OFF, step_search.OFF, step_search.OFF]]


def test_steps_of_columns_with_few_values():
    """95 % zeros: eight rows of a column seldom tell its step."""
    s = step(40)
    codes = np.clip(np.rint(RNG.normal(size=(2000, 40)) * 3), -7, 7) * (RNG.random((2000, 40)) < 0.05)
    _, alphabet = found((codes + 0.0).astype(np.float32) * s)
    np.testing.assert_array_equal(alphabet.grid.step, s[None])


@pytest.mark.parametrize("shape", [(3, 3, 16, 32), (9, 16), (512, 3)])
def test_steps_of_a_kernels_output_channels(shape):
    s = step(shape[-1])
    x = np.clip(np.rint(RNG.normal(size=shape) * 3), -7, 7).astype(np.float32) * s + 0
    symbols, alphabet = found(x)
    assert symbols.shape == (x.size // shape[-1], shape[-1])
    assert alphabet.size <= 15 + 1


def test_the_payload_is_never_longer_than_the_array():
    for n in range(1, 60):
        for x in (RNG.normal(size=n).astype(np.float32), RNG.integers(0, 3, n).astype(np.int8), np.zeros(n, bool)):
            data, packed = leaf_codec.pack(x)
            assert packed <= x.nbytes and (data is None or len(data) < x.nbytes)


def test_entropy_counts_each_pattern_once():
    assert leaf_codec.entropy(np.zeros(1000, np.float32)) == 4
    assert leaf_codec.entropy(RNG.normal(size=100)) == 800
    x = np.repeat(np.arange(4, dtype=np.float32), 100)
    assert leaf_codec.entropy(x) == 4 * 100 * 2 // 8 + 16
