"""Claims: a frozen chain costs at most 1.06 times additions over its arrays, refreshes in the program 1.15 times that.

One jitted, donated update + apply_updates at 1.6e7 parameters, all variants in one process, in turns of eight steps as
a training loop would run them; ratios of medians. The first four of a turn are not timed: what runs behind a refresh,
which frees hundreds of MB, is slower for about three steps. Bytes a parameter are those that the compiled program moves
outside of loops, GB/s those over the time; a GPU wants `--size 2.7e8`, or it waits for the host.
"frozen" compiles with `refresh=False`; "cycle" keeps the refreshes in the program and runs past `stop`; "refresh" is
one update that recomputes mask and steps; "by hand" is the frozen chain in one function that lands nowhere exactly and
has no case for NaN and infinity: what is left when exactness costs nothing; "additions" reads and writes the same
arrays behind clip and adam and only adds them up: what is left when clamping, pruning and rounding cost nothing.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import compiled
import jax
import jax.numpy as jnp
import optax

import clipjax
from clipjax import projections


def chain(*names: str) -> optax.GradientTransformationExtraArgs:
    """The chain that has these transformations besides adam."""
    build = {
        "clip": lambda: clipjax.clip(0.01),
        "norm": lambda: clipjax.clip_norm(clipjax.thresholds.zscore()),
        "clamp": lambda: clipjax.clamp_weights(0.1),
        "prune": lambda: clipjax.prune_mask(optax.polynomial_schedule(0.0, 0.9, 3, 2), every=1, stop=2),
        "quantize": lambda: clipjax.fake_quantize(4, every=1, stop=2),
    }
    before = [build[name]() for name in names if name in ("clip", "norm")]
    after = [build[name]() for name in names if name not in ("clip", "norm")]
    return optax.chain(*before, optax.adam(1e-3), *after)


def by_hand(additions: bool = False) -> optax.GradientTransformationExtraArgs:
    """Clamp, prune and quantize behind clip and adam as one would write them for this program alone, or additions."""
    step = 0.1 / 7

    def level(z):
        return z if additions else jnp.clip(jnp.round(z / step), -7, 7) * step

    def latent(z, u, keep, p):
        if additions:
            return jnp.where(keep, z + u + p, 0.0)
        return jnp.where(keep, jnp.clip(jnp.where(level(z) == p, z, p) + u, -0.1, 0.1), 0.0)

    def init_fn(params):
        return jax.tree.map(jnp.copy, params), jax.tree.map(lambda p: jnp.abs(p) > 0.05, params)

    def update_fn(updates, state, params=None, **extra):
        carry, mask = state
        carry = jax.tree.map(latent, carry, updates, mask, params)
        return jax.tree.map(lambda z, p: level(z) - p, carry, params), (carry, mask)

    return optax.chain(clipjax.clip(0.01), optax.adam(1e-3), optax.GradientTransformationExtraArgs(init_fn, update_fn))


def held(projection: clipjax.projections.Projection) -> optax.GradientTransformation:
    """Adam, and weights that are held in a set."""
    return optax.chain(optax.adam(1e-3), clipjax.project(projection))


VARIANTS = {
    "adam": (optax.adam(1e-3), None),
    "+ clip": (chain("clip"), None),
    "+ clamp": (chain("clip", "clamp"), None),
    "+ prune, frozen": (chain("clip", "clamp", "prune"), False),
    "whole chain, frozen": (chain("clip", "clamp", "prune", "quantize"), False),
    "by hand": (by_hand(), None),
    "additions": (by_hand(additions=True), None),
    "whole chain, cycle": (chain("clip", "clamp", "prune", "quantize"), None),
    "whole chain, refresh": (chain("clip", "clamp", "prune", "quantize"), True),
    "clip_norm(zscore) + adam": (chain("norm"), None),
    "clip_norm(relative, per=leaf) + adam": (
        optax.chain(clipjax.clip_norm(clipjax.thresholds.relative(0.01), per="leaf"), optax.adam(1e-3)),
        None,
    ),
    "adam + sphere": (held(projections.sphere()), None),
    "adam + sphere of each unit": (held(projections.sphere(axis=-1)), None),
    "adam + spectral_cap": (held(projections.spectral_cap(1.0)), None),
    "adam + orthonormal": (held(projections.orthonormal()), None),
    "optax.clip_by_global_norm + adam": (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), None),
}


PRODUCTS = ("adam + spectral_cap", "adam + orthonormal")
"""Matrix products, which take seconds a step on a CPU: run by `--only` alone."""


def stepper(tx: optax.GradientTransformation, refresh: bool | None, options: dict | None = None):
    """A donated, jitted update and application."""
    tx = optax.with_extra_args_support(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, refresh=refresh)
        return optax.apply_updates(params, updates), state

    return step


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.6e7, help="parameters")
    parser.add_argument("--leaves", type=int, default=16, help="square leaves that hold them")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=None, help="variants to run besides adam")
    parser.add_argument("--vectors", type=int, help="bits of the CPU's vectors that XLA may use; its default is 256")
    options = parser.parse_args()
    compiler = {"xla_cpu_prefer_vector_width": options.vectors} if options.vectors else None
    side = round((options.size / options.leaves) ** 0.5)
    size = options.leaves * side**2

    @jax.jit
    def make():
        keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(options.leaves)]
        return {f"layer{i}": {"kernel": 0.05 * jax.random.normal(k, (side, side))} for i, k in enumerate(keys)}

    grads = jax.tree.map(lambda x: 0.1 * x, make())

    runs = {}
    for name, (tx, refresh) in VARIANTS.items():
        if name not in PRODUCTS if options.only is None else name in (*options.only, "adam"):
            params = make()
            first, step = stepper(tx, None, compiler), stepper(tx, refresh, compiler)
            state = tx.init(params)
            for _ in range(4):  # past `stop`
                params, state = first(params, state, grads)
            executable = step.lower(params, state, grads).compile()
            program = compiled.read(executable.as_text())
            moved = 0 if program.passes(side**2 // 2) else program.once()
            params, state = jax.block_until_ready(step(params, state, grads))
            runs[name] = [step, params, state, [], moved, executable.memory_analysis().temp_size_in_bytes]
            del params, state
    for _ in range(options.repeats):
        for run in runs.values():
            for _ in range(8):
                begin = time.perf_counter()
                run[1], run[2] = jax.block_until_ready(run[0](run[1], run[2], grads))
                run[3].append(time.perf_counter() - begin)
            del run[3][-8:-4]

    base = statistics.median(runs["adam"][3])
    vectors = f", vectors of {options.vectors} bits" if options.vectors else ""
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}, {options.leaves} leaves of {side} x {side}{vectors}")
    print(f"{'variant':34s} {'ms':>8s} {'ratio':>7s} {'bytes/param':>12s} {'GB/s':>6s} {'temporaries MB':>15s}")
    ratios = {}
    for name, (_, _, _, times, moved, temp) in runs.items():
        median = statistics.median(times)
        ratios[name] = median / base
        rate = f"{moved / size:12.1f} {moved / median / 1e9:6.0f}" if moved else f"{'':19s}"
        print(f"{name:34s} {1e3 * median:8.2f} {ratios[name]:7.2f} {rate} {temp / 1e6:15.1f}")
    claims = [
        ("whole chain, frozen", "additions", 1.06),
        ("whole chain, cycle", "whole chain, frozen", 1.15),
        ("clip_norm(zscore) + adam", "adam", 1.25),
        ("clip_norm(zscore) + adam", "optax.clip_by_global_norm + adam", 0.6),
    ]
    for name, peer, most in claims:
        if name in ratios and peer in ratios:
            ratio = ratios[name] / ratios[peer]
            print(f"{name} / {peer} = {ratio:.2f} (at most {most}): {'holds' if ratio <= most else 'FAILS'}")


if __name__ == "__main__":
    main()
