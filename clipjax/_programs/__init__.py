"""Groups of units that live and die together in a model, and shrinking."""
