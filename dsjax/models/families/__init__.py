"""Model families, a folder each: config.py (its dataclass, no JAX) and model.py (all else); registry.py names them.

Imports the rest of models, and checkpoint; config.py and registry.py import nothing but each other.
"""
