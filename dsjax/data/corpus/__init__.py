"""Token stores: text encoded once, found again by the hash of its content.

Imports data/text, data/tokenizers, rows/labels.py and checkpoint; rows and curriculum may import it.
"""
