"""Exact selection without a sort: counts and ties on adversarial inputs, against NumPy's lexsort."""

import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipjax._maths import exact_counts, ranking, wide

pytestmark = pytest.mark.usefixtures("strict")

SHAPES = ((13,), (4, 5), (2, 3, 2), ())
SIZES = [int(np.prod(shape)) for shape in SHAPES]
F32 = np.finfo(np.float32)
PALETTE = [0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan, F32.max, F32.tiny, -F32.tiny, 1 + F32.eps, 1.5, -7.0]


def reference(arrays, counts):
    """The `counts` lowest are gone, NaN first; of equals the earlier is kept. An int pools, a list counts for each."""
    if not isinstance(counts, int):
        return [reference([x], int(k))[0] for x, k in zip(arrays, counts, strict=True)]
    flat = np.concatenate([np.ravel(x) for x in arrays]).astype(np.float64)
    number = np.where(np.isnan(flat), -1, 0)
    keep = np.ones(flat.size, bool)
    keep[np.lexsort((-np.arange(flat.size), np.where(np.isnan(flat), 0, flat), number))[:counts]] = False
    parts = np.split(keep, np.cumsum([np.size(x) for x in arrays])[:-1])
    return [m.reshape(np.shape(x)) for m, x in zip(parts, arrays, strict=True)]


@functools.partial(jax.jit, static_argnames=("pooled", "devices"))
def masks(arrays, counts, pooled, devices):
    """`devices` only keeps the compiled functions apart; `keep` would keep one trace for all of them."""
    keys = [ranking.order(x[None]) for x in arrays]
    return [mask[0] for mask in ranking.keep.__wrapped__(keys, counts, pooled=pooled)]


def number(value):
    """Numbers of two words, as Python's."""
    return (np.asarray(value.high, np.uint64) << np.uint64(wide.WORD)) + np.asarray(value.low, np.uint64)


def check(arrays, counts, devices=8):
    pooled = isinstance(counts, int)
    got = masks([jnp.asarray(x, jnp.float32) for x in arrays], wide.of(counts), pooled, devices)
    for g, e in zip(got, reference(arrays, counts), strict=True):
        np.testing.assert_array_equal(g, e)


def filled(values):
    return [np.resize(np.asarray(values, np.float32), shape) for shape in SHAPES]


@pytest.fixture(params=["one-device", "devices", "gpu"])
def devices(request, monkeypatch):
    """In one pass where there is one device, in sums where there are several; on a GPU in a fixed number of passes."""
    if request.param == "one-device":
        monkeypatch.setattr(jax, "device_count", lambda: 1)
    if request.param == "gpu":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, rocm, default: cuda(*args))
    return request.param


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, -0.0], [np.nan], [np.inf, -np.inf], PALETTE, np.arange(46.0), -np.arange(46.0), [1, 1 + F32.eps]],
    ids=["equal", "zeros", "nan", "infinite", "palette", "rising", "falling", "ulp"],
)
def test_keep_adversarial(values, devices):
    total = sum(SIZES)
    for k in (0, 1, 17, total - 1, total):
        check(filled(values), k, devices)
    check(filled(values), [5, 20, 0, 1], devices)
    check(filled(values), [0, 1, 11, 0], devices)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.one_of(st.sampled_from(PALETTE), st.floats(width=32, allow_subnormal=False)), min_size=1, max_size=46
    ),
    k=st.integers(0, sum(SIZES)),
    each=st.tuples(*(st.integers(0, n) for n in SIZES)),
)
def test_keep_matches_lexsort(values, k, each):
    arrays = filled(values)
    check(arrays, k)
    check(arrays, list(each))


def test_keep_denormals_compare_like_zero_or_like_themselves():
    """A device may flush them; the count is exact either way, and no normal number goes first."""
    x = np.array([1e-40, 0.0, 1e-45, F32.tiny, -1e-40, 1.0], np.float32)
    for k in range(7):
        (mask,) = jax.jit(lambda x, k: ranking.keep([ranking.order(x[None])], wide.word(k), pooled=True))(
            x, jnp.uint32(k)
        )
        assert int((~mask).sum()) == k
        assert k > 4 or (bool(mask[0, 3]) and bool(mask[0, 5]))


def test_keep_one_element():
    for value in (0.0, np.nan, -np.inf):
        for k in (0, 1):
            check([np.float32(value)], k)


def test_keep_many_elements_matches_partition():
    x = np.random.default_rng(0).normal(size=(100, 1000)).astype(np.float32)
    (mask,) = masks([jnp.asarray(x)], wide.of(90_000), True, 8)
    np.testing.assert_array_equal(mask, x >= np.partition(x.ravel(), 90_000)[90_000])


def test_order_is_the_order_of_floats():
    x = np.sort(np.random.default_rng(1).normal(size=500).astype(np.float32) ** 9)
    x = np.concatenate([[-np.inf], x, [np.inf]]).astype(np.float32)
    keys = np.asarray(ranking.order(jnp.asarray(x)))
    assert (np.diff(keys.astype(np.int64))[np.diff(x) > 0] > 0).all()
    zero, minus, nan, gone = ranking.order(jnp.array([0.0, -0.0, np.nan, 5.0]), gone=jnp.arange(4) == 3)
    assert zero == minus and gone < nan < keys[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_order_of_narrow_and_integer_scores(dtype):
    x = jnp.array([3, 1, 2, -4]).astype(dtype)
    assert list(np.argsort(np.asarray(ranking.order(x)))) == [3, 1, 2, 0]


def test_protected_keys_are_not_open_and_stay():
    keys = [ranking.order(jnp.array([[1.0, 2.0, 3.0, 4.0]]))]
    keys = [ranking.protect(keys[0], jnp.array([[True, False, False, True]]))]
    assert number(ranking.open_counts(keys)).tolist() == [2]
    for k in (2, 4):
        (mask,) = ranking.keep(keys, wide.of(k), pooled=True)
        np.testing.assert_array_equal(mask, [[True, False, False, True]])


@pytest.fixture
def short_words(monkeypatch):
    """Words of 8 bits, so that small arrays carry into the second; programs of other words are dropped."""
    monkeypatch.setattr(wide, "WORD", 8)
    jax.clear_caches()
    yield
    jax.clear_caches()


LONG = ((20, 20), (30, 3, 40), (7,), (2, 2, 150))  # 400, 3600, 7 and 600 entries: indices and counts of two words


def test_counts_and_indices_of_two_words(short_words, devices):
    rng = np.random.default_rng(4)
    ties = [np.float32(rng.integers(0, 3, shape)) for shape in LONG]
    distinct = [np.float32(rng.normal(size=shape)) for shape in LONG]
    for arrays in (ties, distinct):
        for k in (0, 255, 256, 1000, 2305, 4607):
            check(arrays, k, devices)
        check(arrays, [399, 3000, 6, 255], devices)
        check(arrays, [256, 1, 0, 600], devices)


@functools.partial(jax.jit, static_argnames="word")
def arithmetic(a, b, word):
    """`word` only keeps the compiled functions apart."""
    more = wide.where(wide.less(a, b), b, a)
    found = (wide.add(a, b), wide.minus(more, wide.minimum(a, b)), wide.rest(a, b), wide.halved(a), wide.total(a, 0))
    return *found, wide.times(a, BY), wide.quotient(a, BY), wide.multiple(a, BY), wide.least(a, (0,))


BY = np.array([1, 2, 3, 7, 13, 15], np.uint32)


@pytest.mark.parametrize("word", [8, 32])
def test_arithmetic_of_two_words(word, monkeypatch):
    monkeypatch.setattr(wide, "WORD", word)
    rng, top = np.random.default_rng(5), 2 ** (word - 4)
    edges = [0, 1, 2**word - 1, 2**word, 2 ** (word + 1) - 1, 2**word * top - 1]
    for _ in range(20):
        a, b = (rng.permutation([*edges[:3], *rng.integers(0, 2**word * top, 3)]) for _ in "ab")
        got = [np.atleast_1d(number(x)) for x in arithmetic(wide.of(a), wide.of(b), word)]
        a, b, by = a.astype(object), b.astype(object), BY.astype(object)
        exact = [a + b, abs(a - b), np.maximum(a - b, 0), a // 2, [sum(a)], a * by, a // by, a // by * by, [min(a)]]
        for g, e in zip(got, exact, strict=True):
            assert g.tolist() == list(e)


@pytest.mark.parametrize("summands", [2**16 - 1, 2**16, 2**17])
def test_sums_of_many_numbers_of_two_words(summands):
    """The parts of a word are so short that their sum fits into one."""
    assert number(wide.total(wide.word(jnp.full(summands, wide.largest())), 0)) == summands * (2**32 - 1)


def exact_share(fraction, n):
    """Round of the exact product, halves to even."""
    return round(fractions.Fraction(float(np.float32(fraction))) * n)


SHARE = jax.jit(exact_counts.of_fraction)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    fraction=st.one_of(
        st.floats(0, 1, width=32, exclude_max=True),
        st.builds(lambda a, b: a / 2**b, st.integers(0, 255), st.integers(8, 40)),
    ),
    n=st.one_of(st.integers(0, 2**50), st.sampled_from([1, 2, 3, 5, 10, 2**31, 2**32 - 1, 2**32, 10**7, 7 * 10**9])),
)
def test_share_traced_is_exact(fraction, n):
    if 0 < fraction < F32.tiny:
        fraction = 0.0  # a device may flush denormals; n of them are no entry
    assert number(SHARE(jnp.float32(fraction), wide.of(n))) == exact_share(fraction, n)


def test_share_traced_out_of_range_and_nan_stay_in_range():
    got = number(SHARE(jnp.array([-1.0, np.nan, 1.0, 5.0, 0.25, 0.35], jnp.float32), wide.of([10] * 6)))
    assert got.tolist() == [0, 0, 10, 10, 2, exact_share(0.35, 10)]


@pytest.mark.parametrize("n", [1, 3, 5, 7, 10**6])
@pytest.mark.parametrize("fraction", [0, 0.1, 0.25, 0.5, 0.7, 0.9, np.float32(0.3)])
def test_share_static_is_pythons_round(n, fraction):
    assert number(exact_counts.of_fraction(fraction, n)) == round(float(fraction) * n)
