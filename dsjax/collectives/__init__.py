"""Compressed collectives on local shards, and the counting of collective bytes in compiled HLO.

May import mesh, observe and pallas_kernels; models, optimizers and the rooms above them may import it.
"""
