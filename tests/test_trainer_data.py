"""Test which contexts a step takes: prompts, or rows of a data set, each once an epoch, shared by the ranks."""

from __future__ import annotations

import re

import datasets
import numpy as np
import pytest
import torch
from trainer_job import PROMPTS, WORDS, gpt2, job, tokenizer
from trainer_tools import (
    one_thread,  # noqa: F401
    run,
)

import dmfast
from dmfast import EBM, Contains, LanguageModel, Moment, Scorer
from dmfast.training.data import Contexts, StepSampler, holds_media
from dmfast.training.stream import Stream

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("contexts", "n", "per_device", "accumulation"), [(7, 1, 2, 2), (12, 2, 4, 3), (5, 6, 4, 3)])
def test_each_context_once_an_epoch(contexts, n, per_device, accumulation, shuffle):
    sampler = StepSampler(contexts, n, per_device=per_device, accumulation=accumulation, shuffle=shuffle)
    batches = list(sampler)
    assert len(batches) == len(sampler) and max(map(len, batches)) <= per_device
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == sorted([row for row in range(contexts) for _ in range(n)])
    assert rows == [row for row in rows[::n] for _ in range(n)]  # the sequences of a context lie together
    sampler.set_epoch(1)
    assert (list(sampler) != batches) == shuffle
    sampler.set_epoch(0)
    assert list(sampler) == batches


@pytest.mark.parametrize("contexts", [8, 9, 10, 11, 16])
def test_ranks_share_the_contexts_of_a_step(contexts):
    ranks = [
        StepSampler(contexts, 2, per_device=2, accumulation=2, rank=rank, world=2, shuffle=False) for rank in (0, 1)
    ]
    batches = [list(sampler) for sampler in ranks]
    assert len(batches[0]) == len(batches[1]) == len(ranks[0])
    assert list(map(len, batches[0])) == list(map(len, batches[1]))
    rows = {row for rank in batches for batch in rank for row in batch}
    assert rows == set(range(contexts))
    assert set(batches[0][0] + batches[0][1]) == {0, 1} and set(batches[1][0] + batches[1][1]) == {2, 3}


def test_a_context_that_is_split_is_refused():
    with pytest.raises(ValueError, match=r"samples_per_context = 3 must divide .* 4 \* 2 = 8: take 2 or 4$"):
        StepSampler(5, 3, per_device=4, accumulation=2)


@pytest.mark.parametrize(
    ("contexts", "n", "per_device", "accumulation", "world", "fit"),
    [
        (7, 1, 8, 1, 1, {"samples_per_context": 2, "gradient_accumulation_steps": 7}),
        (7, 2, 4, 2, 3, {"samples_per_context": 4, "gradient_accumulation_steps": 4, "num_processes": 1}),
        (3, 2, 8, 1, 4, {"num_processes": 3, "samples_per_context": 8}),
    ],
)
def test_a_step_that_takes_more_contexts_than_there_are_names_the_numbers_that_fit(
    contexts, n, per_device, accumulation, world, fit
):
    with pytest.raises(ValueError, match=r"contexts of . sequences, and the data set has") as told:
        StepSampler(contexts, n, per_device=per_device, accumulation=accumulation, world=world)
    named = re.findall(r"(samples_per_context|gradient_accumulation_steps|num_processes)[ =]+(\d+)", str(told.value))
    assert {name: int(number) for name, number in named} == fit
    together = "and samples_per_context" in str(told.value)
    for some in [fit] if together else [{name: number} for name, number in fit.items()]:
        sequences = some.get("gradient_accumulation_steps", per_device * accumulation)
        StepSampler(contexts, some.get("samples_per_context", n), per_device=sequences, accumulation=1,
                    world=some.get("num_processes", world))  # fmt: skip


class Hub:
    """Behave like a datasets.Dataset."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {"prompt": ["w1", "w2 w3"][i], "other": 1}


@pytest.mark.parametrize("rows", [["w1", "w2 w3"], [{"prompt": "w1"}, {"prompt": "w2 w3"}], Hub()])
def test_where_prompts_come_from(rows):
    assert [prompt for _, prompt in Contexts(rows)] == ["w1", "w2 w3"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (iter(["w1"]), "must have a length"),
        ({"a": ["w1"]}, "must have a length"),
        ("w1", "must have a length"),
        ([], "is empty"),
        ([{"text": "w1"}], "no column 'prompt', only text"),
        ([3], "row 0 of train_dataset has a prompt of type int, and it must be a string or a list"),
        (tokenizer()(["w1", "w2"]), "must have a length"),
        ([{"prompt": "w1", "pixel_values": [0.0]}], "the column 'pixel_values', .* text only"),
        (datasets.Dataset.from_list([{"prompt": "w1", "images": ["x.png"]}]), "the column 'images', .* text only"),
    ],
)
def test_bad_prompts(rows, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Contexts(rows)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("image", "x.png"),
        ("images", None),
        ("image_1", "x.png"),
        ("image_url", "https://x/y.png"),
        ("image_paths", ["x.png"]),
        ("image_base64", "aGk="),
        ("audioFile", "x.wav"),
        ("Audio", {"array": [0.0]}),
        ("video.bytes", b"0"),
        ("image_grid_thw", [[1, 2, 2]]),
        ("image_embeds", torch.zeros(2, 2)),
        ("pixel_values_videos", [0.0]),
        ("pixel_attention_mask", [[1, 1]]),
        ("video_grid_thw", torch.ones(1, 3)),
        ("input_audio_embeds", [[0.5]]),
        ("input_features", [[0.5]]),
        ("input_features_mask", [1]),
    ],
)
def test_columns_of_images_video_and_sound_are_refused(column, value):
    with pytest.raises(ValueError, match=f"the column '{column}', .* text only"):
        Contexts([{"prompt": "w1", column: value}])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("image_caption", "a cat"),
        ("video_titles", ["a", "b"]),
        ("num_images", 2),
        ("audio_seconds", np.float32(1.5)),
        ("image_caption", None),
        ("imagery", [0.5]),
        ("features", [0.5]),
        ("url", "https://x/y.png"),
    ],
)
def test_columns_of_text_and_numbers_about_images_are_kept(column, value):
    assert not holds_media(column, value)
    rows = Contexts([{"prompt": "w1", column: value}])
    assert rows.rows_of([0]) == [{"prompt": "w1", column: value}]


def test_chat_messages_go_through_the_template(tmp_path):
    tok = tokenizer()
    with pytest.raises(ValueError, match="has no chat_template"):
        job(tmp_path, prompts=[[{"role": "user", "content": "w1 w2"}]], tok=tok)
    tok.chat_template = (
        "{% for m in messages %}{{ m['content'] }} w7 {% endfor %}{% if add_generation_prompt %}w6{% endif %}"
    )
    _, _, keep = run(
        tmp_path, max_steps=1, prompts=[[{"role": "user", "content": "w1 w2"}]], samples_per_context=8, tok=tok
    )
    prompt = keep.steps[0].samples.tokens[:, : keep.steps[0].samples.prompt_len]
    assert prompt.tolist() == [[WORDS.index(w) for w in ("w1", "w2", "w7", "w6")]] * 8


def test_chats_are_the_same_to_base_and_policy(tmp_path):
    """Both use the template's arguments and continue the last answer. A row that the template refuses is named."""
    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }} w7 {% endfor %}{{ extra }}{% if add_generation_prompt %} w6{% endif %}"
    )
    asked = {"role": "user", "content": [{"type": "text", "text": "w1 w2"}]}
    prompts = [[asked], [asked, {"role": "assistant", "content": "w4"}]]
    target = EBM(LanguageModel(gpt2(), tok, chat_template_kwargs={"extra": "w0"}), [Contains("w3")])
    args = job(tmp_path, max_steps=1, samples_per_context=4).args
    trainer = dmfast.DMTrainer(gpt2(), target, args, train_dataset=prompts)
    drawn = [model.sample(prompts, max_new_tokens=2, seed=0) for model in (trainer.policy, target.base)]
    for x in drawn:
        rows = zip(x.tokens[:, : x.prompt_len], x.attention_mask[:, : x.prompt_len], strict=True)
        found = [[WORDS[token] for token in row[seen.bool()]] for row, seen in rows]
        assert found == [["w1", "w2", "w7", "w0", "w6"], ["w1", "w2", "w7", "w4"]]
    trainer.train()
    wrong = [*prompts, [{"role": "system", "content": "w5"}, asked]]
    with pytest.raises(ValueError, match=r"train_dataset: prompt 2: .*roles system, user: .*no system"):
        dmfast.DMTrainer(gpt2(), target, args, train_dataset=wrong)


@pytest.mark.parametrize("in_arrow", [False, True])
def test_scorers_see_the_whole_rows(tmp_path, in_arrow):
    """Each sequence has the row of its own prompt, in the order of the steps and through microbatches."""
    rows = [{"prompt": prompt, "answer": f"answer to {prompt}", "n": i} for i, prompt in enumerate(PROMPTS)]
    seen = []

    def scorer(x):
        seen.extend(zip(x.rows, x.tokens.tolist(), x.attention_mask.tolist(), strict=True))
        return torch.ones(len(x))

    settings = {"constraints": [Scorer(scorer, on="samples", name="s")], "samples_per_context": 2, "max_steps": 3,
                "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}  # fmt: skip
    job(tmp_path, prompts=datasets.Dataset.from_list(rows) if in_arrow else rows, **settings).train()
    assert len(seen) == 12
    for row, tokens, mask in seen:
        assert row == rows[row["n"]]
        ids = [token for token, there in zip(tokens, mask, strict=True) if there]
        wanted = tokenizer()(row["prompt"])["input_ids"]
        assert ids[: len(wanted)] == wanted


def test_prompts_alone_have_no_rows(tmp_path):
    _, _, keep = run(tmp_path, max_steps=1, prompts=PROMPTS, samples_per_context=2)
    assert keep.steps[0].samples.rows is None


def test_a_row_that_has_a_prompt_alone_is_seen_as_it_was_written():
    rows = [{"prompt": [{"role": "user", "content": "w1"}]}]
    assert Contexts(rows).rows_of([0]) == rows
    assert Contexts([*rows, "w2"]).rows_of([1, 0]) == [{"prompt": "w2"}, *rows]
    stream = Stream(datasets.Dataset.from_list(rows).to_iterable_dataset())
    assert stream.whole(next(stream.steps(1))) == rows


def test_checks_of_the_proposal_see_the_rows(tmp_path):
    rows = [{"prompt": prompt, "answer": "w3"} for prompt in PROMPTS]
    sizes = []

    def scorer(x):
        sizes.append(len(x.rows))
        return torch.ones(len(x))

    job(tmp_path, prompts=rows, constraints=[Scorer(scorer, on="samples")], samples_per_context=4, max_steps=2,
        proposal_check_samples=12).train()  # fmt: skip
    assert sizes == [8, 8, 12]


def test_a_fit_sees_the_rows():
    """Each scorer's row is that of the sequence's own prompt. Samples bring their rows along."""
    seen = []

    def scorer(x):
        seen.extend((row["prompt"], x.tokens[i, 0].item()) for i, row in enumerate(x.rows))
        return torch.tensor([float(row["answer"] in text) for row, text in zip(x.rows, x.text, strict=True)])

    rows = [{"prompt": "w1", "answer": "w3"}, {"prompt": "w7", "answer": "w4"}]
    base = LanguageModel(gpt2(), tokenizer())
    target = EBM(base, [Moment(Scorer(scorer, on="samples", name="right"), 0.4)])
    target.fit(n=400, contexts=[row["prompt"] for row in rows], rows=rows, max_new_tokens=6)
    assert len(seen) == 400 and all(WORDS[token] == prompt for prompt, token in seen)
    with pytest.raises(ValueError, match="pass samples or contexts"):
        target.fit(base.sample(n=8, max_new_tokens=6), rows=rows)
