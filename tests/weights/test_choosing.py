"""choose_bits: widths from the distribution of each array, against SQNR in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax import steps

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
PARAMS = {
    "dense": {"bias": jnp.ones(8), "kernel": jnp.asarray(RNG.normal(size=(32, 8)), jnp.float32)},
    "heavy": {"kernel": jnp.asarray(RNG.standard_t(2, size=(32, 8)), jnp.float32)},
    "ternary": {"kernel": jnp.asarray(RNG.choice([-0.3, 0.0, 0.3], (16, 8)), jnp.float32)},
}
ALLOWED = (2, 4, 6)
KERNELS = {name: np.asarray(layer["kernel"], np.float64) for name, layer in PARAMS.items()}


def noise(w, bits, rule=steps.absmax()):  # noqa: B008 - a constant
    """‖Q(w) − w‖² at the step that the rule takes."""
    s, top = float(clipjax.choose_step(jnp.asarray(w, jnp.float32), bits, step=rule)), 2 ** (bits - 1) - 1
    return np.sum((np.clip(np.round(w / s), -top, top) * s - w) ** 2)


def sqnr(w, bits):
    return 10 * np.log10(np.sum(w**2) / max(noise(w, bits), 1e-30))


@pytest.mark.parametrize("target", [5.0, 15.0, 25.0])
def test_target_is_reached_by_the_smallest_width(target):
    """SQNR(b) ≥ target > SQNR(next smaller allowed), or b = max(allowed)."""
    bits = clipjax.choose_bits(PARAMS, target_db=target, allowed=ALLOWED, step=steps.absmax())
    for name, w in KERNELS.items():
        b = bits[name]["kernel"]
        smaller = [a for a in ALLOWED if a < b]
        assert b == max(ALLOWED) or sqnr(w, b) >= target
        assert not smaller or sqnr(w, smaller[-1]) < target
    assert bits["dense"]["bias"] is None and bits["ternary"]["kernel"] == 2
    assert all(type(b) is int for b in jax.tree.leaves(bits))


def test_unreachable_target_takes_the_largest_and_order_of_allowed_does_not_matter():
    bits = clipjax.choose_bits({"w": PARAMS["heavy"]["kernel"]}, target_db=500.0, allowed=(4, 2), step=steps.absmax())
    assert bits == {"w": 4}


@pytest.mark.parametrize("budget", [2.0, 3.5, 5.0, 6.0])
def test_budget_is_kept_and_spent(budget):
    """The mean over all picked weights; no width could still be raised within it."""
    bits = clipjax.choose_bits(PARAMS, budget=budget, allowed=ALLOWED, step=steps.absmax())
    total = sum(w.size for w in KERNELS.values())
    spent = sum(bits[name]["kernel"] * w.size for name, w in KERNELS.items())
    assert spent <= budget * total
    assert all(bits[name]["kernel"] == 6 or spent + 2 * w.size > budget * total for name, w in KERNELS.items())


def test_budget_goes_where_it_removes_most_error():
    """Twice the scale is four times the error: the larger array gets the bits."""
    w = PARAMS["dense"]["kernel"]
    params = {"large": w * 2, "small": w}
    assert clipjax.choose_bits(params, budget=3.0, allowed=(2, 4), step=steps.absmax()) == {"large": 4, "small": 2}


def test_axis_and_where_and_default_step():
    """A step per unit needs fewer bits where units differ in scale."""
    w = PARAMS["dense"]["kernel"] * (10.0 ** jnp.arange(-3.0, 5.0))[None]
    params = {"w": w, "other": w}
    options = {"target_db": 16.0, "allowed": (4, 8), "where": lambda path, leaf: path == "w"}
    assert clipjax.choose_bits(params, axis=-1, **options) == {"w": 4, "other": None}


def test_budget_under_x64():
    """The counts stay i32."""
    w = {"q": jax.random.normal(jax.random.key(0), (8, 8)), "k": jax.random.normal(jax.random.key(1), (4, 8))}
    expected = clipjax.choose_bits(w, budget=4.0)
    with jax.enable_x64(True):
        assert clipjax.choose_bits(w, budget=4.0) == expected
        tx = clipjax.fake_quantize(clipjax.widths.budget(4.0))
        state = tx.update(w, tx.init(w), w)[1]
        assert all(b.dtype == jnp.int32 for b in state.projection.bits.values())


def test_all_zero_and_no_leaves():
    assert clipjax.choose_bits({"w": jnp.zeros((2, 2))}, target_db=20.0, allowed=(2, 4)) == {"w": 2}
    assert clipjax.choose_bits({"bias": jnp.ones(3)}, target_db=20.0, allowed=(2,)) == {"bias": None}


EMBEDDED = ("Embed_0/embedding", "embedder/table", "encoder/pos_embedding", "vit/cls")


def test_embeddings_are_left_alone_unless_they_are_named():
    """By default, also in `choose_bits`; `where`, a value of `per_leaf` and a tree pick them."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    params = {}
    for path in (*EMBEDDED, "dense/kernel", "unembedded/kernel"):
        room, name = path.split("/")
        params.setdefault(room, {})[name] = kernel
    everything = lambda path, leaf: True
    some = clipjax.per_leaf(lambda path, leaf: 0.5 if path == "vit/cls" else None)
    bits = clipjax.per_leaf(lambda path, leaf: 4 if "embedd" in path else None)
    named = {"dense": {"kernel": 0.5}, "unembedded": {"kernel": 0.5}, "vit": {"cls": 0.5}}
    layers = {"dense/kernel", "unembedded/kernel"}
    for tx, expected in (
        (clipjax.prune_mask(0.5), layers),
        (clipjax.prune_mask(0.5, where=everything), layers | set(EMBEDDED)),
        (clipjax.prune_mask(some), {"vit/cls"}),
        (clipjax.prune_mask(named), layers | {"vit/cls"}),
        (clipjax.fake_quantize(4), layers),
        (clipjax.fake_quantize(bits), {*EMBEDDED[:3], "unembedded/kernel"}),
    ):
        rows = clipjax.summarize(params, tx.init(params), widths=()).to_dict().items()
        assert {path for path, row in rows if row["picked"]} == expected
    assert clipjax.choose_bits(params, target_db=20.0)["vit"]["cls"] is None
