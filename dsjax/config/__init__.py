"""The configs of runs, composed from the rooms' own dataclasses, and strict YAML with --set.

May import the rooms' config.py; cli may import it, and the files of setup, runs, plan and train that
tests/contract/test_imports.py names.
"""
