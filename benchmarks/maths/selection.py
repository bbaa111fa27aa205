"""Claim: an exact global mask of 1e7 scores costs at most 12 counting passes and, on a CPU, 1/60 of an argsort mask.

All in one process, in turn, random data; ratios of medians. torch joins where it is installed
(`pip install torch==2.13.0`). Temporaries are those of the compiled program, beside its inputs and outputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import clipjax

SPARSITY = 0.9


def count(scores):
    """How many scores go."""
    return round(SPARSITY * scores.size)


@jax.jit
def ours(scores):
    """The public function."""
    return clipjax.make_mask(scores, SPARSITY)


@jax.jit
def argsort_mask(scores):
    """Rank every score, keep the upper ranks: exact, ties by position. What jaxpruner does."""
    return jnp.ones(scores.size, bool).at[jnp.argsort(scores)[: count(scores)]].set(False)


@jax.jit
def sort_mask(scores):
    """Compare with the k-th of the sorted scores: ties are not exact."""
    return scores > jnp.sort(scores)[count(scores) - 1]


@jax.jit
def top_k_mask(scores):
    """Compare with the last of the largest: ties are not exact."""
    return scores >= jax.lax.top_k(scores, scores.size - count(scores))[0][-1]


@jax.jit
def one_pass(scores):
    """The yardstick: one count."""
    return jnp.sum(scores < 0.5)


def partition_mask(scores):
    """NumPy's introselect on the host: ties are not exact."""
    array = np.asarray(scores)
    return array > np.partition(array, count(array) - 1)[count(array) - 1]


def torch_masks(scores):
    """The same in torch: kthvalue (ties are not exact), and `torch.nn.utils.prune` with all that it does."""
    import torch
    from torch.nn.utils import prune

    torch.set_num_threads(2)
    values = torch.from_numpy(np.array(scores))

    def global_unstructured(_):
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(values)
        prune.global_unstructured([(module, "weight")], prune.L1Unstructured, amount=count(scores))
        return module.weight_mask

    def kthvalue(_):
        return values > torch.kthvalue(values, count(scores)).values

    return {"torch.kthvalue mask": kthvalue, "torch prune.global_unstructured": global_unstructured}


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (options.size,)))
    runs = {
        "clipjax.make_mask": ours,
        "argsort mask": argsort_mask,
        "jnp.sort mask": sort_mask,
        "lax.top_k mask": top_k_mask,
        "np.partition mask": partition_mask,
        "one counting pass": one_pass,
    }
    if importlib.util.find_spec("torch"):
        runs |= torch_masks(scores)
    assert int((~ours(scores)).sum()) == count(scores)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(scores))
            if repeat:
                times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}, {options.size} f32 scores, {count(scores)} removed")
    print(f"{'':32s} {'ms':>9s} {'x ours':>8s} {'temporaries MB':>15s}")
    for name, run in runs.items():
        memory = ""
        if hasattr(run, "lower"):
            memory = f"{run.lower(scores).compile().memory_analysis().temp_size_in_bytes / 1e6:15.1f}"
        print(f"{name:32s} {1e3 * median[name]:9.2f} {median[name] / median['clipjax.make_mask']:8.2f} {memory}")
    passes = median["clipjax.make_mask"] / median["one counting pass"]
    ratio = median["argsort mask"] / median["clipjax.make_mask"]
    print(f"clipjax / one counting pass = {passes:.1f} (at most 12): {'holds' if passes <= 12 else 'FAILS'}")
    print(f"argsort mask / clipjax = {ratio:.0f} (at least 60): {'holds' if ratio >= 60 else 'FAILS'}")


if __name__ == "__main__":
    main()
