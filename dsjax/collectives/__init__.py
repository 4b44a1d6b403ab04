"""Compressed collectives on local shards, and the counting of collective bytes in compiled HLO.

Imports mesh, observe and pallas_kernels; optimizers, moe and models may import it.
"""
