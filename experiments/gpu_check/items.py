"""The table of items, most important first. README.md says how to add one."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A thing to check.

    Attributes:
        name: of the row, unique.
        target: what `ours` is held against, in a few words.
        limit: seconds after which its process is stopped.
        function: "module:function" in checks/; it takes a Context and returns an Outcome (checks/item.py).
        needs: packages without which it is skipped.
        may_be_unseen: the machine may be unable to tell: an error is then 'not seen', not 'failed'.
    """

    name: str
    target: str
    limit: float
    function: str
    needs: tuple[str, ...] = ()
    may_be_unseen: bool = False


ITEMS = (
    Item(name="versions and clocks", target="JAX sees a GPU", limit=60, function="machine:look"),
    Item(name="kernels and references", target="within rounding", limit=100, function="kernels:compare"),
    Item(name="tests/gpu", target="all pass", limit=150, function="device_tests:run"),
    Item(name="sign_pack: bandwidth", target="85% of the peak", limit=60, function="kernels:bandwidth"),
    Item(name="a step with cuDNN attention", target="fmha in its program", limit=80, function="step:cudnn"),
    Item(
        name="a step on two devices", target="data once, after all", limit=60, function="step:two_devices",
        may_be_unseen=True,
    ),
    Item(name="GPT-3 1.3B, bf16: MFU", target="55%", limit=120, function="speed:training"),
    Item(
        name="GPT-3 1.3B and torch.compile", target="1.00x its tokens/s", limit=150, function="speed:beside_torch",
        needs=("torch",),
    ),
    Item(name="GPT-3 1.3B: decoding", target="60% of the peak", limit=60, function="decoding:step"),
)  # fmt: skip
