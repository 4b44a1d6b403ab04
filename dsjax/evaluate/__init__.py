"""Evaluation: validation while training, perplexity, masked words, classes.

Imports runs, inference and below; plan and train may import it.
"""
