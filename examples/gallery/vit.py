# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A vision transformer with half of its units
#
# Zeros alone make no matrix product faster. Here whole units go: `analyze` reads from the program which entries of
# which arrays belong to a unit, `prune_mask` sets the least important half of them to zero while the net trains, and
# `shrink` cuts them out of the arrays. No list of layers is written by hand.
#
# This page was run while the site was built. `examples/gallery/vit.py` is its source.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import clipjax
from clipjax import scores, structures

images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = map(jnp.asarray, train_test_split(images / 16, labels, test_size=0.25, random_state=0))


# %% [markdown]
# ## The net
#
# Sixteen patches of 2 × 2 pixels, three blocks of attention and a dense part, as anybody would write them in Flax NNX.


# %%
class Block(nnx.Module):
    """Attention and a dense part, each added to the stream."""

    def __init__(self, width, hidden, heads, rngs):
        """Four heads of an own size, and `hidden` units."""
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        """Maps [n, tokens, width] to the same."""
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class ViT(nnx.Module):
    """Patches, blocks, the mean over tokens."""

    def __init__(self, width, hidden, heads, depth, rngs):
        """Sizes as those of `Block`."""
        self.patches = nnx.Linear(4, width, rngs=rngs)
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (16, width)))
        self.blocks = nnx.List([Block(width, hidden, heads, rngs) for _ in range(depth)])
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        """Maps images [n, 64] to logits [n, 10]."""
        x = x.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = self.patches(x) + self.places[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


model = ViT(width=64, hidden=256, heads=4, depth=3, rngs=nnx.Rngs(0))


# %%
@nnx.jit
def step(model, optimizer, key):
    """One update on 64 images."""
    rows = jax.random.randint(key, (64,), 0, len(x))

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x[rows]), y[rows]).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def train(model, tx, steps):
    """Trains in place."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for key in jax.random.split(jax.random.key(steps), steps):
        step(model, optimizer, key)


def described(name, model):
    """A row: accuracy, weights, time of a forward pass."""
    run = nnx.jit(lambda model, x: model(x))
    right = float((run(model, x_test).argmax(-1) == y_test).mean())
    times = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(run(model, x_test))
        times.append(time.perf_counter() - start)
    weights = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return name, 100 * right, weights, 1e3 * float(np.median(times))


train(model, optax.adam(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, 600)), 600)
rows = [described("dense", model)]

# %% [markdown]
# ## What belongs together
#
# For each block the analysis finds the heads of the attention and the units of the dense part; NNX's attention refuses
# heads of another size. The stream stands under a LayerNorm, so it is listed apart: cutting it would change the
# statistic. `print(analysis)` has a table of all leaves before these lines.

# %%
analysis = clipjax.analyze(lambda model, x: model(x), model, x[:2])
print(*(line for line in str(analysis).splitlines() if line.startswith("group")), sep="\n")

# %% [markdown]
# ## Prune half, cut, go on
#
# The zeros grow over 200 updates. The score is Taylor's: how much the loss would change without the unit.

# %%
half = optax.polynomial_schedule(0.0, 0.5, 3, 200)
units = structures.unit(groups=analysis.groups)
mask = clipjax.prune_mask(half, every=20, stop=220, structure=units, score=scores.taylor())
train(model, clipjax.with_gradient(optax.chain(optax.adam(5e-4), mask)), 300)
rows.append(described("half of the units zero", model))

before = model(x_test)
clipjax.shrink(model, analysis)
rows.append(described("cut out", model))
print(f"The logits changed by at most {float(jnp.abs(model(x_test) - before).max()):.1e}.")

# %%
train(model, optax.adam(optax.cosine_decay_schedule(5e-4, 200)), 200)
rows.append(described("trained on", model))
for name, right, weights, took in rows:
    print(f"{name:24} {right:6.2f} % right  {weights:8,} weights  {took:5.1f} ms for {len(x_test)} images")

# %%
_, axes = plt.subplots(figsize=(6, 3), layout="constrained")
clipjax.plots.pareto({name: (4 * weights, 100 - right) for name, right, weights, _ in rows}, ax=axes)
axes.set(xlabel="bytes of the weights", ylabel="wrong, %")
plt.show()

# %% [markdown]
# [Cutting units out](../../docs/shrinking.md) has what can be cut and what cannot, with the optimizer's state and with
# other structures.
