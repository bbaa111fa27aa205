"""Reports on states and params."""
