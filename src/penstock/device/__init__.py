"""Copies from host memory to where tensors are computed with."""
