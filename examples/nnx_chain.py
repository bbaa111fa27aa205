"""The three-constraint chain in Flax NNX: the model and the train step stay as they are."""

import jax
import optax
from flax import nnx

import clipjax

tx = optax.chain(
    clipjax.clip_norm(1.0),
    optax.adam(1e-2),
    clipjax.clamp_weights(0.9),
    clipjax.prune_mask(optax.polynomial_schedule(0.0, 0.95, 3, 100), every=10, stop=100),
    clipjax.fake_quantize(4, start=120),
)
model = nnx.Linear(64, 10, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
x = jax.random.normal(jax.random.key(1), (256, 64))


@nnx.jit
def train_step(model, optimizer, x, y):
    """Takes one step of least squares."""
    loss, grads = nnx.value_and_grad(lambda model: optax.squared_error(model(x), y).mean())(model)
    optimizer.update(model, grads)
    return loss


losses = [train_step(model, optimizer, x, x[:, :10] - x[:, 10:20] / 2) for _ in range(300)]
print(
    f"loss {losses[0]:.3f} -> {losses[-1]:.3f}",
    {k: round(float(v), 3) for k, v in clipjax.report(optimizer.opt_state).items()},
)
print(clipjax.summarize(nnx.state(model, nnx.Param), optimizer.opt_state))
