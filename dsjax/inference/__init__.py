"""Trained models in use: opening a run, a folder or a GGUF file, generating text, embedding, converting.

Imports runs and below, not train; evaluate, plan and train may import it.
"""
