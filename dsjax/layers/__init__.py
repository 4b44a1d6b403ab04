"""Layers of a transformer: attention, feed-forward, norms, embeddings, dropout, random-LTD.

May import mesh, observe and pallas_kernels; models and the rooms above it may import it.
"""
