"""Claim: on TPUs and GPUs a frozen chain is one fused pass: 28 bytes a parameter, 29 with a mask, 37 with a carry.

Nothing is run and nothing allocated: update and application are compiled ahead of time for four devices that need not
be there (TPU v5e with `libtpu`, NVIDIA from a target config with JAX's CUDA plugin), and the compiled program is read
(`compiled.py`). Each device holds 2^28 parameters in two arrays, sharded along their first axis; params and state are
donated. `make aot ARGS="--gpu-config h100.txtpb"` installs the extra `aot` in an environment of its own and runs it.

Columns: bytes moved through main memory per parameter, outside of loops; the kernels that touch a large array, per
array; temporaries per parameter; the loops, as bytes per parameter in a turn x turns, n where the data decide; what is
sent to other devices, in bytes a collective; milliseconds a step, by XLA's estimate (each loop taken once) on TPU, by
bytes / bandwidth where XLA has none (GPU).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sysconfig

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight host devices, so that the library takes the way that it takes across devices; no autotuning without a GPU.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_gpu_autotune_level=0"
)
for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}.items():
    os.environ.setdefault(name, value)
_PTXAS = pathlib.Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13", "bin")
os.environ["PATH"] = f"{_PTXAS}{os.pathsep}{os.environ['PATH']}"

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import clipjax
from clipjax import formats, projections, roundings, steps, thresholds

LEAVES, ROWS, COLUMNS = 2, 2**14, 2**13  # of one device: a mask of 2^27 bytes does not fit into the vector memory
PARAMS = LEAVES * ROWS * COLUMNS
RATE = roundings.rate(0.1)
RAMP = optax.polynomial_schedule(0.0, 0.9, 3, 1000)


def clip():
    return clipjax.clip(0.01)


def clamp():
    return clipjax.clamp_weights(0.1)


def prune():
    return clipjax.prune_mask(RAMP, every=100, stop=1000)


def held():
    one = jnp.ones((1, 1), bool)
    return clipjax.prune_mask(mask={f"layer{i}": {"kernel": one} for i in range(LEAVES)})


def quantize(**options):
    return clipjax.fake_quantize(4, stop=1000, **options)


def master():
    return clipjax.project(clipjax.projections.identity(), carry=True, inner=optax.adam(1e-3))


def after(*constraints):
    """Adam, and transformations behind it."""
    return optax.chain(optax.adam(1e-3), *constraints)


def norm(threshold, *constraints, **options):
    """A clip of norms, adam, and transformations behind it."""
    return optax.chain(clipjax.clip_norm(threshold, **options), optax.adam(1e-3), *constraints)


def chain(*more):
    """The clip of gradients, adam, the clamp, and more transformations."""
    return optax.chain(clip(), optax.adam(1e-3), clamp(), *more)


FORMATS = (
    formats.q4_0(),
    formats.q8_0(),
    formats.mxfp4(),
    formats.tq2_0(),
    formats.q4_1(),
    formats.mxfp8(),
    formats.nvfp4(),
    formats.int4(),
    formats.int8(),
    formats.fp8_e4m3(),
    formats.nbits(),
    formats.nf4(),
)


def held_on(form, **options):
    """Adam, the clamp, and weights on a format."""
    return after(clamp(), clipjax.fake_quantize(form, **options))


# name: transformation, refresh, the most bytes per parameter in f32 on TPU v5e (goals of the project), most temporaries
VARIANTS = {
    "adam": (optax.adam(1e-3), None, 28.0, 0),
    "adam, clip": (optax.chain(clip(), optax.adam(1e-3)), None, 28.0, 0),
    "adam, clip(spam)": (optax.chain(clipjax.clip(thresholds.spam()), optax.adam(1e-3)), None, None, None),
    "adam, clamp": (after(clamp()), None, 28.0, 0),
    "adam, clip, clamp": (chain(), None, 28.0, 0),
    "adam, held mask": (after(held()), None, 29.1, 0),
    "adam, prune, frozen": (after(prune()), False, 29.1, 0),
    "adam, quantize, frozen": (after(quantize()), False, 36.2, 0),
    "adam, quantize per column, frozen": (after(quantize(axis=-1)), False, 36.2, 0),
    **{f"adam, clamp, {form.name}, frozen": (held_on(form), False, 40.0, 0) for form in FORMATS},
    **{f"adam, clamp, {form.name}, every=1": (held_on(form, every=1), None, 60.0, None) for form in FORMATS[:4]},
    "adam, quantize by rate, frozen": (after(quantize(rounding=RATE)), False, 36.2, 0),
    "rate refresh": (after(quantize(rounding=RATE)), True, None, None),
    "adam, master weights": (master(), None, None, None),
    "adam, sphere": (after(clipjax.project(projections.sphere())), None, None, None),
    "adam, sphere of each unit": (after(clipjax.project(projections.sphere(axis=-1))), None, None, None),
    "adam, spectral_cap": (after(clipjax.project(projections.spectral_cap(1.0))), None, None, None),
    "adam, orthonormal": (after(clipjax.project(projections.orthonormal())), None, None, None),
    "whole chain, held mask, frozen": (chain(held(), quantize()), False, 37.2, 0),
    "whole chain, frozen": (chain(prune(), quantize()), False, 37.2, 0),
    "zscore and whole chain, frozen": (norm(thresholds.zscore(), clamp(), prune(), quantize()), False, 41.3, 0),
    "whole chain, cycle": (chain(prune(), quantize()), None, None, None),
    "mask refresh": (chain(prune()), True, None, 4.2),
    "step refresh, absmax": (chain(quantize(step=steps.absmax())), True, None, 4.2),
    "step refresh, mse": (chain(quantize()), True, None, 4.2),
    "whole chain, refresh": (chain(prune(), quantize()), True, None, 4.2),
    "clip_norm(1)": (norm(1.0), None, 32.1, 0),
    "clip_norm(1, per=leaf)": (norm(1.0, per="leaf"), None, 32.1, 0),
    "clip_norm(1, ord=inf)": (norm(1.0, ord=np.inf), None, 32.1, 0),
    "clip_norm(1, ord=1)": (norm(1.0, ord=1), None, 32.1, 0),
    "clip_norm(1, ord=3)": (norm(1.0, ord=3), None, 32.1, 0),
    "clip_norm(zscore)": (norm(thresholds.zscore()), None, 32.1, 0),
    "clip_norm(ema_ratio, per=leaf)": (norm(thresholds.ema_ratio(), per="leaf"), None, 32.1, 0),
    "clip_norm(percentile)": (norm(thresholds.percentile(50)), None, 32.1, 0),
    "clip_norm(mean_sigma)": (norm(thresholds.mean_sigma(3)), None, 32.1, 0),
    "clip_norm(quantile_track)": (norm(thresholds.quantile_track(0.5)), None, 32.1, 0),
    "clip_norm(relative, per=leaf)": (norm(thresholds.relative(0.01), per="leaf"), None, None, None),
    "scale_to_norm(1, per=leaf)": (
        optax.chain(clipjax.scale_to_norm(1.0, per="leaf"), optax.adam(1e-3)),
        None,
        32.1,
        0,
    ),
    "skip_spikes(adam, zscore)": (clipjax.skip_spikes(optax.adam(1e-3), thresholds.zscore()), None, None, None),
    "optax.clip_by_global_norm": (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), None, None, None),
}


def build(tx, refresh, devices, dtype, leaves=LEAVES):
    """The compiled update and application, params and state donated, all arrays sharded along their first axis."""
    mesh = Mesh(np.array(devices), ("data",))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    shape = (ROWS * len(devices), COLUMNS)
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=split)
    params = {f"layer{i}": {"kernel": leaf} for i in range(leaves)}
    tx = optax.with_extra_args_support(tx)

    def place(x):
        rows = x.shape == shape or (x.ndim == 2 and x.shape[0] > len(devices))  # params, or scales of blocks
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if rows else whole)

    state = jax.tree.map(place, jax.eval_shape(tx.init, params))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, refresh=refresh)
        return optax.apply_updates(params, updates), state

    out = jax.tree.map(lambda x: x.sharding, (params, state))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out).lower(params, state, params).compile()


def measure(executable, bandwidth):
    """The row of a compiled program."""
    program = compiled.read(executable.as_text())
    large = ROWS * COLUMNS // 2
    loops = [(moved / PARAMS, turns) for moved, turns in program.passes(large)]
    costs = executable.cost_analysis() or {}
    seconds = costs.get("optimal_seconds", program.once() / bandwidth if bandwidth else 0.0)
    return {
        "bytes": program.once() / PARAMS,
        "kernels": len([k for k in program.large(large) if not k.loops]) / LEAVES,
        "temporaries": executable.memory_analysis().temp_size_in_bytes / PARAMS,
        "loops": loops,
        "sent": program.sent,
        "ms": 1e3 * seconds,
        "banned": sorted({k.op for k in program.large(large) if k.op in ("sort", "gather", "scatter", "custom-call")}),
    }


def line(name, row):
    """A row of the table."""
    loops = " + ".join(f"{moved:.1f} x {turns or 'n'}" for moved, turns in row["loops"]) or "-"
    kinds = {kind for kind, _ in row["sent"]}
    sizes = {kind: sorted(size for k, size in row["sent"] if k == kind) for kind in sorted(kinds)}
    sent = ", ".join(f"{kind} {'+'.join(map(str, size))}" for kind, size in sizes.items()) or "-"
    ms = f"{row['ms']:.1f}" if row["ms"] > 0 else "-"
    numbers = f"{row['bytes']:.2f} | {row['kernels']:g} | {row['temporaries']:.2f} | {loops} | {sent} | {ms}"
    return f"| {name} | {numbers} |"


def table(title, devices, dtype, bandwidth, only):
    """Print the rows of one machine and dtype."""
    print(f"\n{title}, {len(devices)} devices, params {jnp.dtype(dtype).name}\n")
    print("| variant | bytes/param | kernels | temporaries | loops | sent | ms |")
    print("| --- | ---: | ---: | ---: | --- | --- | ---: |")
    rows = {}
    for name, (tx, refresh, _, _) in VARIANTS.items():
        if only is None or name in only:
            rows[name] = measure(build(tx, refresh, devices, dtype), bandwidth)
            print(line(name, rows[name]), flush=True)
    return rows


def goals(rows):
    """Print which goals for TPU v5e with f32 params are missed, and how many are met."""
    met, missed = 0, []
    for name, row in rows.items():
        _, _, most, temporaries = VARIANTS[name]
        for got, goal, what in ((row["bytes"], most, "bytes"), (row["temporaries"], temporaries, "temporaries")):
            ok = goal is None or got <= goal + 0.005
            met += ok and goal is not None
            missed += [] if ok else [f"{name}: {got:.2f} {what} a parameter, goal {goal:.2f}"]
    print(f"\n{met} goals met, {len(missed)} missed" + "".join(f"\n  FAILS {m}" for m in missed))


def shape_of(rows, devices, dtype):
    """Print whether the frozen chain is one fusion an array, nothing else, and whether anything sorts or moves arrays.

    What a TPU copies of single numbers into its scalar memory writes nothing to the main one, and does not count.
    """
    moved = {name: row for name, row in rows.items() if row["banned"] or any(k != "all-reduce" for k, _ in row["sent"])}
    print(f"\nno sort, no gather, nothing sent but all-reduced: {'FAILS ' + ', '.join(moved) if moved else 'holds'}")
    for name in ("whole chain, held mask, frozen", "whole chain, frozen"):
        if name in rows:
            print(f"{name}: one fusion an array: {'holds' if rows[name]['kernels'] == 1 else 'FAILS'}")
    name = "whole chain, frozen"
    if name in rows:
        tx, refresh, _, _ = VARIANTS[name]
        programs = (build(tx, refresh, devices, dtype, leaves).as_text() for leaves in (LEAVES, 2 * LEAVES))
        few, many = (sum(k.written > 0 for k in compiled.read(text).kernels) for text in programs)
        more = (many - few) / LEAVES
        print(
            f"{name}: {more:g} more kernels for an array more, with the small ones: {'holds' if more == 1 else 'FAILS'}"
        )


def main() -> None:
    """Print a table for each machine and dtype, and which goals hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", default="v5e:2x2", help="topology name")
    parser.add_argument("--gpu-config", help="file with an XLA GpuTargetConfigProto in text form")
    parser.add_argument("--gpu", default="1x4x1", help="GPUs: slices x hosts x devices")
    parser.add_argument("--only", nargs="*", help="variants")
    options = parser.parse_args()
    versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "optax")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if importlib.util.find_spec("libtpu"):
        print(f"libtpu {importlib.metadata.version('libtpu')}")
        devices = topologies.get_topology_desc(platform="tpu", topology_name=options.tpu).devices
        for dtype in (jnp.float32, jnp.bfloat16):
            rows = table(f"TPU {options.tpu}", devices, dtype, None, options.only)
            shape_of(rows, devices, dtype)
            if dtype == jnp.float32 and options.tpu.startswith("v5e"):
                goals(rows)
    else:
        print("No libtpu here: install the extra `aot`.")
    if options.gpu_config and importlib.util.find_spec("jax_cuda13_plugin"):
        config = pathlib.Path(options.gpu_config).read_text()
        bandwidth = float(re.search(r"memory_bandwidth: (\d+)", config)[1])
        name = re.search(r'device_description_str: "(.*)"', config)[1]
        devices = topologies.get_topology_desc(
            platform="cuda", topology_name="x", topology=options.gpu, target_config=config
        ).devices
        for dtype in (jnp.float32, jnp.bfloat16):
            rows = table(name, devices, dtype, bandwidth, options.only)
            shape_of(rows, devices, dtype)
    else:
        print("\nNo GPU: give --gpu-config, and install the extra `aot`.")


if __name__ == "__main__":
    main()
