"""Test diversity against nltk's plain results and by hand, and the variance of gradients against torch.func."""

from __future__ import annotations

import concurrent.futures
import copy
import math
import random
import sys
import threading
from types import SimpleNamespace

import peft
import pytest
import torch
from nltk.tokenize import wordpunct_tokenize
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from trainer_job import digest, gpt2, job, tokenizer
from trainer_tools import one_thread  # noqa: F401
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

import dmfast
from dmfast import Contains
from dmfast.diagnostics import distinct_n, gradient_variance, self_bleu, spread, weight_statistics
from dmfast.report import runs
from dmfast.training import samples

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*fan_in_fan_out")


# ---- diversity


@pytest.mark.parametrize(
    ("n", "wanted"), [(1, (2 / 5 + 3 / 3 + 0) / 3), (2, (2 / 5 + 2 / 3 + 0) / 3), (3, (2 / 5 + 1 / 3 + 0) / 3)]
)
def test_distinct_n_by_hand(n, wanted):
    assert distinct_n(["a b a b a", "she paints.", ""], n) == pytest.approx(wanted, abs=1e-15)


def plain_self_bleu(texts, n):
    split = [wordpunct_tokenize(text) for text in texts]
    scores = [
        sentence_bleu(split[:i] + split[i + 1 :], text, [1 / n] * n, SmoothingFunction().method1)
        for i, text in enumerate(split)
    ]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_self_bleu_is_nltk_s(n):
    """The texts have repeated words, ties and duplicates. One is too short, one shares no word, and one is empty."""
    rng = random.Random(n)
    some = [" ".join(rng.choices("abcdef", [8, 4, 2, 1, 1, 1], k=rng.randint(1, 15))) for _ in range(40)]
    texts = [*some, some[0], "a", "xyzzy plugh", "", "a a a a a a a a. a a a a a a a a a a a a a a"]
    assert self_bleu(texts, n) == pytest.approx(plain_self_bleu(texts, n), abs=1e-12)


def test_self_bleu_at_its_ends():
    assert self_bleu(["one and the same text"] * 3) == pytest.approx(1, abs=1e-12)
    assert self_bleu(["nothing in common", "here are other words"]) == 0
    assert self_bleu(["dog", "god"], 1) == 0  # dmfast compares words, and gdc's code compares letters


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: distinct_n([], 1), ValueError, "0 texts"),
        (lambda: distinct_n(["a"], 0), ValueError, "n=0"),
        (lambda: distinct_n("a b", 1), TypeError, "list of strings"),
        (lambda: self_bleu(["a"]), ValueError, "1 texts"),
        (lambda: self_bleu(["a", "b"], 0), ValueError, "n=0"),
    ],
)
def test_what_has_no_diversity(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_without_nltk(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match="pip install"):
        distinct_n(["a"], 1)


# ---- weights and gradients


def test_weight_statistics_by_hand():
    found = weight_statistics(torch.tensor([-3.0, 1.0, 1.0, 5.0]).double())
    assert found == {"weight_mean": 1.0, "weight_std": pytest.approx(8**0.5), "weight_abs": 2.5}


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("ranks", [1, 3])
def test_spread_is_the_trace_of_the_covariance(offset, ranks):
    """The variance is right where it is 1e-8 of the squared mean, over ranks, and where gradients of 0 are left out."""
    torch.manual_seed(0)
    g = torch.randn(12, 7, dtype=torch.float64) + offset
    g[[2, 7]] = 0
    g[:, 5:] = 0  # these columns are a parameter whose gradient is None below
    parameters = [torch.zeros(size, dtype=torch.float64) for size in ((2, 2), (1,), (2,))]
    slots, barrier = [torch.zeros(())] * ranks, threading.Barrier(ranks)

    def on_rank(rank):
        def reduce(x):
            slots[rank] = x
            barrier.wait(60)
            total = sum(slots)
            barrier.wait(60)
            return total

        part = g[rank::ranks]
        return spread([[x[:4].view(2, 2), x[4:5], None] for x in part if bool(x.any())], parameters, len(part), reduce)

    with concurrent.futures.ThreadPoolExecutor(ranks) as pool:
        for found in pool.map(on_rank, range(ranks)):
            assert found.n == 12
            assert found.variance == pytest.approx(float(torch.cov(g.T, correction=0).trace()), rel=1e-9)
            assert found.norm == pytest.approx(float(g.mean(0).norm()), rel=1e-12)
            assert found.variance + found.norm**2 == pytest.approx(float(g.square().sum(1).mean()), rel=1e-9)


def drawn(model, n=9):
    policy = dmfast.LanguageModel(model, tokenizer())
    x = policy.sample(["w1 w2", "w3", "w4 w5 w6"], n // 3, max_new_tokens=6, seed=1)
    torch.manual_seed(5)
    weight = torch.randn(n).double()
    weight[4] = 0
    return policy, x, weight


def per_sequence(policy, x, weight, names, coefficient=0.0):
    """Return the gradients, (N, parameters) fp64, by torch.func.vmap over a plain forward of the model."""
    model = copy.deepcopy(policy.model).double()
    model.config._attn_implementation = "eager"
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    trained = {name: p for name, p in parameters.items() if name in names}
    labels = torch.where(x.score_mask, x.tokens, -100)

    def loss(trained, tokens, mask, labels, weight):
        positions = (mask.cumsum(0) - 1).clamp(min=0)
        logits = torch.func.functional_call(
            model, parameters | trained, (tokens[None],),
            {"attention_mask": mask[None], "position_ids": positions[None], "use_cache": False},
        ).logits[0, :-1]  # fmt: skip
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        each = weight * log_p.gather(1, labels[1:, None].clamp(min=0))[:, 0] + coefficient * entropy
        return -(each * (labels[1:] != -100)).sum()

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))(
        trained, x.tokens, x.attention_mask, labels, weight
    )
    return torch.cat([g.flatten(1) for g in rows.values()], 1)


@pytest.mark.parametrize("kind", ["all", "frozen", "lora"])
def test_gradient_variance_is_torch_func_s(kind):
    model = gpt2()
    if kind == "frozen":
        model.transformer.wte.requires_grad_(False)
    if kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    policy, x, weight = drawn(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.full_like(p, 7.0)
    state = torch.get_rng_state()
    found = gradient_variance(policy, x, weight)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(bool((p.grad == 7).all()) for p in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    g = per_sequence(policy, x, weight, {n for n, p in model.named_parameters() if p.requires_grad})
    assert found.n == 9
    assert found.variance == pytest.approx(float(g.var(0, correction=0).sum()), rel=1e-5)
    assert found.norm == pytest.approx(float(g.mean(0).norm()), rel=1e-5)


def test_gradient_variance_with_an_entropy_bonus():
    """Sequences of weight 0 have a gradient, too."""
    policy, x, weight = drawn(gpt2())
    weight[2:5] = 0.0
    found = gradient_variance(policy, x, weight, entropy_coefficient=0.3)
    g = per_sequence(policy, x, weight, {n for n, _ in policy.model.named_parameters()}, 0.3)
    assert bool((g[3] != 0).any()) and found.n == 9
    assert found.variance == pytest.approx(float(g.var(0, correction=0).sum()), rel=1e-5)
    assert found.norm == pytest.approx(float(g.mean(0).norm()), rel=1e-5)


def test_gradient_variance_refuses():
    policy, x, weight = drawn(gpt2())
    with pytest.raises(ValueError, match=r"9 sequences and weights of shape \(8,\)"):
        gradient_variance(policy, x, weight[:8])
    with pytest.raises(ValueError, match="finite weight"):
        gradient_variance(policy, x, torch.full((9,), torch.inf).double())
    with pytest.raises(ValueError, match="0 sequences"):
        gradient_variance(policy, x[:0], weight[:0])
    policy.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        gradient_variance(policy, x, weight)


# ---- in the trainer


def steps(trainer):
    return [h for h in trainer.state.log_history if "kl_policy" in h]


class Remember(TrainerCallback):
    """Keep the policy, the samples and their weights from before each step of the optimiser."""

    def __init__(self):
        self.taken = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        matcher = self.trainer.matcher
        x = matcher.batch.samples[torch.cat([part.places for part, _ in matcher._passed])]
        self.taken.append((copy.deepcopy(model), x, torch.cat([out.weight for _, out in matcher._passed])))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"objective": "dpg", "skip_zero_weight": True, "constraints": [Contains("w4")]},
        {"gradient_checkpointing": True},
        {"objective": "kl_control", "reward": Contains("w3"), "beta": 0.1, "on_policy": True, "ppo_epochs": 2},
    ],
    ids=["whole", "cut", "zero weights", "checkpointing", "ppo"],
)
def test_the_trainer_logs_the_variance_of_all_sequences_of_a_step(tmp_path, settings):
    """It is measured every second step, at the policy that the step was taken with. The training stays the same."""
    without = job(tmp_path / "without", **settings)
    without.train()
    remember = Remember()
    trainer = remember.trainer = job(tmp_path / "other", callbacks=[remember], gradient_variance_steps=2, **settings)
    trainer.train()
    assert digest(trainer.model) == digest(without.model)
    assert ["gradient_variance" in h for h in steps(trainer)] == [False, True, False, True]
    for h, (model, x, weight) in list(zip(steps(trainer), remember.taken, strict=True))[1::2]:
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        plain = gpt2()  # this copy lacks the hooks of checkpointing
        plain.load_state_dict(model.state_dict())
        g = per_sequence(dmfast.LanguageModel(plain, tokenizer()), x, weight, names)
        assert len(g) == 8
        assert h["gradient_variance"] == pytest.approx(float(g.var(0, correction=0).sum()), rel=1e-4)
        assert h["gradient_norm"] == pytest.approx(float(g.mean(0).norm()), rel=1e-4)
        if "grad_norm" in h:  # transformers logs its own norm of .grad, and before 5.3 only if it clips gradients
            assert h["gradient_norm"] == pytest.approx(h["grad_norm"], rel=1e-4)
        assert h["weight_std"] == pytest.approx(float(weight.std(correction=0)))
        assert h["weight_mean"] == pytest.approx(float(weight.mean()))
        assert h["weight_abs"] == pytest.approx(float(weight.abs().mean()))


def test_the_variance_is_in_the_next_line_of_the_log(tmp_path):
    """It is logged also if lines are rarer than steps and the last step was not measured."""
    trainer = job(tmp_path, gradient_variance_steps=2, logging_steps=3, max_steps=3)
    trainer.train()
    (line,) = steps(trainer)
    assert line["step"] == 3 and line["gradient_variance"] > 0 and line["seconds_gradient_variance"] > 0


def test_evaluation_measures_diversity_and_what_is_monitored(tmp_path):
    trainer = job(tmp_path, eval_samples=40, eval_diversity=30, eval_strategy="steps", eval_steps=2, max_steps=2)
    trainer.train()
    found = next(h for h in trainer.state.log_history if "eval_runtime" in h)
    texts = trainer.eval_samples.text
    for n in (1, 2, 3):
        each = torch.tensor([distinct_n([text], n) for text in texts[:30]], dtype=torch.float64)
        assert found[f"eval_distinct_{n}"] == pytest.approx(float(each.mean()), abs=1e-12)
        assert found[f"eval_distinct_{n}_stderr"] == pytest.approx(float(each.std()) / 30**0.5, rel=1e-9)
    assert found["eval_self_bleu_5"] == pytest.approx(plain_self_bleu(texts[:30], 5), abs=1e-12)
    assert "eval_self_bleu_5_stderr" not in found
    has = torch.tensor(["w4" in text.split() for text in texts], dtype=torch.float64)
    assert found["eval_phi/w4"] == float(has.mean())  # w4 is monitored, and it is not part of the target
    assert found["eval_phi/w4_stderr"] == pytest.approx(float(has.std()) / 40**0.5, rel=1e-9)


def test_diversity_takes_as_many_texts_of_each_context(tmp_path):
    trainer = job(tmp_path, prompts=["w1 w2", "w3", "w4 w5 w6"], samples_per_context=2, per_device_train_batch_size=6,
                  eval_samples=12, eval_diversity=6, log_samples=12)  # fmt: skip
    found = trainer.evaluate()
    texts = [trainer.eval_samples.text[i] for i in (0, 4, 8, 1, 5, 9)]
    assert found["eval_self_bleu_5"] == pytest.approx(plain_self_bleu(texts, 5), abs=1e-12)
    rows = samples.read(tmp_path)
    assert [row["prompt"] for row in rows] == ["w1 w2", "w3", "w4 w5 w6"] * 4
    assert [row["text"] for row in rows][:6] == texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_diversity": 1}, "from 2 to eval_samples=32, got 1"),
        ({"eval_diversity": 33}, "from 2 to eval_samples=32, got 33"),
        ({"log_samples": -1}, "log_samples must be 0 or more"),
        ({"gradient_variance_steps": -1}, "gradient_variance_steps must be 0 or more"),
    ],
)
def test_what_the_config_refuses(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        job(tmp_path, **settings)


# ---- samples as a table


def test_samples_are_a_table(tmp_path):
    trainer = job(tmp_path, eval_strategy="steps", eval_steps=2, log_samples=3)
    trainer.evaluate()
    trainer.train()
    rows = samples.read(tmp_path)
    assert [(row["step"], row["evaluation"]) for row in rows] == [(s, "eval") for s in (0, 2, 4) for _ in range(3)]
    x = trainer.eval_samples[:3]
    last = rows[-3:]
    assert [row["text"] for row in last] == x.text and all("prompt" not in row for row in rows)
    assert [row["length"] for row in last] == x.score_mask.sum(1).tolist()
    assert [row["log_prob"] for row in last] == x.log_prob.tolist()
    assert [row["log_base"] for row in last] == pytest.approx(trainer.target.base.log_prob(x).tolist(), abs=1e-5)
    for row in last:
        assert row["features"] == {name: float(name in row["text"].split()) for name in ("w3", "w4")}

    trainer.evaluate(metric_key_prefix="test")  # these rows join the others of the same step
    trainer.evaluate(metric_key_prefix="test")  # a repeated evaluation adds no rows
    assert [row["evaluation"] for row in samples.read(tmp_path)[-6:]] == ["eval"] * 3 + ["test"] * 3


def test_a_text_may_hold_any_line_separator(tmp_path):
    """JSON leaves U+2028 and U+0085 as they are, and str.splitlines ends a line there."""
    text = "one\u2028two\u0085three\nfour"
    rows = [{"step": 1, "evaluation": "eval", "text": text, "features": {}}]
    samples.write(tmp_path, rows, 1)
    samples.write(tmp_path, [rows[0] | {"step": 2}], 2)
    assert [row["text"] for row in samples.read(tmp_path)] == [text, text]
    assert [row["text"] for row in runs._rows(tmp_path)] == [text, text]


def test_resumed_the_table_is_that_of_an_unbroken_run(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "log_samples": 4}
    job(tmp_path, **settings).train()
    whole = (tmp_path / samples.NAME).read_bytes()
    resumed = job(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / samples.NAME).read_bytes() == whole
    job(tmp_path, **(settings | {"max_steps": 1})).train()  # a run from scratch keeps nothing of the other run
    assert {row["step"] for row in samples.read(tmp_path)} == {1}


def test_no_table_unless_wanted(tmp_path):
    job(tmp_path).evaluate()  # there is no table, because a push to the hub would take it along
    assert not (tmp_path / samples.NAME).exists()


@pytest.mark.parametrize("line", ['{"step": 1, "text', '"a"', '{"step": 1, "text": 3, "evaluation": "eval"}', "{}"])
def test_a_broken_table_is_named(tmp_path, line):
    good = '{"step": 1, "text": "a", "evaluation": "eval"}\n'
    (tmp_path / samples.NAME).write_text(good + line)
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2, is not a row of samples"):
        samples.read(tmp_path)


ROW = {"step": 7, "evaluation": "eval", "text": "a | b\n<b>", "length": 4, "log_prob": -1.5, "log_base": -2.25,
       "features": {"w3": 1.0}}  # fmt: skip


def test_tensorboard_shows_the_table(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    samples.send([TensorBoardCallback(SummaryWriter(tmp_path))], [ROW], 7, "eval/samples")
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    (event,) = board.Tensors("eval/samples/text_summary")
    assert event.step == 7
    assert event.tensor_proto.string_val[0].decode().splitlines() == [
        "| text | length | log_prob | log_base | phi/w3 |",
        "| --- | --- | --- | --- | --- |",
        "| a &#124; b<br>&lt;b&gt; | 4 | -1.5 | -2.25 | 1 |",
    ]


def test_wandb_gets_the_table():
    logged = []
    callback = object.__new__(WandbCallback)  # its constructor needs wandb
    callback._wandb = SimpleNamespace(run=object(), Table=lambda **table: table, log=logged.append)
    samples.send([callback], [ROW], 7, "eval/samples")
    columns, data = ["text", "length", "log_prob", "log_base", "phi/w3"], [["a | b\n<b>", 4, -1.5, -2.25, 1.0]]
    assert logged == [{"eval/samples": {"columns": columns, "data": data}, "train/global_step": 7}]
    callback._wandb.run = None  # its run is not set up yet
    samples.send([callback], [ROW], 7, "eval/samples")
    assert len(logged) == 1


def test_trackio_gets_the_table():
    """Its JSON has no infinity, and a chat is one cell. ``make trl`` runs wandb and trackio themselves."""
    logged = []
    callback = object.__new__(TrackioCallback)  # its constructor needs trackio
    callback._trackio = SimpleNamespace(Table=lambda **table: table, log=logged.append)
    callback._initialized = False
    row = ROW | {"prompt": [{"role": "user", "content": "é"}], "log_base": -math.inf}
    samples.send([callback], [row], 7, "eval/samples")
    assert not logged  # its run was not set up yet
    callback._initialized = True
    samples.send([callback], [row], 7, "eval/samples")
    (table,) = (each["eval/samples"] for each in logged)
    cells = dict(zip(table["columns"], table["data"][0], strict=True))
    assert cells["log_base"] is None and cells["prompt"] == '[{"role": "user", "content": "é"}]'
    assert cells["phi/w3"] == 1.0 and logged[0]["train/global_step"] == 7
