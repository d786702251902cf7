"""What transformers' Trainer calls by other names in releases before the newest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import trainer_utils


def remove_old_checkpoints(trainer: Any, folder: Path) -> None:
    """Delete the checkpoints of a run beyond ``save_total_limit``, but neither the newest nor the best.

    Args:
        trainer: whose run it is.
        folder: what holds the checkpoints.
    """
    if not hasattr(trainer_utils, "rotate_checkpoints"):  # until transformers 5.1 it was the trainer's
        trainer._rotate_checkpoints(use_mtime=True, output_dir=str(folder))
        return
    trainer_utils.rotate_checkpoints(
        output_dir=str(folder), save_total_limit=trainer.args.save_total_limit,
        best_model_checkpoint=trainer.state.best_model_checkpoint, use_mtime=True,
    )  # fmt: skip


def draws_in_random_order(args: Any) -> bool:
    """Return whether the rows of a data set come in random order."""
    return bool(getattr(args, "train_sampling_strategy", "random") == "random")  # until transformers 5.1 they always do
