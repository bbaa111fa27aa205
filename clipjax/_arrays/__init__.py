"""Arrays and trees: arguments, paths, dtypes, sharding."""
