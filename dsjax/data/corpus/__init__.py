"""Token stores: text encoded once, found again by the hash of its content.

May import data/text, data/tokenizers, rows/formats.py, rows/labels.py, checkpoint and observe; rows and curriculum may
import it, and tokenizers its store.py and progress.py.
"""
