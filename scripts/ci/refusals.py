"""Check that a call is refused, for the proofs that run as scripts in an environment of their own."""

from __future__ import annotations

from collections.abc import Callable


def refuses(message: str, call: Callable[[], object]) -> None:
    """Raise AssertionError unless the call raises a ValueError whose text contains the message."""
    said = "nothing"
    try:
        call()
    except ValueError as error:
        said = str(error)
    assert message in said, f"{said} does not say {message!r}"
