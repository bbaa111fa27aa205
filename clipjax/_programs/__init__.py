"""What belongs together in a model: groups of units, shrinking."""
