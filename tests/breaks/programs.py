"""Breaks of clipjax/_programs."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant("_programs/groups.py", "has_score[found[0].position]", "has_score != []", "groups", "bad_groups"),
    Mutant("_programs/group_units.py", "masks[leaf.position] & mask", "mask", "groups", "reference"),
    Mutant(
        "_programs/group_units.py", "jnp.int32, shape, 1) % n ==", "jnp.int32, shape, 1) // n ==", "groups", "sharded"
    ),
    Mutant(
        "_programs/shrinking.py",
        "if times_owner[owner.path] == 1 else",
        "if times_owner[owner.path] else",
        "groups",
        "collide",
    ),
    Mutant(
        "_programs/shrinking.py", "sorted({int(i) % grouping", "sorted({int(i) + grouping", "shrinking", "flattened"
    ),
)
