"""Run folders: their files, resuming, saving, and the counters of a run.

Imports setup and below; plan, inference, evaluate and train may import it.
"""
