"""Observers: what a program and its children read of the model's files."""
