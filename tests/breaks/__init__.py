"""The one-line breaks of the core that `mutants.py` makes, a file for each room of clipjax, and one for its formats."""

from breaks import arrays, exports, families, files, formats, gradients, maths, programs, reports, weights

ROOMS = (arrays, exports, families, files, formats, gradients, maths, programs, reports, weights)
MUTANTS = tuple(mutant for room in ROOMS for mutant in room.MUTANTS)
