"""A file for each optimizer: its settings, and the optimizer made of them. registry.py names them.

Nothing here imports JAX before an optimizer is created.
"""
