"""Tokenizers of every file format, and chat templates.

Imports corpus/progress.py, checkpoint and observe; corpus, rows and curriculum may import it.
"""
