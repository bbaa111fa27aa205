# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A race of thresholds
#
# Recurrent nets are where gradient clipping began: their gradients grow by a factor at each character, and now and then
# one update throws the weights far away. Here one such net reads Python source by the character, six times with the
# same batches, first weights and learning rate. Only the first line of the chain differs.
#
# This page was run while the site was built. `examples/gallery/thresholds.py` is its source.

# %%
import argparse
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import clipjax
from clipjax import thresholds

text = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8)
characters, codes = np.unique(text, return_inverse=True)
train, held_out = jnp.asarray(codes[:-12_800]), jnp.asarray(codes[-12_800:]).reshape(200, 64)
print(f"{len(train):,} characters to train on, {held_out.size:,} held out, {len(characters)} different ones")

# %% [markdown]
# ## The net
#
# One matrix that is applied at each character, with an eigenvalue above 1 to begin with.

# %%
WIDTH, LENGTH, BATCH, STEPS = 128, 64, 32, 400


def init(key):
    """Matrices of one recurrent layer."""
    read, turn, say = jax.random.split(key, 3)
    return {
        "read": 0.1 * jax.random.normal(read, (len(characters), WIDTH)),
        "turn": 1.2 * jax.random.normal(turn, (WIDTH, WIDTH)) / WIDTH**0.5,
        "say": 0.1 * jax.random.normal(say, (WIDTH, len(characters))),
    }


def loss(params, rows):
    """Cross entropy of each character after the ones before it, in nats."""

    def step(hidden, column):
        hidden = jnp.tanh(params["read"][column] + hidden @ params["turn"])
        return hidden, hidden @ params["say"]

    _, logits = jax.lax.scan(step, jnp.zeros((len(rows), WIDTH)), rows[:, :-1].T)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:].T).mean()


# %% [markdown]
# ## The chains
#
# `clip_norm` takes a number, which somebody must choose, or a rule that follows the norms so far. `skip_spikes` leaves
# a whole update out.

# %%
chains = {
    "no clip": optax.identity(),
    "constant 1": clipjax.clip_norm(1.0),
    "zscore": clipjax.clip_norm(thresholds.zscore()),
    "ema_ratio": clipjax.clip_norm(thresholds.ema_ratio(), per="leaf"),
    "percentile 50": clipjax.clip_norm(thresholds.percentile(50)),
}
txs = {name: optax.chain(clip, optax.sgd(1.0)) for name, clip in chains.items()}
txs["skip zscore"] = clipjax.skip_spikes(optax.sgd(1.0), thresholds.zscore())


def run(tx):
    """Trains, and returns the losses, the norms, the thresholds and the loss on held-out rows."""

    def step(carry, key):
        params, state = carry
        starts = jax.random.randint(key, (BATCH, 1), 0, len(train) - LENGTH)
        value, grads = jax.value_and_grad(loss)(params, train[starts + jnp.arange(LENGTH)])
        updates, state = tx.update(grads, state, params)
        seen = {"loss": value, "norm": optax.tree.norm(grads)} | clipjax.report(state)
        return (optax.apply_updates(params, updates), state), seen

    @jax.jit
    def training(params):
        (params, _), seen = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(1), STEPS))
        return loss(params, held_out), seen

    return training(init(jax.random.key(0)))


runs = {name: run(tx) for name, tx in txs.items()}
for name, (final, seen) in runs.items():
    print(f"{name:14} held out {final:.3f} nats, largest norm {jnp.nanmax(seen['norm']):8.3g}")

# %% [markdown]
# ## Losses
#
# The mean of twenty updates each. A line that stays at the top has lost its weights to one update.

# %%
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for name, (_, seen) in runs.items():
    axes.plot(np.arange(0, STEPS, 20), seen["loss"].reshape(-1, 20).mean(1), label=name)
axes.set(xlabel="update", ylabel="training loss, nats a character", yscale="log")
axes.legend()
plt.show()

# %% [markdown]
# ## Norms, and what the rules made of them
#
# `clipjax.report` returns each transformation's numbers from inside of the scan, and `clipjax.plots.norms` draws them.

# %%
_, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained", sharey=True)
for place, name in zip(axes, ("zscore", "percentile 50"), strict=True):
    seen = runs[name][1]
    clipjax.plots.norms({key: value for key, value in seen.items() if key.startswith("clip_norm")}, ax=place)
    place.set_title(name, loc="right")
plt.show()

# %% [markdown]
# ## What to take from it
#
# Here a constant of 1 and `ema_ratio`, with a threshold for each matrix, hold the training, and rules that look at one
# norm of all matrices let the first large update through. One net and one learning rate decide nothing: [the
# results](../../benchmarks/README.md) have ten rules, two optimizers, ten learning rates and three seeds each.
# [Limiting gradients](../../docs/clipping.md) says how to choose.
