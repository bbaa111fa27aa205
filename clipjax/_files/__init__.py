"""The small file, from trees to bytes."""
