"""Define verifiers that worker processes can import, and that misbehave."""

from __future__ import annotations

import os
import time


def right(texts, rows):
    return [text == row["answer"] for text, row in zip(texts, rows, strict=True)]


def bad(texts, rows):
    (text,) = texts
    if text == "hang":
        time.sleep(600)
    if text == "die":
        os._exit(3)
    if text == "leak":
        return [len(bytearray(1 << 40)) > 0]
    if text == "raise":
        raise ArithmeticError("no such number")
    return [text == rows[0]["answer"]]


def equals(texts, rows):
    """Return the answer as mathematics, by the library of the extra ``verify``."""
    from math_verify import parse, verify

    return [verify(parse(row["answer"]), parse(text)) for text, row in zip(texts, rows, strict=True)]
