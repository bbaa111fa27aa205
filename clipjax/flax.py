"""For Flax: a Linen `TrainState` whose optimizer gets extra arguments. Needs `pip install 'clipjax[flax]'`."""

from __future__ import annotations

import dataclasses

import optax
from flax.training import train_state

from clipjax.typing import State, Tree

__all__ = ["TrainState"]


def __dir__() -> list[str]:
    return __all__


class TrainState(train_state.TrainState):
    r"""Flax's `TrainState`, whose `apply_gradients` also passes extra arguments on to `tx.update`.

    Flax's own passes gradients and params alone, so that `grad=` (gradient scores), `refresh=` (a step without the code
    of refreshes), and `value=` (a line search, `optax.contrib.reduce_on_plateau`) cannot be reached. `nnx.Optimizer`
    passes them on by itself.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import clipjax, clipjax.flax
      >>> tx = optax.chain(optax.sgd(0.5), clipjax.prune_mask(0.5, score=clipjax.scores.gradient()))
      >>> params = {"kernel": jnp.ones((1, 2))}
      >>> state = clipjax.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
      >>> grads = {"kernel": jnp.array([[1.0, 0.5]])}
      >>> state = state.apply_gradients(grads=grads, grad=grads, refresh=True)
      >>> state.params["kernel"].tolist(), int(state.step)
      ([[0.5, 0.0]], 1)
    """

    def apply_gradients(self, *, grads: Tree, **kwargs: object) -> TrainState:
        """One update of the optimizer.

        Args:
          grads: the gradients, a tree like `params`.
          **kwargs: a new value for a field of the state, as in Flax (`batch_stats=` of a subclass), or an extra
            argument of `tx.update`.

        Returns:
          The next state.
        """
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: value for name, value in kwargs.items() if name in names}
        extra = {name: value for name, value in kwargs.items() if name not in names}
        inside = optax.with_extra_args_support(self.tx)

        def update_fn(updates: Tree, state: State, params: Tree | None = None) -> tuple[Tree, State]:
            return inside.update(updates, state, params, **extra)

        state: TrainState = self.replace(tx=optax.GradientTransformation(self.tx.init, update_fn))
        new: TrainState = super(TrainState, state).apply_gradients(grads=grads, **fields).replace(tx=self.tx)
        return new
