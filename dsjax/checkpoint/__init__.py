"""Checkpoints: the store (orbax), manifests, readers of safetensors and GGUF, tensor maps.

Takes trees of arrays; imports mesh and observe only, never models.
"""
