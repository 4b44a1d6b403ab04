"""1-bit Adam, 1-bit LAMB and 0/1 Adam, one file each.

Import the rest of optimizers, and collectives.
"""
