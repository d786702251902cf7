"""Find what asks for a way of running on several processes: an argument, or ``accelerate launch``."""

from __future__ import annotations

import os

from transformers import TrainingArguments


def asked(args: TrainingArguments, argument: str, variable: str) -> str | None:
    """Return what asks for a way of running, in words that begin a sentence, or None if nothing does.

    Args:
        args: the arguments of the run.
        argument: the name of the argument that asks for it.
        variable: the variable that ``accelerate launch`` sets in the environment.
    """
    if getattr(args, argument):
        return argument
    by_launcher = os.environ.get(variable, "false").lower() in ("true", "1")
    return f"{variable}, which accelerate launch sets," if by_launcher else None
