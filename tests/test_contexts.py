"""Test conditional distribution matching.

The trainer's steps are compared with E_c KL(p_c||pi_c), summed over all sequences of each context. Other tests are
about contexts whose P is 0, prompts in a datasets.Dataset, and the empty context, which is a context like others.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import datasets
import pytest
import torch
from tabular import counts, one_thread  # noqa: F401
from trainer_job import PROMPTS, WORDS, Gradients, StopAt, digest, gpt2, job, tokenizer
from trainer_tools import Keep, assert_close, run

import dmfast
from dmfast import Contains, LanguageModel, Scorer
from dmfast.samples import Samples
from dmfast.training.data import Contexts

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")

PAD, EOS, BOS = (WORDS.index(word) for word in ("<p>", "<e>", "<s>"))


def log_prob(model, samples):
    """Return log pi in fp64 by plain log_softmax, with gradient."""
    logits, labels = LanguageModel(model, samples.tokenizer).logits(samples)
    log_p = logits.double().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (log_p * (labels != -100)).sum(1)


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters()}


# --- exact


def everything(prompt, words):
    """Return all 111 sequences of up to two tokens after a prompt. Their log q is not set yet."""
    before = torch.tensor(words(prompt)["input_ids"] or [BOS])
    rest = torch.cartesian_prod(torch.arange(len(WORDS)), torch.arange(len(WORDS)))
    rest[rest[:, 0] == EOS, 1] = PAD
    rest = rest.unique(dim=0)
    scored = torch.stack([torch.ones(len(rest), dtype=torch.bool), rest[:, 0] != EOS], 1)
    given, zero = torch.ones(len(rest), len(before), dtype=torch.bool), torch.zeros(len(rest), dtype=torch.int64)
    return Samples(
        torch.cat([before.expand(len(rest), -1), rest], 1), torch.cat([given, scored], 1).long(),
        torch.cat([~given, scored], 1), len(before), zero.double(), zero, 1.0, words, PAD,
    )  # fmt: skip


def score(samples):
    """Return b(x, c), which is 0 for about half of the sequences and has another size in each context."""
    last, rest = samples.tokens[:, samples.prompt_len - 1], samples.tokens[:, samples.prompt_len :]
    return ((3 * last + 5 * rest[:, 0] + 7 * rest[:, 1] * (rest[:, 0] != EOS)) % 6 - 2).clamp(min=0) * (1.0 + last)


class Draws:
    """Stand for a proposal's sample and return all sequences of each prompt.

    Each sequence comes as often as a q has it among n, so that a mean over the n is the expectation under q. Each
    prompt and each call have another q.
    """

    def __init__(self, words):
        self.words, self.calls = words, 0

    def __call__(self, prompts, n, **_):
        parts = []
        for i, prompt in enumerate(prompts):
            x, generator = everything(prompt, self.words), torch.Generator().manual_seed(100 * self.calls + i)
            often = counts(torch.randn(len(x), generator=generator).softmax(0), n)
            drawn = x[torch.arange(len(x)).repeat_interleave(often)]
            log_q = (often.double() / n).log().repeat_interleave(often)
            parts.append(replace(drawn, log_prob=log_q, context_id=torch.full((n,), i)))
        self.calls += 1
        return Samples.cat(parts)


@pytest.mark.parametrize(
    ("prompts", "partition", "objective"),
    [
        (None, "running", "dpg"),
        (None, "step", "gdc++"),
        (PROMPTS[:4], "running", "gdc++"),
        (PROMPTS[:4], "step", "dpg"),
    ],
    ids=["the empty context, running", "the empty context, step", "four prompts, running", "four prompts, step"],
)
def test_a_step_is_the_gradient_of_the_mean_kl(tmp_path, prompts, partition, objective):
    """A step has two of the prompts, and later steps see them again with another q. Z is the sum over the sequences."""
    n, gradients, keep = 1000, Gradients(), Keep()
    contexts, in_step = prompts or [""], 2 if prompts else 1
    trainer = keep.trainer = job(
        tmp_path, callbacks=[gradients, keep], constraints=[Scorer(score, on="samples", name="b")], prompts=prompts,
        samples_per_context=n, per_device_train_batch_size=n * in_step, max_new_tokens=2, partition=partition,
        objective=objective, proposal_interval=100, max_steps=4,
    )  # fmt: skip
    trainer.proposal.snapshot.sample = Draws(tokenizer())
    trainer.matcher._rollouts.q_is_base = False
    base = copy.deepcopy(trainer.model).double()
    trainer.train()

    sequences = [everything(prompt, tokenizer()) for prompt in contexts]
    with torch.no_grad():
        log_p = [log_prob(base, x) + score(x).double().log() for x in sequences]
    log_z = torch.stack([each.logsumexp(0) for each in log_p])
    assert all(0.3 < float(x.isfinite().double().mean()) < 0.7 for x in log_p)
    assert len(contexts) == 1 or float(log_z.max() - log_z.min()) > 0.5
    for model, step, found in zip(keep.models, keep.steps, gradients.steps, strict=True):
        torch.testing.assert_close(step.inputs["log_z"], log_z[step.samples.context_id], rtol=0, atol=1e-5)
        policy, rows = copy.deepcopy(model).double(), sorted(set(step.samples.context_id.tolist()))
        assert len(rows) == in_step
        for row in rows:
            p = (log_p[row] - log_z[row]).exp()
            kl = (torch.xlogy(p, p) - p * log_prob(policy, sequences[row])).sum()
            (kl / len(rows)).backward()
        assert_close(found, gradients_of(policy))
    last = set(keep.steps[-1].samples.context_id.tolist())
    for row in range(len(contexts)) if partition == "running" else last:
        assert trainer.partitions[row].log_z == pytest.approx(float(log_z[row]), abs=1e-5)
        assert trainer.partitions[row].n == (4 * in_step // len(contexts) if partition == "running" else 1) * n
    assert len(trainer.partitions) == (len(contexts) if partition == "running" else in_step)


# --- P = 0


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
@pytest.mark.parametrize("partition", ["running", "step"])
def test_contexts_where_p_is_0(tmp_path, partition, objective):
    """P is always 0 after w7, and is 0 after w3 from the second step on.

    Where nothing is known of Z the weights are 0. Where Z is known from an earlier visit they are -rho (gdc++) or 0
    (dpg). All sequences count in B.
    """
    never, once, visits = WORDS.index("w7"), WORDS.index("w3"), []

    def b(x):
        last = x.tokens[:, x.prompt_len - 1]
        visits.append(1)
        return ((last != never) & ((last != once) | (len(visits) == 1))).double()

    trainer, gradients, keep = run(
        tmp_path, constraints=[Scorer(b, on="samples", name="b")], prompts=["w7", "w3", "w1"], samples_per_context=4,
        per_device_train_batch_size=12, max_steps=2, partition=partition, objective=objective, warmup_steps=0,
    )  # fmt: skip
    for visit, (model, step, found) in enumerate(zip(keep.models, keep.steps, gradients, strict=True)):
        policy = copy.deepcopy(model)
        log_pi, log_q, log_target = log_prob(policy, step.samples), step.samples.log_prob, step.inputs["log_target"]
        empty, was_there = step.samples.context_id == 0, step.samples.context_id == 1
        if partition == "step" and visit == 1:
            empty = empty | was_there
        assert bool((step.inputs["log_z"][empty] == -math.inf).all())
        assert bool(step.inputs["log_z"][~empty].isfinite().all())
        weight = (log_target - step.inputs["log_z"].nan_to_num(neginf=0.0) - log_q).exp()
        if objective == "gdc++":
            weight = weight - (log_pi.detach() - log_q).exp()
        weight[empty] = 0
        if visit == 1 and partition == "running":
            assert bool(((weight[was_there] < 0) == (objective == "gdc++")).all())
        (-(weight * log_pi).sum() / 12).backward()
        assert_close(found, gradients_of(policy))
    logged = [h["n_empty"] for h in trainer.state.log_history if "n_empty" in h]
    assert logged == [4, 4 if partition == "running" else 8]


# --- datasets


TRAIN = {"samples_per_context": 2, "max_steps": 4, "constraints": [Contains("w4")], "proposal_criterion": "interval"}
ROWS = {"prompt": PROMPTS, "text": ["x"] * len(PROMPTS), "n": list(range(len(PROMPTS)))}


def stored(folder, rows):
    """Return a data set that is memory-mapped from a file."""
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    return datasets.load_from_disk(folder)


@pytest.fixture(scope="module")
def of_a_list(tmp_path_factory):
    """Return a job that was trained on a list of prompts."""
    trainer = job(tmp_path_factory.mktemp("list"), prompts=PROMPTS, **TRAIN)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "rows",
    [
        lambda _: datasets.Dataset.from_dict(ROWS),
        lambda folder: stored(folder / "rows", ROWS),
        lambda _: datasets.Dataset.from_dict({key: list(reversed(x)) for key, x in ROWS.items()}).sort("n"),
        lambda _: datasets.Dataset.from_dict(ROWS)["prompt"],
        lambda _: datasets.Dataset.from_dict(ROWS).with_format("torch"),
        lambda _: datasets.Dataset.from_dict(
            {"prompt": [tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]}
        ).with_format("torch"),
    ],
    ids=["in memory", "from disk", "indirect", "its column", "in torch's format", "token ids"],
)
def test_a_dataset_is_the_list_of_its_prompts(tmp_path, rows, of_a_list):
    trainer = job(tmp_path / "dataset", prompts=rows(tmp_path), **TRAIN)
    trainer.train()
    assert digest(trainer.model) == digest(of_a_list.model) != digest(trainer.target.base.model)
    assert len(trainer.partitions) == len(PROMPTS)
    assert trainer.partitions.state_dict()["log_sum"].tolist() == of_a_list.partitions.state_dict()["log_sum"].tolist()
    trainer.evaluate()
    assert trainer.eval_samples.context_id.unique().tolist() == list(range(len(PROMPTS)))


def test_a_run_on_a_list_goes_on_with_the_dataset(tmp_path, recwarn, of_a_list):
    """With the same prompts the Z of each context stays, and the run ends as if it had never stopped."""
    job(tmp_path, prompts=PROMPTS, callbacks=[StopAt(2)], **TRAIN).train()
    resumed = job(tmp_path, prompts=datasets.Dataset.from_dict(ROWS), **TRAIN)
    resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(of_a_list.model)
    assert not any("other prompts" in str(warning.message) for warning in recwarn)


def test_chat_messages_of_a_dataset(tmp_path):
    """Arrow keeps messages as structs; they come back as the tokenizer's template wants them."""
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w6"
    chats = [[{"role": "user", "content": "w1 w2"}], [{"role": "user", "content": "w3"}]]
    trainer = job(tmp_path, prompts=datasets.Dataset.from_dict({"prompt": chats}), samples_per_context=4, tok=words)
    trainer.evaluate()
    x = trainer.eval_samples
    ids = [WORDS.index(word) for word in ("w1", "w2", "w6", "w3")]
    assert x.tokens[0, : x.prompt_len].tolist() == ids[:3]
    assert x.tokens[-1, : x.prompt_len].tolist() == [PAD, ids[3], ids[2]]


def test_lambda_from_the_prompts_of_a_dataset():
    base = LanguageModel(gpt2(), tokenizer())
    rows, wish = datasets.Dataset.from_dict(ROWS), [dmfast.Moment(Contains("w3"), 0.5)]
    found, plain = (
        dmfast.EBM(base, wish).fit(n=700, contexts=x, max_new_tokens=4).lambda_ for x in (rows["prompt"], PROMPTS)
    )
    assert torch.equal(found, plain)
    with pytest.raises(TypeError, match=r"got {'prompt': 'w1 w2', .*dataset\['prompt'\]"):
        dmfast.EBM(base, wish).fit(n=700, contexts=rows, max_new_tokens=4)


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        (datasets.DatasetDict(train=datasets.Dataset.from_dict(ROWS)), TypeError, "one split.*got DatasetDict"),
        (datasets.Dataset.from_dict(ROWS).to_iterable_dataset(), TypeError, "have a length.*got IterableDataset"),
        (datasets.Dataset.from_dict({"text": ["w1"], "n": [1]}), ValueError, "no column 'prompt', only text, n"),
        (datasets.Dataset.from_dict({"prompt": []}), ValueError, "is empty"),
        (
            datasets.Dataset.from_dict({"prompt": [None, "w1"]}),
            ValueError,
            "row 0 of train_dataset has a prompt of type NoneType",
        ),
        (
            datasets.Dataset.from_dict({"prompt": [1.5]}),
            ValueError,
            "row 0 of train_dataset has a prompt of type float",
        ),
    ],
    ids=["splits", "a stream", "another column", "empty", "None", "numbers"],
)
def test_datasets_that_are_no_prompts(rows, error, match):
    with pytest.raises(error, match=match):
        Contexts(rows)


def test_a_prompt_that_is_missing_later_is_found_before_training(tmp_path):
    with pytest.raises(ValueError, match="row 1 of train_dataset has a prompt of type NoneType"):
        job(tmp_path, prompts=datasets.Dataset.from_dict({"prompt": ["w1", None]}))


# --- the empty context


def unprompted(folder, prompts):
    """Return a job that was trained with two microbatches in a step."""
    trainer = job(folder, prompts=prompts, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                  eval_strategy="steps", eval_steps=3)  # fmt: skip
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def of_none(tmp_path_factory):
    return unprompted(tmp_path_factory.mktemp("none"), None)


def timeless(trainer):
    """Return what was logged, without times and epochs. A run without a data set has no epochs."""
    untold = ("epoch", "second", "runtime")
    return [
        {key: repr(value) for key, value in line.items() if not any(word in key for word in untold)}
        for line in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    "prompts",
    [[""], [{"prompt": ""}], [[BOS]], datasets.Dataset.from_dict({"prompt": [""]})],
    ids=["a list", "rows", "BOS", "a dataset"],
)
def test_no_prompts_are_one_empty_prompt(tmp_path, prompts, of_none):
    """The policy, the logs of every step and of an evaluation, and Z are the same to the bit."""
    trainer = unprompted(tmp_path, prompts)
    assert digest(trainer.model) == digest(of_none.model) != digest(trainer.target.base.model)
    assert timeless(trainer) == timeless(of_none) and len(timeless(trainer)) == 5
    assert trainer.partitions[0].state_dict() == of_none.partitions[0].state_dict() and trainer.partitions[0].n == 24


# --- the example


def test_the_example_runs(monkeypatch, capsys):
    """A list and a dataset give the same result. The exact Z follows from the shares under the base."""
    import prompts

    small = ["--steps", "2", "--samples", "8", "--fit-samples", "256", "--eval-samples", "32"]
    found = []
    for more in ([], ["--dataset"]):
        monkeypatch.setattr("sys.argv", ["prompts.py", *small, *more])
        found.append(prompts.main())
    assert found[0] == found[1]
    assert "share of sports under a, p, pi" in capsys.readouterr().out
    for rate, wanted, z in zip(*(found[0][name] for name in ("base", "target", "exact")), strict=True):
        assert wanted * z == pytest.approx(z - (1 - rate)) and wanted >= rate
