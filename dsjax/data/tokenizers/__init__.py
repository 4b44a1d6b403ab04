"""Tokenizers of every file format, and chat templates.

May import corpus/store.py, corpus/progress.py, checkpoint and observe; corpus, rows and curriculum may import it.
"""
