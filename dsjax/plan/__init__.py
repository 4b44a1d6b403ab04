"""Predictions before a run: memory, traffic, FLOPs, disk, and checks of what would fail at its end.

May import evaluate, inference, runs and what is below them; train and cli may import it.
"""
