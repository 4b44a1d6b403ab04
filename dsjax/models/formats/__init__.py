"""Weights of other programs: Hugging Face folders, GGUF files, PEFT adapters.

May import the rest of models, and what models may.
"""
