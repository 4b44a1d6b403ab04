"""Model families, one file each: architecture, tensor names and config.json of Hugging Face.

Imports the rest of models, and checkpoint.
"""
