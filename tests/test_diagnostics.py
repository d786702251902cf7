"""Diversity against nltk's plain results and by hand; the variance of gradients against torch.func and closed forms."""

from __future__ import annotations

import concurrent.futures
import copy
import random
import sys
import threading

import peft
import pytest
import torch
from nltk.tokenize import wordpunct_tokenize
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from trainer_job import gpt2, tokenizer

import dmfast
from dmfast.diagnostics import distinct_n, gradient_variance, self_bleu, spread, weight_statistics


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    """Of texts with repeated words, ties, duplicates, one too short, one alone in its words, an empty one."""
    rng = random.Random(n)
    some = [" ".join(rng.choices("abcdef", [8, 4, 2, 1, 1, 1], k=rng.randint(1, 15))) for _ in range(40)]
    texts = [*some, some[0], "a", "xyzzy plugh", "", "a a a a a a a a. a a a a a a a a a a a a a a"]
    assert self_bleu(texts, n) == pytest.approx(plain_self_bleu(texts, n), abs=1e-12)


def test_self_bleu_at_its_ends():
    assert self_bleu(["one and the same text"] * 3) == pytest.approx(1, abs=1e-12)
    assert self_bleu(["nothing in common", "here are other words"]) == 0
    assert self_bleu(["dog", "god"], 1) == 0  # words, not letters, as they are in gdc's code


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
    """Also where it is 1e-8 of the squared mean; with gradients of 0 that are left out, and over ranks."""
    torch.manual_seed(0)
    g = torch.randn(12, 7, dtype=torch.float64) + offset
    g[[2, 7]] = 0
    g[:, 5:] = 0  # None in its place below
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
            assert found.mean_square == pytest.approx(float(g.square().sum(1).mean()), rel=1e-9)


def drawn(model, n=9):
    policy = dmfast.LanguageModel(model, tokenizer())
    x = policy.sample(["w1 w2", "w3", "w4 w5 w6"], n // 3, max_new_tokens=6, seed=1)
    torch.manual_seed(5)
    weight = torch.randn(n).double()
    weight[4] = 0
    return policy, x, weight


def per_sequence(policy, x, weight, names):
    """(N, parameters) fp64, by torch.func.vmap over a plain forward of the model."""
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
        log_p = logits.log_softmax(-1).gather(1, labels[1:, None].clamp(min=0))[:, 0]
        return -weight * (log_p * (labels[1:] != -100)).sum()

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
