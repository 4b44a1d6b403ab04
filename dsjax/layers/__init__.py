"""Layers of a transformer: attention, feed-forward, norms, embeddings, dropout, random-LTD.

Imports mesh, observe and pallas_kernels; moe and models may import it.
"""
