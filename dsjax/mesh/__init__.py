"""Devices as a mesh, logical axes as PartitionSpecs, ZeRO stages, and the processes of a cluster.

May import observe; every room but observe may import it.
"""
