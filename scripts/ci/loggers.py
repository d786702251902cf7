"""Test ``DMTrainer`` with the loggers of transformers as they are.

A run leaves its curves and a table of samples of each evaluation in TensorBoard's files, in W&B's offline run and in
trackio's database. Nothing is sent anywhere.
"""

from __future__ import annotations

import copy
import json
import os
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset

CHAT = [{"role": "user", "content": "He"}]


def run(out: Path) -> None:
    import dmfast
    from dmfast.training.recipe import load

    policy = load("tiny-bios")
    policy.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    base = policy.around(copy.deepcopy(policy.model).requires_grad_(False))
    target = dmfast.EBM(base, [dmfast.Moment(dmfast.Contains(any_of=["she", "her"], name="women"), 0.5)])
    target.lambda_ = [2.6]
    args = dmfast.DMConfig(
        str(out), max_steps=2, per_device_train_batch_size=8, samples_per_context=4, max_new_tokens=16, use_cpu=True,
        report_to=["tensorboard", "wandb", "trackio"], eval_strategy="steps", eval_steps=1, eval_samples=16,
        log_samples=3, save_strategy="no", disable_tqdm=True, run_name="loggers", project="dmfast",
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": CHAT}, {"prompt": CHAT}])
    dmfast.DMTrainer(policy.model, target, args, train_dataset=rows, processing_class=policy.tokenizer).train()


def check(found: list[dict[str, object]], where: str) -> None:
    """Check the rows of a table."""
    assert len(found) == 3, (where, found)
    for row in found:
        assert json.loads(str(row["prompt"])) == CHAT and row["phi/women"] in (0.0, 1.0), (where, row)
        assert isinstance(row["text"], str) and float(str(row["log_prob"])) < 0, (where, row)


def check_tensorboard(out: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = out.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    texts = events.Tensors("eval/samples/text_summary")
    assert [event.step for event in texts] == [1, 2]
    (text,) = texts[-1].tensor_proto.string_val
    assert "phi/women" in text.decode() and text.decode().count("\n") == 4
    assert len(events.Scalars("eval/phi/women")) == 2


def check_wandb(folder: Path, summary: dict[str, object]) -> None:
    files = sorted(folder.rglob("*.table.json"))
    assert len(files) == 2, files
    table = json.loads(files[-1].read_text())
    check([dict(zip(table["columns"], row, strict=True)) for row in table["data"]], "wandb")
    assert {"train/kl_policy", "train/z", "eval/phi/women"} <= set(summary), summary


def check_trackio(folder: Path) -> None:
    (path,) = folder.rglob("dmfast*.db")
    with sqlite3.connect(path) as database:
        logged = [json.loads(each) for (each,) in database.execute("select metrics from metrics order by id")]
    tables = [each["eval/samples"] for each in logged if "eval/samples" in each]
    assert len(tables) == 2 and any("eval/phi/women" in each for each in logged), logged
    check(tables[-1]["_value"], "trackio")


def main() -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true", TRACKIO_DIR=str(out / "trackio"),
                          HF_HUB_OFFLINE="1", TENSORBOARD_LOGGING_DIR=str(out / "tensorboard"))  # fmt: skip
        run(out / "run")
        import trackio
        import wandb

        summary = dict(wandb.run.summary)
        wandb.finish()
        check_tensorboard(out / "tensorboard")
        check_wandb(out, summary)
        check_trackio(out / "trackio")
        print(f"curves and tables in TensorBoard, W&B {wandb.__version__} and trackio {trackio.__version__}: "
              f"{time.perf_counter() - start:.0f} s")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
