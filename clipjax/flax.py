"""For Flax: a `TrainState` whose optimizer gets extra arguments, and attention logits. Needs `clipjax[flax]`."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state

from clipjax._arrays import arguments, trees
from clipjax.typing import State, Tree

__all__ = ["TrainState", "attention", "largest_logits", "max_logits"]


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


_NAME = "max_logits"


def largest_logits(
    query: jax.Array, key: jax.Array, mask: jax.Array | None = None, is_causal: bool = False
) -> jax.Array:
    r"""The largest attention logit of each head, :math:`\max q \cdot k / \sqrt d`, for `clipjax.clip_logits`.

    For a module of your own: Linen's ``self.sow("intermediates", "max_logits", largest_logits(query, key, mask))``, or
    NNX's ``self.sow(nnx.Intermediate, "max_logits", ...)``. `attention` does it in Flax's own modules.

    Args:
      query: [..., positions, heads, features].
      key: [..., positions, heads, features], or a number of heads that divides that of the queries.
      mask: bool, broadcasts to [..., heads, positions, positions]; logits where it is False do not count.
      is_causal: True where positions after that of the query do not count.

    Returns:
      f32[heads].

    Example:
      >>> q = jnp.array([[[1.0, 0.0]], [[0.0, 3.0]]])  # two positions, one head, two features
      >>> [round(x, 4) for x in largest_logits(q, q).tolist()]  # 9 / sqrt(2)
      [6.364]
    """
    heads = query.shape[-2], key.shape[-2]
    remedy = "As many heads of queries must share each head of keys."
    arguments.require(heads[0] % heads[1] == 0, "key", "have heads that divide those of `query`", heads, remedy)
    key = jnp.repeat(key, heads[0] // heads[1], axis=-2)
    scaled = query.astype(jnp.float32) / query.shape[-1] ** 0.5
    logits = jnp.einsum("...qhd,...khd->...hqk", scaled, key.astype(jnp.float32))
    allowed = jnp.ones(logits.shape[-2:], bool)
    allowed = jnp.tril(allowed) if is_causal else allowed
    allowed = allowed if mask is None else allowed & mask.astype(bool)
    logits = jnp.where(allowed, logits, -jnp.inf)
    return jax.lax.stop_gradient(jnp.max(logits, axis=tuple(i for i in range(logits.ndim) if i != logits.ndim - 3)))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    module: nn.Module | nnx.Module | None = None,
    **kwargs: Any,
) -> jax.Array:
    """Flax's `dot_product_attention` that also sows the largest logit of each head, for `clipjax.clip_logits`.

    Give it to Flax's modules as ``attention_fn=clipjax.flax.attention``, and call them with ``sow_weights=True``: they
    then hand over the module to sow in. The logits come in Linen with ``model.apply(..., mutable=["intermediates"])``,
    in NNX with ``nnx.capture(model, nnx.Intermediate)(...)``; `max_logits` reads both. The attention weights themselves
    are not sown.

    Args:
      query: as in Flax, as are all arguments.
      key: as in Flax.
      value: as in Flax.
      bias: as in Flax; the logits that are sown are those before it.
      mask: as in Flax.
      module: where to sow; None for nowhere.
      **kwargs: as in Flax.

    Returns:
      What Flax's function does.

    Example:
      >>> model = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention)
      >>> x = jnp.ones((1, 3, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> _, sown = model.apply({"params": params}, x, sow_weights=True, mutable=["intermediates"])
      >>> {path: logits.shape for path, logits in max_logits(sown["intermediates"]).items()}
      {'query/kernel': (2,)}
    """
    # NNX's module always says whether it is causal, and hands itself over only where it sows; Linen's never says so.
    in_nnx = "is_causal" in kwargs or isinstance(module, nnx.Module)
    if module is not None:
        logits = largest_logits(query, key, mask, bool(kwargs.get("is_causal")))
        module.sow(nnx.Intermediate if in_nnx else "intermediates", _NAME, logits)  # type: ignore[arg-type]
    fn = nnx.dot_product_attention if in_nnx else nn.dot_product_attention
    attended: jax.Array = fn(query, key, value, bias=bias, mask=mask, **kwargs)
    return attended


def max_logits(sown: Tree, kernel: str = "query/kernel") -> dict[str, jax.Array]:
    """The logits that were sown under the name "max_logits", by the path of the query kernel.

    Args:
      sown: Linen's collection of intermediates, or NNX's state of them.
      kernel: the path of the query kernel in the module that sowed.

    Returns:
      For ``tx.update(..., max_logits=)``: f32[heads] by path, the largest of several calls.

    Raises:
      ValueError: where none was sown.
    """
    found: dict[str, jax.Array] = {}
    for path, logits in trees.governed(jax.tree.map(jnp.asarray, sown)):
        keys = path.split("/")
        if _NAME in keys:
            at = "/".join([*keys[: keys.index(_NAME)], kernel])
            found[at] = jnp.maximum(found[at], logits) if at in found else logits
    remedy = "Call the model with `sow_weights=True` and collect intermediates: see `clipjax.flax.attention`."
    arguments.require(found, "sown", f"have a value named {_NAME!r}", list(trees.paths(sown)), remedy)
    return found
