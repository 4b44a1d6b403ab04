"""Evaluation: validation while training, perplexity, masked words, classes.

May import inference, runs and what is below them; plan, train and cli may import it.
"""
