"""Call functions of transformers' Trainer that have other names in older releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import trainer_utils


def remove_old_checkpoints(trainer: Any, folder: Path) -> None:
    """Delete the checkpoints of a run beyond ``save_total_limit``, but neither the newest nor the best.

    Args:
        trainer: the trainer of the run.
        folder: the folder that holds the checkpoints.
    """
    if not hasattr(trainer_utils, "rotate_checkpoints"):  # until transformers 5.1 it is a method of the trainer
        trainer._rotate_checkpoints(use_mtime=True, output_dir=str(folder))
        return
    trainer_utils.rotate_checkpoints(
        output_dir=str(folder), save_total_limit=trainer.args.save_total_limit,
        best_model_checkpoint=trainer.state.best_model_checkpoint, use_mtime=True,
    )  # fmt: skip


def draws_in_random_order(args: Any) -> bool:
    """Return whether the rows of a data set come in random order."""
    # until transformers 5.1 there is no such argument, and the order is always random
    return bool(getattr(args, "train_sampling_strategy", "random") == "random")
