"""Breaks of clipjax/_arrays."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant("_arrays/elementwise.py", "jax.jit(fn, inline=True)", "jax.jit(fn)", "trees", "traced_once"),
    Mutant(
        "_arrays/picked_leaves.py",
        "and leaf.size > 0",
        "",
        "contract_numbers",
        "empty_scalar and quantize_affine",
    ),
    Mutant(
        "_arrays/dtypes.py",
        "jax.lax.reduce_precision(x, info.nexp, info.nmant)",
        "x.astype(dtype).astype(x.dtype)",
        "contract_numbers",
        "there_and_back and project_master",
    ),
    Mutant("_arrays/dtypes.py", "jnp.where(jnp.abs(x) < tiny, below, near)", "near", "trees", "narrowed"),
    Mutant(
        "_arrays/trees.py", 'BOX_FIELDS = ("value", "raw_value")', "BOX_FIELDS = ()", "contract_models", "nnx_optimizer"
    ),
    Mutant(
        "_arrays/picked_leaves.py",
        '("bias", "b", "scale", "offset")',
        '("b", "scale", "offset")',
        "contract_models",
        "train_state and scanned",
    ),
    Mutant(
        "_arrays/elementwise.py",
        "return jax.lax.select(mask, x, y)",
        "return jax.lax.select(mask, y, x)",
        "trees",
        "where_is",
    ),
    Mutant("_arrays/elementwise.py", "if x.shape != y.shape or np", "if x is not y or np", "passes", "no_call"),
    Mutant(
        "_arrays/trees.py",
        "jax.tree.map(_unboxed, tree, is_leaf=_is_box)",
        "jax.tree.map(jnp.asarray, tree)",
        "contract_models",
        "nnx_optimizer",
    ),
    Mutant(
        "_arrays/arguments.py",
        "callable(value) and not is_tree(value)",
        "callable(value)",
        "contract_models",
        "targets",
    ),
    Mutant(
        "_arrays/trees.py", "for key in () if behind_leaf else outer", "for key in outer", "trees", "keeps_every_path"
    ),
    Mutant("_arrays/trees.py", "node[path if behind_leaf else last]", "node[last]", "trees", "keeps_every_path"),
    Mutant(
        "_arrays/picked_leaves.py",
        "jnp.issubdtype(dtype, jnp.complexfloating)",
        "not jnp.issubdtype(dtype, jnp.inexact)",
        "wrong_calls",
        "complex",
    ),
    Mutant("_arrays/arguments.py", "signature.bind(*parameters)", "pass", "wrong_calls", "other_arguments"),
    Mutant("_arrays/arguments.py", "    if shape:\n", "    if not shape:\n", "wrong_calls", "array_of_numbers"),
    Mutant(
        "_arrays/sharding.py",
        "return laid_as(jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape), like)",
        "return jnp.full_like(like, value)",
        "explicit_axes",
        "around_an_array",
    ),
    Mutant("_arrays/elementwise.py", "placed = max(", "placed = min(", "explicit_axes", "groups or soft"),
    Mutant("_arrays/stacks.py", "return jax.typeof(x), x.sharding", "return x.shape, x.sharding", "stacks", "alike"),
    Mutant("_arrays/stacks.py", r're.sub(r"\d+", "0", name)', '""', "stacks", "alike"),
    Mutant("_arrays/stacks.py", "x.size > LARGEST", "x.size > 2 * LARGEST", "stacks", "large"),
    Mutant("_arrays/picked_leaves.py", "or parts[-1] in EMBEDDINGS", "", "choosing", "embeddings"),
    Mutant("_arrays/picked_leaves.py", "part.startswith(", "not part.startswith(", "choosing", "embeddings"),
    Mutant(
        "_arrays/arguments.py", 'called(value, name, "a width or a format")', "pass", "quantizing_formats", "refused"
    ),
)
