"""`clip_logits`: query and key kernels rescaled head by head where an attention logit was too large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax._arrays import arguments, dtypes, leaf_axes, sharding, trees
from clipjax._maths import landing
from clipjax._weights import visiting
from clipjax.typing import Axis, Leaf, Number, PerLeaf, Schedule, Tree


class ClipLogitsState(NamedTuple):
    """State of `clip_logits`.

    Attributes:
      count: i32, updates so far.
      clipped: i32, updates in which a head was rescaled.
      nonfinite: i32, updates in which a logit was not finite: that head then stays as it is.
      max_logit: f32, the largest logit of the last update.
      threshold: f32, the threshold of the last update.
    """

    count: jax.Array  # type: ignore[assignment]
    clipped: jax.Array
    nonfinite: jax.Array
    max_logit: jax.Array
    threshold: jax.Array


def clip_logits(
    threshold: Number | Schedule, pairs: Mapping[str, str], *, axis: Axis | PerLeaf = None
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale query and key kernels of heads whose attention logits exceed a threshold (QK-clip).

    .. math:: \gamma_h = \min(1, \tau / S_h), \qquad W^q_h \leftarrow \sqrt{\gamma_h}\, W^q_h, \quad
        W^k_h \leftarrow \sqrt{\gamma_h}\, W^k_h

    :math:`S_h` is the largest logit :math:`q \cdot k / \sqrt d` of head h in the step whose gradients these are; after
    the update the same input gives :math:`\tau`. It is handed to `update`, as ``max_logits={path: f32[heads]}`` with
    the paths of the query kernels, ``f32[layers, heads]`` where layers are stacked in front; `clipjax.flax.max_logits`
    collects it. The biases beside the kernels, named "bias", are rescaled too. Where several heads share a key, the key
    is multiplied by the largest of their roots, and each query by what is left of its own factor: the logits of each
    head change by its own factor, and no weight grows.

    Chain it behind the optimizer, and before weight transformations such as `fake_quantize`. The moments of the
    optimizer stay as they are. A model that normalizes queries and keys after these kernels is not changed by it.

    Args:
      threshold: τ > 0: a number, which may be traced, or a schedule count -> τ. Kimi K2 uses 100.
      pairs: for the path of each query kernel that of its key kernel, as ``{"attn/query/kernel": "attn/key/kernel"}``.
      axis: where a kernel has its heads, or ``per_leaf``: an axis of one entry a head, or of heads x features in this
        order. By default the last but one of Flax's kernels [inputs, heads, features], and the last one of
        [inputs, outputs]. Biases follow their kernels.

    Returns:
      An `optax.GradientTransformationExtraArgs`, whose `update` needs `params` and ``max_logits=``, on several devices
      the largest over all of them.

    Raises:
      ValueError: for a threshold that is not positive and for no pairs; at init for a path that the params do not have,
        and heads that do not divide an axis; at update for missing or, where they are known, NaN logits.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> kernel = jnp.full((2, 1, 4), 3.0)  # inputs, heads, features
      >>> params = {"query": {"kernel": kernel}, "key": {"kernel": kernel}}
      >>> tx = optax.chain(optax.sgd(0.1), clip_logits(4.0, {"query/kernel": "key/kernel"}))
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(zeros, tx.init(params), params, max_logits={"query/kernel": jnp.array([16.0])})
      >>> optax.apply_updates(params, updates)["key"]["kernel"][0, 0].tolist()
      [1.5, 1.5, 1.5, 1.5]

    References:
      Kimi Team, "Kimi K2", 2025, https://arxiv.org/abs/2507.20534, section 2.1. D3: which values to limit.
    """
    limits = arguments.positive_schedule(threshold, "threshold", "All heads have the same one; Kimi K2 uses 100.")
    remedy = "Give paths of kernels: `{'attn/query/kernel': 'attn/key/kernel'}`."
    named = isinstance(pairs, Mapping) and all(isinstance(x, str) for pair in pairs.items() for x in pair)
    arguments.require(named and pairs, "pairs", "be a dict of paths that is not empty", pairs, remedy)
    leaf_axes.check(axis)

    def init_fn(params: Tree) -> ClipLogitsState:
        leaves = dict(trees.governed(params))
        missing = [path for pair in pairs.items() for path in pair if path not in leaves]
        # `optax.tree.map_params` asks for the state of no params
        known = not missing or not leaves
        arguments.require(known, "pairs", "name leaves of the params", missing, f"There are {sorted(leaves)}.")
        count, clipped, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(3))
        return ClipLogitsState(count, clipped, nonfinite, *(jnp.zeros((), jnp.float32) for _ in range(2)))

    def update_fn(
        updates: Tree, state: ClipLogitsState, params: Tree | None = None, **extra: object
    ) -> tuple[Tree, ClipLogitsState]:
        if params is None:
            raise ValueError(arguments.NO_PARAMS)
        trees.check_kind(state, ClipLogitsState)
        if visiting.of(extra) is not None:
            return updates, state
        logits = _logits(extra.get("max_logits"), list(pairs))
        leaves = dict(trees.governed(params))
        limit = jnp.asarray(limits(state.count), jnp.float32)
        found = _roots(limit, {query: (key, logits[query]) for query, key in pairs.items()}, leaves, axis)
        places = {path: (heads, heads.axis) for path, heads in found.items()}
        for path, heads in found.items():
            bias = _beside(path)
            if bias in leaves and bias not in found:
                places[bias] = heads, _axis_beside(leaves[bias], leaves[path], heads.axis, bias)
        moved = [
            _rescaled(u, leaves[path], *places[path]) if path in places else u
            for path, u in zip(trees.paths(updates), trees.flatten(updates)[0], strict=True)
        ]
        every = jnp.concatenate([x.ravel() for x in logits.values()])
        finite = jnp.isfinite(every)
        return trees.flatten(updates)[1].unflatten(moved), ClipLogitsState(
            optax.safe_increment(state.count),
            state.clipped + jnp.any(finite & (every > limit)).astype(jnp.int32),
            state.nonfinite + jnp.any(~finite).astype(jnp.int32),
            jnp.max(every),
            limit,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _logits(given: object, queries: list[str]) -> dict[str, jax.Array]:
    """The largest logits by path of a query kernel, f32."""
    remedy = f"Hand in the largest of each head: `tx.update(grads, state, params, max_logits={{{queries[0]!r}: ...}})`."
    arguments.require(isinstance(given, Mapping), "max_logits", "be a dict of arrays", given, remedy)
    assert isinstance(given, Mapping)
    missing = [path for path in queries if path not in given]
    arguments.require(not missing, "max_logits", f"have the logits of {missing}", sorted(given), remedy)
    found = {path: jnp.asarray(given[path], jnp.float32) for path in queries}
    for path, x in found.items():
        arguments.require(x.ndim >= 1, "max_logits", f"have an axis of heads at {path!r}", f"shape {x.shape}", remedy)
        known = arguments.traced(x) or not np.isnan(x).any()
        arguments.require(known, "max_logits", "not be NaN", path, "A loss that is NaN has no such step: skip it.")
    return found


class _Heads(NamedTuple):
    """The factors of the heads of one kernel.

    Attributes:
      factors: f32[(layers,) heads].
      features: entries of a head along the axis of heads, 1 where that has nothing else.
      axis: the axis of heads of the kernel, counted from 0.
    """

    factors: jax.Array
    features: int
    axis: int


def _roots(
    limit: jax.Array, pairs: dict[str, tuple[str, jax.Array]], leaves: dict[str, Leaf], axis: Axis | PerLeaf
) -> dict[str, _Heads]:
    """The factor of each head, by path of a kernel; a key takes the largest root of all queries that meet it."""
    gammas: dict[str, jax.Array] = {}
    shared: dict[str, jax.Array] = {}
    for query, (key, logits) in pairs.items():
        keys = _heads_of_keys(logits, leaves, query, key, axis)
        over = jnp.isfinite(logits) & (logits > limit) & (limit > 0)
        gammas[query] = jnp.where(over, limit / jnp.where(over, logits, 1.0), 1.0)
        root = jnp.sqrt(jnp.max(gammas[query].reshape(*logits.shape[:-1], keys, -1), axis=-1))
        shared[key] = jnp.maximum(shared[key], root) if key in shared else root

    def heads(path: str, factors: jax.Array) -> _Heads:
        at = _axis(axis, path, leaves[path], factors.ndim - 1)
        return _Heads(factors, leaves[path].shape[at] // factors.shape[-1], at)

    found = {key: heads(key, root) for key, root in shared.items()}
    for query, (key, _) in pairs.items():
        grouped = gammas[query].reshape(*shared[key].shape, -1) / shared[key][..., None]
        found[query] = heads(query, grouped.reshape(gammas[query].shape))
    return found


def _heads_of_keys(logits: jax.Array, leaves: dict[str, Leaf], query: str, key: str, axis: Axis | PerLeaf) -> int:
    """How many heads the keys have; raises where the logits are not those of these kernels."""
    heads, layers = logits.shape[-1], logits.shape[:-1]
    kernels = {path: leaves[path] for path in (query, key)}
    sizes = [kernel.shape[_axis(axis, path, kernel, len(layers))] for path, kernel in kernels.items()]
    features = sizes[0] // max(heads, 1)
    keys = sizes[1] // max(features, 1)
    fits = heads > 0 and heads * features == sizes[0] and keys * features == sizes[1] and keys and heads % keys == 0
    fits = fits and all(kernel.shape[: len(layers)] == layers for kernel in kernels.values())
    fits = fits and kernels[query].ndim == kernels[key].ndim
    remedy = "Name the axis by `axis=`; logits of stacked layers are [layers, heads]."
    shapes = {path: kernel.shape for path, kernel in kernels.items()} | {"logits": logits.shape}
    arguments.require(fits, "max_logits", "have as many heads as the kernels", shapes, remedy)
    return keys


def _axis(axis: Axis | PerLeaf, path: str, kernel: Leaf, layers: int) -> int:
    """The axis of heads of a kernel, counted from 0."""
    given = leaf_axes.resolve(axis, path, kernel)
    if given is not None:
        arguments.require(len(given) == 1, "axis", "be one axis of every kernel", given, f"Leaf {path!r} has it.")
        return given[0]
    separate = kernel.ndim - layers > 2  # inputs, heads, features; else heads x features in one axis
    return kernel.ndim - 1 - separate


def _axis_beside(bias: Leaf, kernel: Leaf, axis: int, path: str) -> int:
    """The same axis of the bias of a kernel: it lacks one, that of the inputs, which may stand before or behind."""
    size = kernel.shape[axis]
    fits = [a for a in (axis - 1, axis) if 0 <= a < bias.ndim and bias.shape[a] == size]
    remedy = "Give it another name than `bias` if it is none of this kernel."
    shapes = f"shape {bias.shape} beside {kernel.shape}"
    arguments.require(
        fits and bias.ndim == kernel.ndim - 1, path, "have the axis of heads of its kernel", shapes, remedy
    )
    return fits[0]


def _beside(path: str) -> str:
    """The path of the bias of a kernel; of a leaf of another name its own."""
    *parents, name = path.split("/")
    return "/".join([*parents, "bias"]) if name == "kernel" else path


def _rescaled(update: jax.Array | None, p: jax.Array, heads: _Heads, axis: int) -> jax.Array:
    """The update after which a leaf is its next value times the factor of each head; as it is where that is 1."""
    factors, layers = heads.factors, heads.factors.ndim - 1
    shape = [*factors.shape[:-1], *[1] * (p.ndim - layers)]
    shape[axis] = p.shape[axis]
    repeated = jnp.broadcast_to(factors[..., None], (*factors.shape, heads.features)).reshape(shape)
    wide = dtypes.widened(p)
    by = sharding.laid_as(jnp.broadcast_to(repeated.astype(wide.dtype), p.shape), wide)
    step = jnp.zeros_like(wide) if update is None else jnp.broadcast_to(update.astype(wide.dtype), p.shape)
    # Not rounded to a narrower dtype: latent weights behind it are to keep the step, and a factor that is nearly 1.
    return jnp.where(by == 1, step, landing.land(wide, (wide + step) * by))
