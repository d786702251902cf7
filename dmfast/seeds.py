"""Make a seed for each purpose, so that equal seeds in two places do not draw the same sequences."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, purpose: str) -> int:
    """Return the seed that one purpose takes where the user gave ``seed``: an integer in [0, 2^56).

    Args:
        seed: the user's seed.
        purpose: what is drawn with it, such as "fit" or "step 3". Other purposes get other seeds, up to a chance of
            2^-56 per pair, and the same purpose gets the same one on every machine.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=7).digest(), "big")
