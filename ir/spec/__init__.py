"""Model specs: models/*.yaml, read, checked, bound to a file, written as a graph."""
