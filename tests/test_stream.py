"""Test data sets without a length as train_dataset.

The steps read them row after row, and a resumed run reads on. Prompts that are too long are left out, with or without a
length.
"""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from trainer_job import PROMPTS, StopAt, digest, gpt2, job, tokenizer
from trainer_tools import (
    one_thread,  # noqa: F401
    run,
    said,
)

from dmfast import LanguageModel, Scorer
from dmfast.training.data import Contexts
from dmfast.training.stream import Stream, StreamLoader, is_stream

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")

ROWS = {"prompt": PROMPTS, "answer": ["w3", "w4", "w0", "w1", "w2", "w6", "w7"]}


def streamed(shuffle=None):
    rows = datasets.Dataset.from_dict(ROWS).to_iterable_dataset()
    return rows if shuffle is None else rows.shuffle(seed=shuffle, buffer_size=4)


class OfTorch(torch.utils.data.IterableDataset):
    """Be a stream of nothing but prompts, in another order at each iteration if asked for."""

    def __init__(self, prompts=PROMPTS, again=0):
        self.prompts, self.again, self.times = prompts, again, 0

    def __iter__(self):
        self.times += self.again
        return iter([*self.prompts[self.times :], *self.prompts[: self.times]])


def read(loader, batches):
    """Return the first microbatches."""
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) == batches:
            return found
    raise AssertionError("the stream has ended")


def test_what_is_a_stream():
    assert is_stream(streamed()) and is_stream(OfTorch())
    assert not any(is_stream(rows) for rows in (None, PROMPTS, "w1", datasets.Dataset.from_dict(ROWS), {"a": ["w1"]}))


@pytest.mark.parametrize("rows", [streamed(), OfTorch()])
def test_steps_read_row_after_row_and_pass_after_pass(rows):
    """Each context comes n times in succession and has the identity of its row in each pass.

    Each microbatch comes as often as it is repeated, and those of the ranks together are those of one process.
    """
    alone = read(StreamLoader(Stream(rows), 2, per_device=4, accumulation=2), 6)
    assert [[prompt for _, prompt, _ in batch] for batch in alone[:2]] == [
        [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, [PROMPTS[2]] * 2 + [PROMPTS[3]] * 2
    ]  # fmt: skip
    contexts = [context for batch in alone for context in batch][::2]
    assert [prompt for _, prompt, _ in contexts] == (PROMPTS * 2)[:12]
    assert [identity for identity, _, _ in contexts[7:]] == [identity for identity, _, _ in contexts[:5]]
    assert len({identity for identity, _, _ in contexts}) == 7
    repeated = read(StreamLoader(Stream(rows), 2, per_device=4, accumulation=2, repeats=2), 6)
    assert repeated == [*alone[:2], *alone[:2], *alone[2:4]]
    ranks = [read(StreamLoader(Stream(rows), 2, per_device=4, accumulation=1, rank=r, world=2), 3) for r in (0, 1)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == alone


def test_a_row_that_comes_twice_in_a_step_is_two_contexts():
    steps = Stream(OfTorch(["w1", "w2", "w1"])).steps(6)
    step = next(steps)
    assert len({identity for identity, _, _ in step}) == 6
    assert next(steps) == step


def test_a_trainer_takes_a_stream(tmp_path):
    """Scorers see the rows, each context keeps its Z over passes, and each pass has a shuffle of its own."""

    def right(x):
        return torch.tensor([float(row["answer"] in text) for row, text in zip(x.rows, x.text, strict=True)])

    constraint = Scorer(right, on="samples", name="right")
    settings = {"constraints": [constraint], "samples_per_context": 4, "max_steps": 7}
    trainer, _, keep = run(tmp_path, prompts=streamed(shuffle=3), **settings)
    assert trainer.state.global_step == 7 and len(trainer.partitions) == 7
    shown = [row for step in keep.steps for row in step.samples.rows[::4]]
    assert sorted(row["answer"] for row in shown[:7]) == sorted(ROWS["answer"])
    assert sorted(row["answer"] for row in shown[7:]) == sorted(ROWS["answer"])
    assert shown[:7] != shown[7:]
    for row in shown:
        assert row["prompt"] == PROMPTS[ROWS["answer"].index(row["answer"])]
    for step in keep.steps:
        assert len(set(step.samples.context_id.tolist())) == 2


def test_a_resumed_run_reads_on(tmp_path):
    """A run resumes to the bit within the first pass, of 3.5 steps, and beyond it."""
    settings = {"samples_per_context": 4, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole = job(tmp_path, prompts=streamed(shuffle=3), **settings)
    whole.train()
    for step in (4, 2):
        resumed = job(tmp_path, prompts=streamed(shuffle=3), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == 5 and digest(resumed.model) == digest(whole.model)


def test_a_stream_that_is_another_is_not_resumed(tmp_path):
    settings = {"samples_per_context": 4, "max_steps": 3}
    job(tmp_path, prompts=streamed(shuffle=3), callbacks=[StopAt(2)], **settings).train()
    other = job(tmp_path, prompts=streamed(shuffle=4), **settings)
    with (
        pytest.warns(UserWarning, match="run on other prompts"),
        pytest.raises(ValueError, match=r"gives other rows than it gave .* among its first \d+,"),
    ):
        other.train(resume_from_checkpoint=True)
    anew = job(tmp_path, prompts=streamed(shuffle=4), ignore_data_skip=True, **settings)
    with pytest.warns(UserWarning, match="run on other prompts"):
        anew.train(resume_from_checkpoint=True)
    assert anew.state.global_step == 3


@pytest.mark.parametrize(
    "change", [{"per_device_train_batch_size": 4}, {"samples_per_context": 2}, {"max_prompt_length": 3}]
)
def test_the_same_rows_in_steps_of_another_size_are_not_taken_for_others(tmp_path, change):
    settings = {"samples_per_context": 4, "max_steps": 4}
    job(tmp_path, prompts=streamed(shuffle=3), callbacks=[StopAt(2)], **settings).train()
    other = job(tmp_path, prompts=streamed(shuffle=3), **(settings | change))
    with pytest.warns(UserWarning, match=f"{next(iter(change))} was .* holds from here on"):
        other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 4


@pytest.mark.parametrize(
    ("rows", "settings", "error", "message"),
    [
        (iter(PROMPTS), {}, TypeError, r"can be iterated over only once \(list_iterator\)"),
        (OfTorch([]), {}, ValueError, "train_dataset is empty"),
        (OfTorch([{"text": "w1"}]), {}, ValueError, "row 0 of train_dataset has no column 'prompt', only text"),
        (OfTorch([3]), {}, ValueError, "row 0 of train_dataset has a prompt of type int"),
        (OfTorch([{"prompt": "w1", "image": "x"}]), {}, ValueError, "column 'image', which no model would see"),
        (OfTorch(), {"max_steps": -1}, ValueError, "no epochs to count: set max_steps"),
        (OfTorch(), {"eval_strategy": "steps", "eval_steps": 1}, ValueError, "stream, which an evaluation does not"),
        (OfTorch(), {"samples_per_context": 3}, ValueError, r"samples_per_context = 3 must divide"),
        (OfTorch(), {"sampler": "http://x", "sampler_ahead": 1}, ValueError, "sampler_ahead=1 draws"),
        (OfTorch(["w1 " * 20]), {}, ValueError, "train_dataset, row 0: prompt 0 has 20 tokens.*beyond"),
    ],
)  # fmt: skip
def test_streams_that_can_not_be_had(tmp_path, rows, settings, error, message):
    with pytest.raises(error, match=message):
        job(tmp_path, prompts=rows, **settings)


def test_a_prompt_that_does_not_fit_is_refused_as_it_is_read(tmp_path):
    """The fault lies beyond the rows that are checked before training starts."""
    trainer = job(tmp_path, prompts=OfTorch([*PROMPTS * 3, "w1 " * 20]))
    with pytest.raises(ValueError, match=r"train_dataset, row 21: prompt 0 has 20 tokens.*beyond"):
        trainer.train()


def test_a_stream_is_not_evaluated_on(tmp_path):
    with pytest.raises(ValueError, match="give DMTrainer an eval_dataset"):
        job(tmp_path, prompts=OfTorch()).evaluate()
    assert "eval_phi/w3" in job(tmp_path, prompts=OfTorch(), eval_dataset=PROMPTS[:2]).evaluate()


# --- prompts that are too long

LONG = ["w1", "w1 " * 20, "w2 w3 w4", "w3"]


def test_prompts_that_are_too_long_are_left_out_with_their_count(tmp_path):
    """A row keeps its number, its columns and its Z."""
    rows = [{"prompt": prompt, "answer": f"w{i}"} for i, prompt in enumerate(LONG)]
    with pytest.warns(UserWarning, match=r"train_dataset: 2 of 4 prompts have more than max_prompt_length=2 .* has 20"):
        trainer = job(tmp_path, prompts=rows, samples_per_context=4, max_prompt_length=2, max_steps=1, eval_samples=4)
    trainer.train()
    assert len(trainer.partitions) == 2 and all(math.isfinite(trainer.partitions[row].log_z) for row in (0, 3))
    trainer.evaluate()
    assert [row["answer"] for row in trainer.eval_samples.rows] == ["w0", "w0", "w3", "w3"]
    fresh = trainer._check_contexts(0)
    assert sorted(fresh.context_id.tolist()) == [0, 3][: len(fresh)]
    assert all(row["answer"] == f"w{i}" for i, row in zip(fresh.context_id.tolist(), fresh.rows, strict=True))
    with pytest.warns(UserWarning, match="eval_dataset: 1 of 2 prompts"):
        trainer.evaluate(["w5", "w1 w2 w3"])
    assert set(trainer.eval_samples.context_id.tolist()) == {0}


def test_what_is_left_trains_as_it_would_alone(tmp_path):
    settings = {"samples_per_context": 4, "max_steps": 3}
    with pytest.warns(UserWarning, match="1 of 4 prompts"):
        filtered = job(tmp_path / "a", prompts=[LONG[0], *LONG[2:], LONG[1]], max_prompt_length=4, **settings)
    alone = job(tmp_path / "b", prompts=[LONG[0], *LONG[2:]], **settings)
    filtered.train()
    alone.train()
    assert digest(filtered.model) == digest(alone.model)


def test_a_stream_leaves_them_out_too(tmp_path, recwarn):
    trainer, _, keep = run(tmp_path, prompts=OfTorch(LONG), samples_per_context=4, max_prompt_length=2, max_steps=3)
    assert said(recwarn, "row 1 has a prompt of 20 tokens, more than max_prompt_length=2") == 1
    for step in keep.steps:
        assert step.samples.prompt_len == 1
    assert [h["n_too_long"] for h in trainer.state.log_history if "kl_policy" in h] == [2, 2, 2]


def test_nothing_is_left(tmp_path):
    with pytest.raises(
        ValueError, match=r"no prompt of at most max_prompt_length=2 .* its 2 prompts have from 3 to 20"
    ):
        job(tmp_path, prompts=LONG[1:3], max_prompt_length=2)
    with pytest.warns(UserWarning, match="row 0 has a prompt of 20 tokens"):
        trainer = job(tmp_path, prompts=OfTorch(LONG[1:3]), max_prompt_length=2)
    with pytest.raises(ValueError, match="gave no prompt of at most max_prompt_length=2 tokens in a pass"):
        trainer.train()
    with pytest.raises(ValueError, match="max_prompt_length must be positive, got 0"):
        job(tmp_path, max_prompt_length=0)


def test_a_prompt_beyond_the_context_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"prompt 1 has 20 tokens.*; DMConfig.max_prompt_length leaves out"):
        Contexts(LONG).check(LanguageModel(gpt2(), tokenizer()), 6)
