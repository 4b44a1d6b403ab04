"""Weights of other programs: Hugging Face folders, GGUF files, PEFT adapters.

Imports the rest of models, and checkpoint.
"""
