"""Synthetic model files: a real model's exact shapes, random weights."""
