"""The configs of runs, composed from the rooms' own dataclasses, and strict YAML with --set.

Imports the rooms' config.py only; cli, setup, runs, plan and train import it.
"""
