"""Mutation test: one-line breaks of the core, each of which must turn its tests red. Run by `make mutants`.

Each break is made in a temporary copy of the tree, and a narrow selection of the tests runs there. A break that no
test notices fails the run, and so does one whose text is not found exactly once: then the code has moved on, and the
line here must follow it.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("clipjax", "tests", "benchmarks", "pyproject.toml", "README.md")


class Mutant(NamedTuple):
    file: str  # in clipjax/
    old: str
    new: str
    tests: str  # in tests/, without "test_" and ".py"
    expression: str = ""  # pytest -k


MUTANTS = (
    Mutant(
        "_landing.py", "jnp.isfinite(landed), -p, u)", "jnp.isfinite(landed), -0.5 * p, u)", "contract_chain", "zero"
    ),
    Mutant("_landing.py", "gone & jnp.isfinite(landed), -p", "gone, -p", "pruning", "emitted_as_it_is"),
    Mutant("_landing.py", "reached > wanted, inward, u)", "reached < 0, inward, u)", "projecting", "land"),
    Mutant("_landing.py", "move - (apart | kind.type(1))", "move - kind.type(1)", "projecting", "land"),
    Mutant("_projecting.py", "off & (w != 0)", "(w != w)", "projecting", "edited"),
    Mutant(
        "_projecting.py",
        "edited | ~jnp.isfinite(z), w, z)",
        "edited, w, z)",
        "contract_numbers",
        "nonfinite_target and project_master",
    ),
    Mutant("_projecting.py", "(u == -p) & ~g", "(u == 1) & ~g", "contract_chain", "beyond_the_grid"),
    Mutant(
        "_landing.py",
        "(new != landed) & jnp.isfinite(landed)",
        "(new != landed)",
        "contract_numbers",
        "nonfinite and clamp",
    ),
    Mutant(
        "_projecting.py", "key_at(key, state.count - 1)", "key_at(key, state.count)", "contract_chain", "stochastic"
    ),
    Mutant(
        "_projecting.py",
        "steps = _aligned(updates, params, picks)",
        "steps = jax.tree.map(lambda u: u + 0 * jnp.sum(u), _aligned(updates, params, picks))",
        "passes",
        "whole_chain",
    ),
    Mutant("_norms.py", "if ord <= 1:", "if ord < 1:", "passes", "clip_norm_one"),
    Mutant("_projecting.py", "(since % every == 0)", "(since % every == 1)", "projecting", "refreshes_are_due"),
    Mutant("_projecting.py", "| (context.count == stop)", "", "projecting", "refreshes_are_due"),
    Mutant("_projecting.py", '{"grad": updates, **extra}', '{**extra, "grad": updates}', "pruning", "callers_own_wins"),
    Mutant(
        "_projecting.py",
        "jnp.zeros_like(p, dtype=dtype) + p.astype(dtype)",
        "p.astype(dtype)",
        "contract",
        "shares_no_buffer",
    ),
    Mutant(
        "_projecting.py",
        "raise ValueError(arguments.NO_PARAMS)",
        "pass",
        "contract_numbers",
        "missing_params and clamp",
    ),
    Mutant("_selecting.py", "jnp.where(bits == sign, kind.type(0), bits)", "bits", "selecting", "order or adversarial"),
    Mutant("_selecting.py", "counts - removed\n", "counts - removed + 1\n", "selecting", "keep"),
    Mutant("_selecting.py", "[::-1] - counts  # ties", "[::-1] - 0 * counts  # ties", "selecting", "keep"),
    Mutant("_selecting.py", "twice > divisor) |", "twice >= divisor) |", "selecting", "share"),
    Mutant("_selecting.py", "near & 1 == 1", "near & 1 == 0", "selecting", "share"),
    Mutant(
        "_pruning.py",
        "return structure.expand(units, target)",
        "return jax.tree.map(lambda w: jnp.ones((), bool), target)",
        "pruning",
        "once_and_holds",
    ),
    Mutant("_pruning.py", "held=None if carry else old", "held=None", "pruning", "nest"),
    Mutant(
        "_pruning.py",
        "jax.tree.map(jnp.logical_and, units, trees.place(before.mask, owners))",
        "units",
        "pruning_cycles",
        "rigl",
    ),
    Mutant("_pruning.py", "jnp.minimum(kept - grown, alive)", "kept - grown", "pruning_cycles", "falling"),
    Mutant("_masks.py", "max(n - structure.min_keep, 0)", "max(n, 0)", "pruning", "min_keep"),
    Mutant("_masks.py", "[selecting.protect(x, ~c)", "[selecting.protect(x, c)", "pruning", "select"),
    Mutant("_masks.py", "[selecting.protect(x, ~f)", "[selecting.protect(x, f & False)", "pruning", "non_finite"),
    Mutant("_masks.py", '"leaf" if varies(sparsity) else scope', '"global"', "pruning", "scope_leaf"),
    Mutant("_masks.py", "dense = density >= 1", "dense = density >= 2", "masks", "erk"),
    Mutant("_masks.py", "xp.where(dense, n, 0).sum()", "0", "masks", "erk"),
    Mutant("_projecting.py", "jnp.where(gone, jnp.zeros_like(moment), moment)", "moment", "pruning_cycles", "moments"),
    Mutant(
        "structures.py", "(other == groups) & (j < place)", "(other == groups) & (j > place)", "structures", "n_of_m"
    ),
    Mutant("structures.py", "masks[m.index] & spread", "spread", "groups", "reference"),
    Mutant("structures.py", "jnp.int32, shape, 1) % n ==", "jnp.int32, shape, 1) // n ==", "groups", "sharded"),
    Mutant("_groups.py", "votes[members[0].index] is not None", "votes is not None", "groups", "bad_groups"),
    Mutant("_pruning.py", "where if structure.holds is None else structure.holds", "where", "groups", "reference"),
    Mutant("structures.py", "rank < n,", "rank <= n,", "structures", "n_of_m"),
    Mutant(
        "structures.py",
        "totals(scores) / totals(jnp.ones_like(scores))",
        "totals(scores) / (height * width)",
        "structures",
        "block",
    ),
    Mutant("scores.py", "-weight * grad", "weight * grad", "scores", "movement"),
    Mutant("scores.py", "jnp.square(w) * f.astype", "w * f.astype", "scores", "fisher"),
    Mutant("scores.py", "sizes = jax.tree.map(jnp.abs, params)", "sizes = params", "scores", "synflow"),
    Mutant("scores.py", "decay * average + (1 - decay)", "0 * average + (1 - decay)", "scores", "averages_over"),
    Mutant("scores.py", "jnp.abs(weight * grad)", "jnp.abs(weight + grad)", "scores documents pruning", "taylor"),
    Mutant(
        "structures.py",
        "range(scores.ndim) if i != axis % scores.ndim",
        "range(scores.ndim) if i == axis",
        "pruning",
        "unit",
    ),
    Mutant(
        "_grids.py", "RoundingMethod.TO_NEAREST_EVEN", "RoundingMethod.AWAY_FROM_ZERO", "grids", "rounding or near_ties"
    ),
    Mutant(
        "_grids.py",
        "jnp.where(x < 0, jnp.ones_like(x) * -1",
        "jnp.where(x <= 0, jnp.ones_like(x) * -1",
        "grids",
        "codes",
    ),
    Mutant("_grids.py", "2 ** (int(bits) - 1) - 1)", "2 ** (int(bits) - 1))", "grids", "codes"),
    Mutant("_grids.py", "drop = jnp.asarray(1 + bits,", "drop = jnp.asarray(0 * bits,", "grids", "short"),
    Mutant("_grids.py", "step * parts > whole", "step * parts > 2 * whole", "grids", "share"),
    Mutant("_grids.py", "(k + 1) * step <= limit, k + 1, k", "(k + 1) * step <= limit, k, k", "grids", "off"),
    Mutant(
        "_grids.py",
        "jnp.maximum(jnp.floor(surplus / 2), surplus - high), low)",
        "surplus, surplus)",
        "plans quantizing_tables",
        "interval or tensorflow",
    ),
    Mutant("_plans.py", "for side in (-seen.values, seen.values)", "for side in seen.reach", "plans", "shrink"),
    Mutant("_grids.py", "k * step > limit, k - 1, k)", "k * step > limit, k - 1, k - 1)", "grids", "multiples"),
    Mutant("_grids.py", "near < exact if up", "near > exact if up", "grids", "inwards"),
    Mutant("_fitting.py", "counted = size > 0", "counted = size >= 0", "steps", "one_bit"),
    Mutant("_fitting.py", "(size > 0).astype(x.dtype)", "(size >= 0).astype(x.dtype)", "steps", "sigma"),
    Mutant("_fitting.py", "(keys > 0) & (keys <= middle)", "keys <= middle", "steps", "percentile"),
    Mutant("_fitting.py", "math.sqrt(0.5)", "0.5", "steps", "power_of_two"),
    Mutant("steps.py", "near > limit, near / 2, near", "near > limit, near, near", "steps", "power_of_two"),
    Mutant("steps.py", "0.7 * fitting.mean_size", "0.0 * fitting.mean_size", "steps", "twn"),
    Mutant(
        "steps.py",
        "grids.share(fitting.over(jnp.max, jnp.abs(x), axes), grids.top(bits)",
        "grids.share(fitting.over(jnp.max, x, axes), grids.top(bits)",
        "steps",
        "absmax",
    ),
    Mutant("_plans.py", "jnp.maximum(grid.reach, largest))", "largest)", "contract_chain", "reach"),
    Mutant("_plans.py", "(landed != 0) & jnp.isfinite(x)", "jnp.isfinite(x)", "contract_chain", "step_ignores"),
    Mutant("_plans.py", "(w == 0) & (jnp.asarray(one) == 1)", "w == 1e9", "quantizing", "one_bit"),
    Mutant("_plans.py", "for side in (-shown, shown)", "for side in (shown, shown)", "plans", "affine"),
    Mutant("_plans.py", "jnp.minimum(ends[0], top + zero)", "jnp.minimum(ends[0], top)", "plans", "spends_its_levels"),
    Mutant("_plans.py", "two, low, below", "two, below, below", "roundings", "parq_matches"),
    Mutant("widths.py", "energy[:, None] >= ratio * noise", "energy[:, None] <= ratio * noise", "plans", "sqnr"),
    Mutant("widths.py", "(cost <= left)", "(cost <= left + 99)", "plans", "budget"),
    Mutant("widths.py", "jnp.where(x == 0, x, code * step)", "code * step", "plans", "pruned_weights"),
    Mutant("_distributions.py", "np.isfinite(w) & (w != 0)", "np.isfinite(w)", "summarizing", "survivors"),
    Mutant("_distributions.py", "np.mean(w**4) / power**2", "np.mean(w**4) / power**2 - 3", "summarizing", "kurtosis"),
    Mutant("_distributions.py", "np.ldexp(w, -exponent)", "np.ldexp(w, 0)", "summarizing", "any_scale"),
    Mutant("_distributions.py", "10 * np.log10(", "20 * np.log10(", "summarizing", "sqnr"),
    Mutant("_summarizing.py", "np.where(mask, w, np.zeros_like(w))", "w", "summarizing", "pruned_weights"),
    Mutant("_summarizing.py", "leaf if float_weights is None else float_weights", "leaf", "summarizing", "quantized"),
    Mutant("_masks.py", "total <= selecting.MOST", "True", "masks", "counted"),
    Mutant("_masks.py", "arguments.require(size <= selecting.MOST", "arguments.require(True", "masks", "counted"),
    Mutant("_shrinking.py", "if times[o.path] == 1 else", "if times[o.path] else", "groups", "collide"),
    Mutant("roundings.py", "(sigmoid(t) - sigmoid(1.0))", "sigmoid(t)", "roundings", "parq_matches"),
    Mutant("roundings.py", "(1 - t) * ratio + t * code", "ratio", "roundings", "relax"),
    Mutant("_forwarding.py", "limited - grids.ratio(fixed, s)", "limited", "forwarding", "lsq"),
    Mutant("_forwarding.py", 'outside & (gradient != "straight_through")', "outside", "forwarding", "after_the_values"),
    Mutant("_blocks.py", "(have, want // have)", "(want // have, have)", "plans", "groups"),
    Mutant("_quantizing.py", "jnp.isnan(ratio), 0, ratio) +", "jnp.isnan(ratio), 0, ratio) + 0 *", "plans", "affine"),
    Mutant("_projecting.py", "> near * jnp.abs(w)", "> 0 * jnp.abs(w)", "roundings", "float_weights"),
    Mutant(
        "_clamping.py",
        'w if when == "after" else p.astype',
        'w if when != "after" else p.astype',
        "documents",
        "d3_each",
    ),
    Mutant("_trees.py", "jax.jit(fn, inline=True)", "jax.jit(fn)", "trees", "traced_once"),
    Mutant("_projecting.py", "jnp.where(jnp.isfinite(t)", "jax.lax.select(jnp.isfinite(t)", "projecting", "broadcast"),
    Mutant("_clamping.py", "jnp.where(chosen, new, w)", "new", "documents", "d3_strategies"),
    Mutant(
        "_clipping.py", "grids.limit(x, -bound, bound)", "grids.limit(x, -bound, 2 * bound)", "documents", "d1_clips"
    ),
    Mutant("_following.py", "jnp.where(jnp.isnan(old), new, new)", "new", "passes", "copied"),
    Mutant("_following.py", "schedule(threshold)(count)", "schedule(threshold)(count + 1)", "clipping", "schedule"),
    Mutant("_following.py", "finite & (measure > 0)", "finite", "following", "zero"),
    Mutant(
        "_following.py",
        "jnp.where(at, new.astype(old.dtype), old)",
        "new.astype(old.dtype)",
        "following",
        "nan or zero",
    ),
    Mutant("_following.py", "jnp.where(limit > 0, limit, jnp.inf)", "limit", "following", "positive or spam"),
    Mutant("thresholds.py", "clipped - new_mean, 1 - decay", "clipped - mean, 1 - decay", "thresholds", "zscore"),
    Mutant("thresholds.py", "jnp.minimum(average, clipped)", "clipped", "thresholds", "ema_ratio"),
    Mutant("thresholds.py", "rest - lr *", "rest + lr *", "thresholds", "quantile_track"),
    Mutant("thresholds.py", "past.mean() + k * past.std()", "past.mean() + k * past.var()", "thresholds", "mean_sigma"),
    Mutant(
        "_windows.py", "(rest < norm) & (index < last)", "(rest <= norm) & (index <= last)", "thresholds", "percentile"
    ),
    Mutant("_skipping.py", "jnp.where(good, new, old)", "new", "skipping", "inner or nan"),
    Mutant("_skipping.py", "jnp.isfinite(norm) & (norm <= limit)", "(norm <= limit)", "skipping", "inf"),
    Mutant("_clipping.py", "finite & jnp.isfinite(total), total", "total == total, total", "following", "carry"),
    Mutant("_clipping.py", "total - emitted, old", "old, old", "following", "carry"),
    Mutant("_clipping.py", "limit / (norm + eps)", "limit / (norm - eps)", "clipping", "clip_norm_matches"),
    Mutant(
        "_clipping.py",
        "jnp.isfinite(norm), factor, jnp.full_like",
        "norm == norm, factor, jnp.full_like",
        "clipping",
        "non_finite",
    ),
    Mutant("_norms.py", "jnp.sqrt(shrunk) * grow", "jnp.sqrt(plain)", "norms", "accelerators"),
    Mutant("_norms.py", "jnp.sqrt(grown) * shrink", "jnp.sqrt(plain)", "norms", "accelerators"),
    Mutant("_norms.py", "jnp.where(large, scaled * grow", "jnp.where(large, scaled", "norms", "numpys or mixed"),
    Mutant("_norms.py", "jnp.where(small, scaled * shrink", "jnp.where(small, scaled", "norms", "numpys or mixed"),
    Mutant("_norms.py", "(plain >= floor) & ~jnp.isinf(plain)", "plain >= 0", "norms", "numpys or mixed"),
    Mutant("_norms.py", "jax.lax.psum(part(x), at) if at", "part(x) if at", "clipping_sharded", "shard_map"),
    Mutant("_norms.py", "jax.lax.pmax(top, at) if at", "top if at", "clipping_sharded", "shard_map"),
    Mutant("_multiples.py", " + np.float32(0)  # no -0", "  # no -0", "packing", "sign_of_zero"),
    Mutant("_alphabets.py", "np.where(there, searched, book.size)", "book.size", "coding", "book_has_every"),
    Mutant("_ans.py", "reversed(list(chunks(symbols())))", "list(chunks(symbols()))", "coding", "order_0"),
    Mutant("_densities.py", "classes[order] = sorted", "classes[:] = sorted", "coding", "densities"),
    Mutant("_records.py", "if zlib.crc32(data) != self.checksum:", "if False:", "fuzz", "damage"),
    Mutant("_records.py", "if not reader.intact():", "if False:", "fuzz", "damage"),
    Mutant("_container.py", "os.fsync(file.fileno())", "pass", "files", "flushed"),
    Mutant(
        "_container.py", "os.replace(temporary, path)", "shutil.copyfile(temporary, path)", "files", "killed or flushed"
    ),
    Mutant("_layouts.py", '.replace("/", "~1")', "", "packing", "slashes"),
    Mutant("_trees.py", "and leaf.size > 0", "", "contract_numbers", "empty_scalar and (prune_once or quantize_axis)"),
    Mutant(
        "_trees.py",
        "jax.lax.reduce_precision(x, info.nexp, info.nmant)",
        "x.astype(dtype).astype(x.dtype)",
        "contract_numbers",
        "there_and_back and project_master",
    ),
    Mutant("_trees.py", "jnp.where(jnp.abs(x) < tiny, below, near)", "near", "trees", "narrowed"),
    Mutant("_trees.py", 'BOX_FIELDS = ("value", "raw_value")', "BOX_FIELDS = ()", "contract_models", "nnx_optimizer"),
    Mutant(
        "_trees.py",
        '("bias", "b", "scale", "offset")',
        '("b", "scale", "offset")',
        "contract_models",
        "train_state and scanned",
    ),
)


def copy(target):
    """The tree as it is on disk, without caches."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def pytest(root, names, expression):
    """Exit status and output of pytest in a copy of the tree."""
    files = [f"tests/test_{name}.py" for name in names if (root / f"tests/test_{name}.py").exists()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow"]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command += [*files, "-k", expression]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout[-2000:]


def control():
    """Every selection is green on the unbroken tree: the output of the files where it is not."""
    selected = {}
    for mutant in MUTANTS:
        for name in mutant.tests.split():
            selected.setdefault(name, set()).add(f"({mutant.expression})")
    with tempfile.TemporaryDirectory(prefix="control") as name:
        root = pathlib.Path(name)
        copy(root)
        for file, expressions in sorted(selected.items()):
            status, output = pytest(root, [file], " or ".join(sorted(expressions)))
            if status not in (0, 5):
                yield f"test_{file}.py is red without any mutant:\n{output}"


def verdict(mutant):
    """What the tests say: "killed", or what is wrong with the mutant, and the seconds it took."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant") as name:
        root = pathlib.Path(name)
        copy(root)
        path = root / "clipjax" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return f"FOUND {text.count(mutant.old)} TIMES", 0.0
        path.write_text(text.replace(mutant.old, mutant.new))
        status, output = pytest(root, mutant.tests.split(), mutant.expression)
    results = {0: "SURVIVED", 1: "killed", 5: "NO TEST SELECTED"}
    return results.get(status, f"ERROR {output[-300:]}"), time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="run the mutants whose file or text contains this")
    parser.add_argument("--no-control", action="store_true", help="do not run the selections on the unbroken tree")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.file + m.old]
    alive = 0
    for complaint in () if options.no_control else control():
        alive += 1
        print(complaint, flush=True)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutant, (result, seconds) in zip(chosen, pool.map(verdict, chosen), strict=True):
            alive += result != "killed"
            print(f"{result:18} {seconds:5.1f} s  {mutant.file:16} {mutant.old.strip()[:72]}", flush=True)
    print(f"{len(chosen)} mutants, {alive} complaints.")
    return alive > 0


if __name__ == "__main__":
    sys.exit(main())
