"""Rows of tokens: packing, mixtures, masks, labels, and batches read ahead.

Imports data/corpus and data/tokenizers; curriculum may import it, but pipeline.py, which takes its draw order.
"""
