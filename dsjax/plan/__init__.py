"""Predictions before a run: memory, traffic, FLOPs, disk, and checks of what would fail at its end.

Imports setup, runs, inference and evaluate; train may import it.
"""
