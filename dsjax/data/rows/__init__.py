"""Rows of tokens: packing, mixtures, masks, labels, and batches read ahead.

May import data/text, data/tokenizers and data/corpus; curriculum may import all of it but pipeline.py, which takes its
draw order.
"""
