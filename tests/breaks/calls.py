"""Breaks of what `test_as_users_call.py` guards, in all rooms."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant("_weights/quantized_params.py", "largest < 2**31", "True", "as_users_call", "i32"),
    Mutant(
        "_weights/holding_once.py", 'if "hyperparams_states" in names and', "if False and", "as_users_call", "injected"
    ),
    Mutant("_weights/pruning.py", "if last is not None", "if False", "as_users_call", "another_end or no_fractions"),
    Mutant(
        "_weights/pruning.py", "if state.asked.shape == asked.shape else", "if True else", "as_users_call", "for_each"
    ),
    Mutant("_weights/refreshing.py", "return int(count) if", "return count if", "as_users_call", "array_that_is_known"),
    Mutant("_weights/checking.py", "if arguments.hashable(tx) else", "if False else", "as_users_call", "compile_once"),
    Mutant(
        "_weights/holding_once.py", "not extra and arguments.hashable(tx)", "False", "as_users_call", "compile_once"
    ),
    Mutant(
        "projections.py",
        "r if (own := picked_leaves.for_leaf(radius, path, x)) is None else own",
        "r",
        "as_users_call",
        "radius",
    ),
    Mutant("_gradients/threshold_state.py", "not left or masked", "True", "as_users_call", "not_there"),
    Mutant(
        "_files/saving.py",
        "if not isinstance(target, jax.sharding.Sharding | jax.Device)",
        "if False",
        "as_users_call",
        "sharding",
    ),
    Mutant("_weights/quantized_params.py", "require(not lost,", "require(True,", "as_users_call", "not_finite"),
    Mutant(
        "_weights/checking.py",
        "        _leaf(leaves, path)\n    if not",
        "        pass\n    if not",
        "as_users_call",
        "other_leaves",
    ),
    Mutant("_arrays/arguments.py", "len(own) <= len(shape) and", "True and", "as_users_call", "larger"),
    Mutant("_arrays/arguments.py", "n in (1, m) or (n and m % n == 0)", "True", "as_users_call", "larger"),
    Mutant(
        "_maths/integers.py",
        "elementwise.where(jnp.isnan(x)",
        "jnp.where(jnp.isnan(x)",
        "explicit_axes",
        "around_an_array",
    ),
)
