"""Claim: `analyze` reads a GPT of 7e9 parameters and 32 layers in 30 s and 2 GB, and a ResNet-18 in 2 s.

The params are abstract. Each model is read in a process of its own, whose peak memory is that of the analysis and the
imports; the row "imports" has the imports alone. The goal is for CPU seconds of all threads, which other programs on
the machine change less than the clock. The GPT has GQA, RoPE, RMSNorm, SwiGLU in one fused kernel and a tied embedding.
The ResNet is a Linen model, whose layers declare their widths: read from one trace alone, and proved with `rebuild`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

import clipjax

GOALS = {"GPT, 32 layers": (30.0, 2.0), "ResNet-18, one trace": (2.0, 2.0), "ResNet-18, proved": (2.0, 2.0)}


def rms_norm(x, scale):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def rotated(x):
    """Rotary positions: x is [batch, time, heads, head size]."""
    size = x.shape[-1]
    angles = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(0, size, 2) / size)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("query", "key", "value"))
    q, k = rotated(q), rotated(k)
    queries_a_key = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, queries_a_key, 2), jnp.repeat(v, queries_a_key, 2)
    logits = jnp.einsum("bthk,bshk->bhts", q, k) / jnp.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -1e9))
    return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), p["out"])


def gpt(params, tokens):
    x = params["embedding"][tokens]
    for p in params["layers"]:
        x = x + attention(p, rms_norm(x, p["norm_1"]))
        gate, up = jnp.split(rms_norm(x, p["norm_2"]) @ p["gate_up"], 2, -1)
        x = x + jax.nn.silu(gate) * up @ p["down"]
    return rms_norm(x, params["norm"]) @ params["embedding"].T


def gpt_params(layers, d=4096, heads=32, kv_heads=8, head=128, inner=14336, tokens=32_000):
    """Shapes of a GPT's params: those of Mistral 7B by default."""
    kernels = {
        "norm_1": (d,),
        "query": (d, heads, head),
        "key": (d, kv_heads, head),
        "value": (d, kv_heads, head),
        "out": (heads, head, d),
        "norm_2": (d,),
        "gate_up": (d, 2 * inner),
        "down": (inner, d),
    }
    tree = {"embedding": (tokens, d), "layers": [kernels] * layers, "norm": (d,)}
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16), tree, is_leaf=lambda x: isinstance(x, tuple))


class ResNet(nn.Module):
    """ResNet-18 for images of 224 x 224: streams of four widths, and the widths inside of its eight blocks."""

    streams: tuple[int, ...] = (64, 128, 256, 512)
    inside: tuple[int, ...] = (64, 64, 128, 128, 256, 256, 512, 512)

    @nn.compact
    def __call__(self, x):
        """Maps images f32[n, height, width, 3] to logits f32[n, 1000]."""
        conv = lambda n, size, strides, name: nn.Conv(n, (size, size), strides, use_bias=False, name=name)  # noqa: E731
        norm = lambda name: nn.BatchNorm(use_running_average=True, name=name)  # noqa: E731
        x = nn.relu(norm("stem_norm")(conv(self.streams[0], 7, 2, "stem")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, width in enumerate(self.inside):
            stream, strides = self.streams[i // 2], 2 if i in (2, 4, 6) else 1
            y = nn.relu(norm(f"in_norm_{i}")(conv(width, 3, strides, f"in_{i}")(x)))
            y = norm(f"out_norm_{i}")(conv(stream, 3, 1, f"out_{i}")(y))
            if strides > 1:
                x = norm(f"shortcut_norm_{i}")(conv(stream, 1, strides, f"shortcut_{i}")(x))
            x = nn.relu(x + y)
        return nn.Dense(1000, name="head")(x.mean((1, 2)))


def rebuilt(widths):
    """The ResNet with other widths: a batch norm's scale has as many entries as its stream or its block."""
    streams = (widths["stem_norm/scale"], *(widths[f"out_norm_{i}/scale"] for i in (2, 4, 6)))
    return ResNet(streams, tuple(widths[f"in_norm_{i}/scale"] for i in range(8))).apply


def read(name):
    """The analysis of a model, and how many params it has."""
    if name.startswith("GPT"):
        variables, tokens = gpt_params(32), jax.ShapeDtypeStruct((1, 64), jnp.int32)
        return variables, lambda: clipjax.analyze(gpt, variables, tokens)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(ResNet().init, jax.random.key(0), images)
    rebuild = rebuilt if name.endswith("proved") else None
    return variables, lambda: clipjax.analyze(ResNet().apply, variables, images, rebuild=rebuild)


def gigabytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def row(name):
    """What one process measures."""
    if name == "imports":
        return {"peak": gigabytes()}
    variables, analyze = read(name)
    wall, cpu = time.perf_counter(), time.process_time()
    found = analyze()
    return {
        "params": sum(x.size for x in jax.tree.leaves(variables)),
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": gigabytes(),
        "groups": len(found.groups),
        "proved": sum(group.proved for group in found.groups),
    }


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", help="measure one row in this process, and print it as JSON")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(row(options.row)))
        return
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}")
    print("| model | params | s | CPU s | goal s | peak GB | goal GB | groups | proved |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    failed = []
    for name in ("imports", *GOALS):
        command = [sys.executable, str(pathlib.Path(__file__)), "--row", name]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        if name == "imports":
            print(f"| imports | | | | | {found['peak']:.2f} | | | |")
            continue
        seconds, memory = GOALS[name]
        print(
            f"| {name} | {found['params']:,} | {found['wall']:.1f} | {found['cpu']:.1f} | {seconds:.0f}"
            f" | {found['peak']:.2f} | {memory:.0f} | {found['groups']} | {found['proved']} |"
        )
        if found["cpu"] > seconds or found["peak"] > memory:
            failed.append(name)
    print("Within its time and memory: " + (f"FAILS for {', '.join(failed)}" if failed else "holds for all"))


if __name__ == "__main__":
    main()
