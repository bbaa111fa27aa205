"""Breaks of clipjax/_programs."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant("_programs/groups.py", "votes[members[0].index] is not None", "votes is not None", "groups", "bad_groups"),
    Mutant("_programs/shrinking.py", "if times[o.path] == 1 else", "if times[o.path] else", "groups", "collide"),
)
