# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # RigL: sparse from the first step
#
# A net that is sparse all through its training needs the memory of the few weights that it keeps. Which ones, is not
# known at the start: [RigL](https://arxiv.org/abs/1911.11134) removes the smallest ones every few steps, and lets those
# grow in their place whose gradient is largest. Here it stands beside three others, at 97 % zeros, on scikit-learn's
# digits: a mask that stays as it was drawn, one that is pruned slowly, and no mask.
#
# This page was run while the site was built. `examples/gallery/rigl.py` is its source.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import clipjax
from clipjax import scores

images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = map(jnp.asarray, train_test_split(images / 16, labels, test_size=0.25, random_state=0))
STEPS, SPARSITY, SEEDS = 1000, 0.97, 3

# %% [markdown]
# ## Four chains
#
# `inner=` hands the optimizer to `prune_mask`, so that a weight that grows again starts with moments of zero.
# `scope="erk"` spreads the zeros over the layers: small ones keep more.

# %%
adam = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
exchange = optax.cosine_decay_schedule(0.3, int(0.75 * STEPS))
ramp = optax.polynomial_schedule(0.0, SPARSITY, 3, STEPS // 2)
txs = {
    "dense": adam,
    "a mask at random": optax.chain(adam, clipjax.prune_mask(SPARSITY, scope="erk", score=scores.random(), every=None)),
    "RigL": clipjax.prune_mask(
        SPARSITY, scope="erk", score=scores.magnitude(), every=25, stop=int(0.75 * STEPS), inner=adam, regrow=exchange
    ),
    "pruned slowly": optax.chain(adam, clipjax.prune_mask(ramp, scope="erk", every=25, stop=STEPS // 2)),
}


# %% [markdown]
# ## Training
#
# Three seeds at once by `vmap`; the chain is a pure function as any other.


# %%
class Net(nn.Module):
    """64-256-256-10."""

    @nn.compact
    def __call__(self, x):
        """Logits of images."""
        for width in (256, 256):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def accuracy(params):
    """In percent, on the images held out."""
    return 100 * (Net().apply(params, x_test).argmax(-1) == y_test).mean()


def run(tx, key):
    """Trains one net."""

    def loss(params, rows):
        return optax.softmax_cross_entropy_with_integer_labels(Net().apply(params, x[rows]), y[rows]).mean()

    def step(carry, key):
        params, state = carry
        grads = jax.grad(loss)(params, jax.random.randint(key, (64,), 0, len(x)))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def part(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, accuracy(carry[0])

    params = Net().init(key, x[:1])
    keys = jax.random.split(jax.random.fold_in(key, 1), (STEPS // 50, 50))
    (params, _), seen = jax.lax.scan(part, (params, tx.init(params)), keys)
    return params, seen


def kernels(params):
    """The weights without biases; the first axis is that of the seeds."""
    return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 2]


runs = {
    name: jax.jit(jax.vmap(lambda key, tx=tx: run(tx, key)))(jax.random.split(jax.random.key(0), SEEDS))
    for name, tx in txs.items()
}
for name, (params, seen) in runs.items():
    zeros = np.mean(np.concatenate([np.ravel(leaf == 0) for leaf in kernels(params)]))
    final = np.asarray(seen[:, -1])
    print(f"{name:17} {final.mean():.2f} ± {final.std(ddof=1):.2f} % right, {zeros:.1%} zeros")

# %%
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for name, (_, seen) in runs.items():
    line = axes.plot(np.arange(50, STEPS + 1, 50), seen.mean(0), label=name)[0]
    axes.fill_between(np.arange(50, STEPS + 1, 50), seen.min(0), seen.max(0), alpha=0.15, color=line.get_color())
axes.set(xlabel="update", ylabel="right on held-out images, %", ylim=(85, 100))
axes.legend()
plt.show()

# %% [markdown]
# ## Where the weights went
#
# How many weights of the first layer each pixel has. A mask at random treats all pixels alike, and RigL finds those on
# which digits differ: the pixels at both sides are empty in nearly all images.

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
axes[0].imshow(np.mean(images, 0).reshape(8, 8), cmap="magma")
axes[0].set_title("mean image")
for place, name in zip(axes[1:], ("a mask at random", "RigL", "pruned slowly"), strict=True):
    first = np.asarray(runs[name][0]["params"]["Dense_0"]["kernel"])
    shown = place.imshow((first != 0).sum(-1).mean(0).reshape(8, 8), cmap="magma", vmin=0)
    place.set_title(name)
    figure.colorbar(shown, ax=place, shrink=0.8)
for place in axes:
    place.axis("off")
plt.show()

# %% [markdown]
# Pruning slowly is better here, and begins with all weights. RigL never has more than 3 % of them; its lead over a mask
# that stays is within what seeds deviate by.
# [Pruning](../../docs/pruning.md) has a chain for each published recipe, SET, SNIP and movement among
# them.
