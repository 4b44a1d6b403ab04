"""1-bit Adam, 1-bit LAMB and 0/1 Adam restated in numpy, W workers in one process: what dsjax's own are tested against.

Written from the papers (arXiv 2102.02888, 2104.06069, 2202.06009) and from what DeepSpeed 0.19.6 does, and shares no
code with dsjax. `rules.Rules` says which of two dialects is spoken: `PEER` replays DeepSpeed 0.19.6 (tests/golden),
`OURS` is what dsjax computes.
"""

from one_bit_oracle.adam import OneBitAdam
from one_bit_oracle.allreduce import AllReduce, ListAllReduce, pack, unpack
from one_bit_oracle.lamb import OneBitLamb
from one_bit_oracle.rules import OURS, PEER, Rules
from one_bit_oracle.zero_one import ZeroOneAdam

__all__ = [
    "OURS",
    "PEER",
    "AllReduce",
    "ListAllReduce",
    "OneBitAdam",
    "OneBitLamb",
    "Rules",
    "ZeroOneAdam",
    "pack",
    "unpack",
]
