"""Write samples of an evaluation as a table to ``samples.jsonl``, TensorBoard, Weights & Biases and trackio."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .evaluation import Evaluation
from .report import for_json

NAME = "samples.jsonl"


def rows(
    evaluation: Evaluation, prompts: Sequence[Any] | None, n: int, *, step: int, name: str
) -> list[dict[str, Any]]:
    """Return at most n sequences of an evaluation as rows, as ``Samples.across_contexts`` chooses them.

    Args:
        prompts: the prompts by ``context_id``. None is the empty context, and then the rows have no ``prompt``.
        step: the optimiser steps so far.
        name: the name of the evaluation, its ``metric_key_prefix``.

    Returns:
        ``step``, ``evaluation``, ``prompt``, ``text``, ``length`` (scored tokens), ``log_prob`` and ``log_base``
        (log pi(x) and log a(x), nats), ``features`` by name.
    """
    x = evaluation.samples
    order = x.across_contexts(n)
    shown = x[order]
    columns = {"length": shown.score_mask.sum(1), "log_prob": shown.log_prob, "log_base": evaluation.log_base[order]}
    values = [column.tolist() for column in columns.values()]
    found = []
    for i, text in enumerate(shown.text):
        row: dict[str, Any] = {"step": step, "evaluation": name}
        if prompts is not None:
            row["prompt"] = prompts[int(shown.context_id[i])]
        row |= {"text": text} | {name: value[i] for name, value in zip(columns, values, strict=True)}
        features = evaluation.features[int(order[i])].tolist()
        found.append(row | {"features": dict(zip(evaluation.names, features, strict=True))})
    return found


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``samples.jsonl``, and no rows if there is no such file.

    Raises:
        ValueError: a line is not a row of samples; the message has the number of the line.
    """
    path = folder / NAME
    # splitlines() would also end a line at U+2028 and other characters that JSON does not escape
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not (isinstance(row["text"], str) and isinstance(row["step"], int) and row["evaluation"]):
                raise ValueError("it needs evaluation, text (a string) and step (an integer)")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}, is not a row of samples: {error}") from error
        found.append(row)
    return found


def write(folder: Path, new: Sequence[dict[str, Any]], step: int) -> None:
    """Add the rows of an evaluation to the run's file.

    They replace the rows that this evaluation had before, and the rows of all later steps. Rows of later steps come
    from another run in this folder, or from steps after the checkpoint that this run resumed from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    again = {row["evaluation"] for row in new}
    kept = [r for r in read(folder) if r["step"] < step or (r["step"] == step and r["evaluation"] not in again)]
    beside = folder / f".{NAME}"
    lines = [json.dumps(for_json(row), ensure_ascii=False) + "\n" for row in (*kept, *new)]
    beside.write_text("".join(lines), encoding="utf-8")
    os.replace(beside, folder / NAME)


def publish(
    evaluation: Evaluation, prompts: Sequence[Any] | None, n: int, folder: Path, callbacks: Sequence[TrainerCallback],
    *, step: int, name: str,
) -> None:  # fmt: skip
    """Write at most n sequences of an evaluation into the folder, and send them to the loggers that take tables."""
    new = rows(evaluation, prompts, n, step=step, name=name)
    write(folder, new, step)
    send(callbacks, new, step, f"{name}/samples")


def forget(folder: Path) -> None:
    """Remove the rows that an earlier run has left, except those of step 0."""
    if (folder / NAME).exists():
        write(folder, [], 0)


def send(callbacks: Sequence[TrainerCallback], new: Sequence[dict[str, Any]], step: int, title: str) -> None:
    """Send rows to those of TensorBoard (as text), W&B and trackio whose callbacks are among these."""
    if not new:
        return
    flat = [_cells(row) for row in new]
    names = [name for name in flat[0] if name not in ("features", "step", "evaluation")]
    data = [[row[name] for name in names] for row in flat]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(title, _markdown(names, flat), step)
            callback.tb_writer.flush()
        if isinstance(callback, WandbCallback) and callback._wandb is not None and callback._wandb.run is not None:
            table = callback._wandb.Table(columns=names, data=data)
            callback._wandb.log({title: table, "train/global_step": step})
        if isinstance(callback, TrackioCallback) and callback._initialized:
            table = callback._trackio.Table(columns=names, data=for_json(data))
            callback._trackio.log({title: table, "train/global_step": step})


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as strings and numbers: a chat becomes JSON, and each feature a column of its own."""
    prompt = row.get("prompt", "")
    own = row if isinstance(prompt, str) else row | {"prompt": json.dumps(prompt, ensure_ascii=False)}
    return own | {f"phi/{name}": value for name, value in row["features"].items()}


def _markdown(names: Sequence[str], table: Sequence[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", "<br>")

    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
