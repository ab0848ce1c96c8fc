"""Named random draws: each draw's seed is a hash of what it is for, so nothing depends on arrival order."""

import hashlib

DRAWS = 3
"""The version of what a seed gives. Whoever changes the samples of a seed, or the numbers of a step, raises it: a run
that another version began is not resumed, but for one of version 2 with a bound on each correction: since then that of
sequence_tis is 2 where none is given, and was 5."""


def derive_seed(*names: str | int) -> int:
    """Seed in [0, 2**63) for the draw called by ``names``.

    >>> derive_seed(0, "sample", "prompt-17", 3) == derive_seed(0, "sample", "prompt-17", 3)
    True
    """
    digest = hashlib.blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
