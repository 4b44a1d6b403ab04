"""1-bit Adam, 1-bit LAMB and 0/1 Adam, one file each.

May import the rest of optimizers but kinds, and collectives.
"""
