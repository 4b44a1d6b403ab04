"""Trackers, progress, profiles, memory, plots, and reading of untrusted files.

May import no other room; every room may import it.
"""
