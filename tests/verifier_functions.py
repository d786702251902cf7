"""Define verifiers that worker processes can import, and that misbehave."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path


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


_kept = []


def leaks(texts, rows):
    """Say that all is right, and keep 64 MB of each call; "start" needs a process, and "hang" waits for one."""
    _kept.append(bytearray(64 << 20))
    if texts[0] in ("start", "hang"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600 * (texts[0] == "hang"),))
        child.start()
        Path(rows[0]["answer"]).write_text(str(child.pid))
        child.join()
    return [True]


def equals(texts, rows):
    """Return the answer as mathematics, by the library of the extra ``verify``."""
    from math_verify import parse, verify

    return [verify(parse(row["answer"]), parse(text)) for text, row in zip(texts, rows, strict=True)]
