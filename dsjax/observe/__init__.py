"""Trackers, progress, profiles, memory, plots, and reading of untrusted files.

Imports no other room; every room may import it.
"""
