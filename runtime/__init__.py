"""The only part that touches a device or a model file."""
