"""Run folders: their files, resuming, saving, and the counters of a run.

May import setup and what is below it; inference, evaluate, plan, train and cli may import it.
"""
