"""Checkpoints: the store (orbax), manifests, readers of safetensors and GGUF, tensor maps.

Takes trees of arrays. May import mesh and observe, never models; data, models and the rooms above them may import it.
"""
