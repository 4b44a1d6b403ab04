"""Devices as a mesh, logical axes as PartitionSpecs, ZeRO stages, and the processes of a cluster.

Imports observe only; every room may import it.
"""
