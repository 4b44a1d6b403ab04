"""Model families, a folder each: config.py (its dataclass, no JAX) and model.py (all else); registry.py names them.

May import the rest of models and what models may; every config.py and registry.py import nothing but each other.
"""
