"""Trained models in use: opening a run, a folder or a GGUF file, generating text, embedding, converting.

May import runs and what is below it; evaluate, plan, train and cli may import it.
"""
