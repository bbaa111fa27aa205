"""The one-line breaks of the core that `mutants.py` makes, a file for each room, for formats and for users' calls."""

from breaks import arrays, calls, exports, families, files, formats, gradients, maths, programs, reports, weights

ROOMS = (arrays, calls, exports, families, files, formats, gradients, maths, programs, reports, weights)
MUTANTS = tuple(mutant for room in ROOMS for mutant in room.MUTANTS)
