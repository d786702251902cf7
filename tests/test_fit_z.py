"""Test pass rates of prompts that are drawn beforehand, and a Z that starts from them, where Z is known."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from test_matcher import PROMPTS, draw, matcher, sgd, step
from trainer_job import job

import dmfast
from dmfast import EBM, Contains, Reward, Verifier
from dmfast.estimators import PartitionFunction
from dmfast.seeds import seed_for

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")

W3, W3_ID, END = Contains("w3"), 3, 5


def exact_z(base, prompt):
    """Return the probability that w3 is among at most two tokens, summed over all of them."""
    ids = base.tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        first = base.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        second = [base.model(torch.tensor([[*ids, t]])).logits[0, -1].double().softmax(-1)[W3_ID] for t in range(11)]
    return float(first[W3_ID] + sum(first[t] * second[t] for t in range(11) if t not in (W3_ID, END)))


def by_row(texts, rows):
    return ["w3" in text.split() and row["level"] == 1 for text, row in zip(texts, rows, strict=True)]


def target_of(*constraints):
    return EBM(matcher().target.base, list(constraints) or [W3])


def rows_of(prompts, rates, n=16):
    return [{"prompt": p, "pass_rate": rate, "pass_rate_n": n} for p, rate in zip(prompts, rates, strict=True)]


def test_the_pass_rate_of_a_prompt_is_its_z():
    target, n = target_of(), 600  # this draws in parts of one prompt each
    rows = target.fit_z(PROMPTS, n, max_new_tokens=2, progress=False)
    assert [row["prompt"] for row in rows] == PROMPTS and {row["pass_rate_n"] for row in rows} == {n}
    for row in rows:
        z = exact_z(target.base, row["prompt"])
        assert row["pass_rate"] == pytest.approx(z, abs=4 * math.sqrt(z * (1 - z) / n))
    x = target.base.sample(PROMPTS, n, max_new_tokens=2, seed=seed_for(0, "fit_z"))
    assert [row["pass_rate"] for row in rows] == W3(x).view(7, n).mean(1).tolist()


def test_the_data_keeps_its_rows_and_the_verifier_sees_them():
    data = Dataset.from_dict({"prompt": PROMPTS[:3], "level": [1, 2, 1]})
    target = target_of(Verifier(by_row, truncated="judge"))
    with pytest.warns(UserWarning, match=r"1 of 3 prompts had no .* 64 .* below 0.047 .*, and are kept: their Z is"):
        found = target.fit_z(data, 64, max_new_tokens=4, seed=2)
    assert isinstance(found, Dataset) and found.column_names == ["prompt", "level", "pass_rate", "pass_rate_n"]
    assert found["level"][:] == [1, 2, 1] and found["pass_rate"][1] == 0 < min(found["pass_rate"][0], 1.0)
    with pytest.warns(UserWarning, match="1 of 3 prompts .* and are left out"):
        left = target.fit_z(data, 64, max_new_tokens=4, seed=2, drop_zero=True)
    assert left["prompt"][:] == [PROMPTS[0], PROMPTS[2]] and left["pass_rate"][1] == found["pass_rate"][2]
    with pytest.raises(ValueError, match=r"no prompt of 1 .* among 8, so that drop_zero=True"):
        target.fit_z(data.select([1]), 8, max_new_tokens=4, drop_zero=True)
    quarter = target_of(Verifier(lambda texts, rows: [0.25] * len(texts), truncated="judge"))
    assert quarter.fit_z(["w1"], 8, max_new_tokens=4)[0]["pass_rate"] == 0.25


@pytest.mark.parametrize(
    ("data", "options", "error", "match"),
    [
        (PROMPTS, {"n": 0}, ValueError, "n must be a positive integer, .* got 0"),
        ([], {}, ValueError, "data is empty"),
        (iter(PROMPTS), {}, TypeError, "data must be a list of prompts or of rows"),
        ([{"question": "w1"}], {}, ValueError, "row 0 of data has no column 'prompt', only question"),
        (rows_of(["w1"], [0.5]), {}, ValueError, "row 0 of data has the column 'pass_rate' already"),
        (["w1 " * 30], {}, ValueError, "prompt 0 has 30 tokens"),
    ],
)
def test_data_that_can_not_be_drawn_for_is_refused(data, options, error, match):
    with pytest.raises(error, match=match):
        target_of().fit_z(data, **options)


def test_a_target_whose_z_is_no_share_is_refused():
    with pytest.raises(ValueError, match="a pass rate is Z only where the target filters the base"):
        target_of(W3, Reward(lambda texts: [0.0] * len(texts), beta=1.0)).fit_z(PROMPTS)


# --- a Z that starts from them


def test_z_starts_as_if_the_samples_of_the_base_had_been_seen():
    m, rows = matcher(constraints=[W3], z_from_rows=True), rows_of(["w1", "w2"], [0.25, 0.0])
    seen = [PartitionFunction(), PartitionFunction()]
    for z, right in zip(seen, (4, 0), strict=True):
        z.update(torch.tensor([0.0] * right + [-math.inf] * (16 - right)).double(), torch.zeros(16).double())
    optimizer = sgd(m)
    for _ in range(2):  # the rates must count only once
        batch = draw(m, ["w1", "w2"], 4, context_id=[7, 8], rows=rows)
        for i, z in enumerate(seen):
            of_prompt = slice(4 * i, 4 * i + 4)
            z.update(batch.inputs["log_target"][of_prompt], batch.samples.log_prob[of_prompt])
            assert batch.pending.partitions[7 + i].state_dict() == pytest.approx(z.state_dict(), abs=1e-9)
            assert batch.inputs["log_z"][of_prompt].tolist() == pytest.approx([z.log_z] * 4, abs=1e-9)
        assert m.running.partitions is not batch.pending.partitions  # nothing changes before commit
        for part in batch.split(3):
            m.loss(part).loss.backward()
        optimizer.step()
        m.commit()
    assert m.running.partitions[7].stderr == pytest.approx(seen[0].stderr)


def test_a_prompt_of_none_right_is_unknown_and_no_zero():
    m = matcher(constraints=[Verifier(lambda texts, rows: [False] * len(texts))], z_from_rows=True)
    metrics = step(m, sgd(m), ["w1"], 4, context_id=[7], rows=rows_of(["w1"], [0.0]))
    assert metrics["n_empty"] == 4 and m.running.partitions[7].log_z == -math.inf
    found = m.running.partitions.updated(torch.tensor([7]), torch.zeros(1).double(), torch.zeros(1).double())
    # The 16 wrong samples count as soon as one sample is right.
    assert found[7].log_z == pytest.approx(math.log(1 / 21))


def test_a_fresh_check_starts_z_alike():
    m = matcher(constraints=[W3], proposal={"interval": 1}, check_samples=4, z_from_rows=True)
    batch = draw(m, ["w1"], 4, context_id=[7], rows=rows_of(["w1"], [1.0], 1600))
    other = dmfast.batch.Prompts(["w2"], [9], rows_of(["w2"], [0.5], 10**9))
    *_, log_z = m._fresh(batch.pending, other, batch.drawn[1])
    assert log_z.tolist() == pytest.approx([math.log(0.5)] * 4, abs=1e-6)


def test_the_trainer_takes_what_fit_z_gave(tmp_path):
    target = target_of()
    data = target.fit_z(Dataset.from_dict({"prompt": PROMPTS[:2]}), 32, max_new_tokens=6)
    for rows in (data, [dict(row) for row in data], IterableDataset.from_generator(lambda: iter(list(data)))):
        evals = {} if isinstance(rows, (Dataset, list)) else {"eval_dataset": PROMPTS}
        trainer = job(tmp_path, constraints=[W3], prompts=rows, z_from_rows=True, samples_per_context=4, max_steps=1,
                      warmup_steps=0, **evals)  # fmt: skip
        trainer.train()
        assert {z.n for z in trainer.partitions.values()} == {32 + 4}
    assert trainer.args.settings().z_from_rows


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (PROMPTS, "'pass_rate' and 'pass_rate_n', which EBM.fit_z gives to a data set, and train_dataset has prompts"),
        ([{"prompt": "w1", "pass_rate": 0.5}], "row 0 of train_dataset has no 'pass_rate_n', only prompt, pass_rate"),
        (Dataset.from_dict({"prompt": ["w1"], "level": [1]}), "row 0 of train_dataset has no 'pass_rate'"),
        (rows_of(["w1", "w2"], [0.5, 1.5]), "'pass_rate' must be from 0 to 1, got 1.5 in row 1 of train_dataset"),
        (rows_of(["w1"], [math.nan]), "'pass_rate' must be from 0 to 1, got nan in row 0"),
        (rows_of(["w1"], [None]), "'pass_rate' must be from 0 to 1, got None in row 0"),
        (rows_of(["w1"], [0.5], 2.5), "'pass_rate_n' must be an integer of 1 or more, got 2.5 in row 0"),
        (rows_of(["w1"], [0.5], 0), "'pass_rate_n' must be an integer of 1 or more, got 0 in row 0"),
    ],
)
def test_rows_without_a_pass_rate_are_refused(tmp_path, rows, match):
    with pytest.raises(ValueError, match=match):
        job(tmp_path, constraints=[W3], prompts=rows, z_from_rows=True, per_device_train_batch_size=1)


def test_the_matcher_refuses_rows_without_one_before_it_draws():
    m = matcher(constraints=[W3], z_from_rows=True)
    m.proposal.sample = None
    with pytest.raises(ValueError, match="and rows has prompts alone"):
        draw(m, ["w1"], 4)


def test_what_does_not_go_with_pass_rates_is_refused():
    with pytest.raises(ValueError, match=r"z_from_rows=True .* partition='step' takes Z from the samples of the step"):
        matcher(constraints=[W3], z_from_rows=True, partition="step")
    with pytest.raises(ValueError, match="z_from_rows=True is about a share of the base's sequences"):
        matcher(z_from_rows=True)
