"""Test LanguageModel and Samples on tiny GPT-2 and Llama models.

The sampler must draw from exactly the distribution that the scorer scores, whatever the padding, the end token, the
dropout of the config or its generation_config. There are two references, and both are made here: tables of next-token
logits, where every probability is known, and each sequence run alone through the model, unpadded and in fp64.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import gpt2_weights  # noqa: F401
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import dmfast
import dmfast.cli
from dmfast.demo import about_women
from dmfast.kernels import checks, extension, select
from dmfast.models import LanguageModel, disable_dropout
from dmfast.training.recipe import TINY_BIOS, load

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*gradient_checkpointing")

INF = math.inf
# id 0 is an ordinary word here, and so are special tokens that a tokenizer does not declare
WORDS = ["w0", "w1", "w2", "w3", "w4", "<e>", "w5", "<p>", "w6", "<s>", "w7"]
V, EOS, PAD, BOS = len(WORDS), 5, 7, 9
TOKENIZERS = {
    "pad = eos": {"eos_token": "<e>", "pad_token": "<e>", "bos_token": "<s>"},
    "own pad": {"eos_token": "<e>", "pad_token": "<p>", "bos_token": "<s>"},
    "no pad": {"eos_token": "<e>", "bos_token": "<s>"},
    "no bos": {"eos_token": "<e>", "pad_token": "<p>"},
}
PROMPTS = ["w1 w2 w3 <e> w4", "", "w2 <p>", "w5"]
PROMPT_IDS = [[1, 2, 3, 5, 4], [], [2, 7], [6]]
MODELS = ["gpt2", "gpt2 eager attention", "llama", "llama tied"]
tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS)
architectures = pytest.mark.parametrize("name", MODELS)


def tok(name="own pad"):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **TOKENIZERS[name])


def pad_of(tokenizer):
    return PAD if tokenizer in ("own pad", "no bos") else EOS


def ids_of(prompts, tokenizer):
    """Return the prompts' tokens by hand. The empty prompt is BOS, or EOS where there is no BOS."""
    start = [EOS if tokenizer == "no bos" else BOS]
    return [start] if prompts is None else [ids or start for ids in PROMPT_IDS]


def build(name="gpt2", how=""):
    """Return a model in training mode with dropout, initialised so widely that every position and token matters."""
    torch.manual_seed(1)
    attention = "eager" if "eager" in name else "sdpa"
    if name.startswith("gpt2"):
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=V, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4, embd_pdrop=0.1,
                resid_pdrop=0.2, attn_pdrop=0.3, bos_token_id=BOS, eos_token_id=EOS, attn_implementation=attention,
            )
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=V, max_position_embeddings=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4, attention_dropout=0.2,
                tie_word_embeddings="tied" in name, bos_token_id=BOS, eos_token_id=EOS, attn_implementation=attention,
            )
        )  # fmt: skip
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    if how.startswith("lora"):
        layers = {"gpt2": ["c_attn", "c_proj"], "llam": ["q_proj", "v_proj", "down_proj"]}[name[:4]]
        extra = {}
        if how == "lora, embedding too":
            layers += {"gpt2": ["wte"], "llam": ["embed_tokens"]}[name[:4]]
        if how == "lora, new tokens":
            extra["trainable_token_indices"] = [1, PAD]
        config = peft.LoraConfig(target_modules=layers, lora_dropout=0.3, init_lora_weights=False, **extra)
        model = peft.get_peft_model(model, config)
    return model.train()


def lm(name="gpt2", tokenizer="own pad", how=""):
    return LanguageModel(build(name, how), tok(tokenizer))


def continuation(row, prompt_len, eos=(EOS,)):
    """Return the tokens after the prompt, up to and with the first EOS."""
    rest = row[prompt_len:]
    return rest[: next((i + 1 for i, token in enumerate(rest) if token in eos), len(rest))]


def check_layout(x, prompt_ids, n, max_new_tokens, pad, eos=(EOS,), one_batch=True):
    """Check tokens, masks, prompt_len and context_id against the rules, which need only a row's drawn tokens."""
    width = max(len(ids) for ids in prompt_ids)
    rest = x.tokens.shape[1] - width
    assert (len(x), x.prompt_len) == (len(prompt_ids) * n, width)
    assert x.tokens.dtype == x.context_id.dtype == torch.int64
    assert x.score_mask.dtype == torch.bool and x.log_prob.dtype == torch.float64
    longest = 0
    for i, row in enumerate(x.tokens.tolist()):
        ids, new = prompt_ids[i // n], len(continuation(row, width, eos))
        left, right = width - len(ids), rest - new
        assert row[:left] == [pad] * left and row[left:width] == ids
        assert x.attention_mask[i].tolist() == [0] * left + [1] * (len(ids) + new) + [0] * right
        assert x.score_mask[i].tolist() == [False] * width + [True] * new + [False] * right
        assert x.context_id[i] == i // n
        assert row[width + new :] == [pad] * right or not one_batch
        assert row[width + new - 1] in eos or new == max_new_tokens
        longest = max(longest, new)
    assert rest == longest <= max_new_tokens


def alone(model, x, prompt_ids, n, eos=(EOS,)):
    """Return log pi(x) of each sequence, from a plain forward of that sequence alone, without padding or a mask."""
    values = []
    for i, row in enumerate(x.tokens.tolist()):
        ids, new = prompt_ids[i // n], continuation(row, x.prompt_len, eos)
        logits = model(torch.tensor([ids + new])).logits[0].double() / x.temperature
        log_p = logits[len(ids) - 1 : -1].log_softmax(-1)
        values.append(log_p[torch.arange(len(new)), torch.tensor(new)].sum())
    return torch.stack(values)


def same(a, b):
    """Return whether two Samples are the same, bit for bit."""
    names = ("tokens", "attention_mask", "score_mask", "log_prob", "context_id")
    return a.prompt_len == b.prompt_len and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape and (a.double() - b.double()).abs().max() <= tolerance * b.abs().max().clamp(min=1)


def gradients(module):
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def check_gradients(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name in expected:
        assert (found[name].double() - expected[name].double()).abs().max() <= 1e-5 * largest, name


# --- q = pi -----------------------------------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize(
    ("how", "tokenizer"),
    [("", name) for name in TOKENIZERS] + [(how, "own pad") for how in ("batches", "checkpointing", "lora")],
)
def test_the_scorer_gives_what_the_sampler_stored_in_train_mode(name, tokenizer, how):
    policy, size = lm(name, tokenizer, how), 5 if how == "batches" else None
    ends = set()
    for prompts in (None, PROMPTS):
        prompt_ids, n = ids_of(prompts, tokenizer), 6
        for temperature in (0.7, 1.5):
            x = policy.sample(prompts, n, max_new_tokens=7, temperature=temperature, seed=3, batch_size=size)
            assert policy.model.training
            assert (policy.log_prob(x, batch_size=size) - x.log_prob).abs().max() < 1e-4
            check_layout(x, prompt_ids, n, 7, pad_of(tokenizer), one_batch=size is None)
            if temperature == 1.5:
                with torch.no_grad():
                    reference = alone(policy.model, x, prompt_ids, n)
                assert (reference - x.log_prob).abs().max() < 1e-4
            ends |= {bool(mask.all()) for mask in x.score_mask[:, x.prompt_len :]}
    assert ends == {True, False}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["lora, embedding too", "lora, new tokens"])
def test_adapters_on_the_embedding(name, how):
    policy = lm(name, how=how)
    x = policy.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    assert (policy.log_prob(x) - x.log_prob).abs().max() < 1e-4


def test_the_shipped_model():
    policy = load("tiny-bios")
    for module in policy.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    policy = LanguageModel(policy.model.train(), policy.tokenizer)
    for prompts, n in ((None, 48), (["Marie", "", "He was born in"], 12)):
        for temperature in (0.7, 1.0, 1.5):
            x = policy.sample(prompts, n, max_new_tokens=40, temperature=temperature, seed=0)
            assert (policy.log_prob(x) - x.log_prob).abs().max() < 1e-4
    texts = policy.sample(None, 256, max_new_tokens=48, seed=1, batch_size=128).text
    assert all(text.strip() and "<" not in text for text in texts)
    rate = json.loads((TINY_BIOS / "base_rates.json").read_text())["features"]["female"]["rate"]
    assert abs(about_women(texts).mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / 256)


# --- the sampler against known tables ---------------------------------------------------------------------------


class Table(nn.Module):
    """Be a Markov chain: logits[b, t] = table[input_ids[b, t]]. It ignores the cache."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace()
        self.embedding = nn.Embedding(*table.shape)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        assert attention_mask.shape[1] >= input_ids.shape[1] == position_ids.shape[1]
        return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:], past_key_values=None)


def chain(moves):
    """Return the table of ``moves``: {token: {next token: probability}}. A token that it lacks repeats itself."""
    p = torch.eye(V)
    for token, following in moves.items():
        p[token] = 0.0
        for to, probability in following.items():
            p[token, to] = probability
    return p.log()


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_draws_are_exact(temperature):
    table = 1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    table[:, [0, 4, V - 1]] = -INF  # these are never drawn: the first token, the last and one between
    table[BOS, EOS], table[1, 8] = -INF, 1.0
    table[2] = -INF  # this makes token 3 certain after token 2
    table[2, 3] = 5.0
    x = LanguageModel(Table(table), tok()).sample(
        None, 20_000, max_new_tokens=2, temperature=temperature, seed=11, batch_size=6_000
    )
    log_p = (table.double() / temperature).log_softmax(-1)
    first, second = x.tokens[:, 1], x.tokens[:, 2]
    assert (x.log_prob - log_p[BOS, first] - log_p[first, second]).abs().max() < 1e-6
    expected = 20_000 * (log_p[BOS][:, None] + log_p).exp()
    drawn = torch.bincount(first * V + second, minlength=V * V).view(V, V).double()
    assert drawn[expected == 0].sum() == 0
    often = expected >= 5
    expected = torch.cat([expected[often], 5 + expected[~often].sum()[None]])  # the rare pairs count together
    drawn = torch.cat([drawn[often], 5 + drawn[~often].sum()[None]])
    chi2, freedom = ((drawn - expected) ** 2 / expected).sum(), len(expected) - 1
    assert freedom > 25
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_uniform_draw_no_impossible_token(uniform, monkeypatch):
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    table[:, [0, 4, V - 1]] = -INF

    def at_the_end(logits, *, seed, row_ids, step, temperature):
        draws = checks.make_sample_rows(logits, seed, row_ids, step, temperature, None)
        return select(logits).sample(draws, torch.full(logits.shape[:1], uniform, dtype=torch.float64))[:2]

    monkeypatch.setattr(dmfast.models, "sample_tokens", at_the_end)
    x = LanguageModel(Table(table), tok()).sample(PROMPTS, 2, max_new_tokens=5, seed=0)
    assert x.log_prob.isfinite().all() and not torch.isin(x.tokens[x.score_mask], torch.tensor([0, 4, V - 1])).any()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_draw_depends_on_neither_batches_nor_the_order_of_calls(name):
    policy = lm(name)
    whole = policy.sample(PROMPTS, 6, max_new_tokens=7, seed=3)
    for size in (1, 5, 24, 100):
        x = policy.sample(PROMPTS, 6, max_new_tokens=7, seed=3, batch_size=size)
        assert torch.equal(x.tokens, whole.tokens) and torch.equal(x.score_mask, whole.score_mask)
        close(x.log_prob, whole.log_prob)
    assert not torch.equal(policy.sample(PROMPTS, 6, max_new_tokens=7, seed=4).tokens, whole.tokens)
    torch.manual_seed(0)
    first, second = (policy.sample(PROMPTS, 6, max_new_tokens=7) for _ in range(2))
    torch.manual_seed(0)
    assert same(first, policy.sample(PROMPTS, 6, max_new_tokens=7))
    assert first.tokens.shape != second.tokens.shape or not torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize("name", ["gpt2", "llama", "sliding window"])
def test_ended_rows_leave_the_batch_and_the_cache(name):
    if name == "sliding window":
        torch.manual_seed(1)
        config = MistralConfig(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4, initializer_range=0.4, max_position_embeddings=24,
        )  # fmt: skip
        model = MistralForCausalLM(config)
    else:
        model = build(name)
    policy = LanguageModel(model, tok(), check_scores=False)
    widths = []
    hook = policy.model.register_forward_pre_hook(
        lambda *args: widths.append(args[2]["input_ids"].shape[0]), with_kwargs=True
    )
    x = policy.sample(PROMPTS, 16, max_new_tokens=12, seed=0)
    hook.remove()
    alive = x.score_mask[:, x.prompt_len :].sum(0).tolist()
    assert widths[0] == len(PROMPTS), "sequences of one prompt share its forward"
    for width, now in zip(widths[1:], alive[1:], strict=True):
        assert now <= width and 0.75 * width < now, (widths, alive)
    assert widths[-1] < 48
    assert (policy.log_prob(x) - x.log_prob).abs().max() < 1e-4


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
def test_what_is_drawn_does_not_depend_on_whether_prompts_are_shared(name, cached):
    torch.manual_seed(0)
    model = build(name) if name != "mamba" else MambaForCausalLM(
        MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.4)
    )  # fmt: skip
    policy = LanguageModel(model, tok(), check_scores=False)
    widths = []
    policy.model.register_forward_pre_hook(lambda *args: widths.append(len(args[2]["input_ids"])), with_kwargs=True)
    # the first sample probes the model, so that no later one overrides what is set below
    policy.sample(PROMPTS, 1, max_new_tokens=2, seed=1)
    policy._guard.cached = cached
    found = []
    for shares in (True, False):
        widths.clear()
        policy._shares_prompts = shares
        found.append(policy.sample(["w1 w2 w3", "w4 w5 w6", "w1 w2 w3"], 5, max_new_tokens=6, seed=2))
        assert widths[0] == (2 if shares else 15)
        # transformers 5.0's Mamba has a state without rows that could be copied
        assert policy._shares_prompts == shares or (name == "mamba" and not policy._shares_prompts)
    assert torch.equal(found[0].tokens, found[1].tokens)
    close(found[0].log_prob, found[1].log_prob)


def test_prompts_are_not_shared_where_no_state_can_be_copied(monkeypatch):
    monkeypatch.setattr("dmfast.decoding._can_select", lambda *_: False)
    policy, truth = lm("gpt2"), lm("gpt2")
    truth._shares_prompts = False
    widths = []
    policy.model.register_forward_pre_hook(lambda *args: widths.append(len(args[2]["input_ids"])), with_kwargs=True)
    x, y = (each.sample(PROMPTS, 4, max_new_tokens=5, seed=2) for each in (policy, truth))
    assert torch.equal(x.tokens, y.tokens) and not policy._shares_prompts
    widths.clear()
    policy.sample(PROMPTS, 4, max_new_tokens=5, seed=2)
    assert set(widths) == {4 * len(PROMPTS)}, "known from the first call on"


@tokenizers
def test_masks_worked_by_hand(tokenizer):
    pad = pad_of(tokenizer)
    table = chain({1: {2: 1.0}, 2: {EOS: 1.0}, 4: {EOS: 1.0}, PAD: {0: 0.25, 1: 0.75}})
    x = LanguageModel(Table(table), tok(tokenizer)).sample(
        ["w1", "<e> <p> w4", "w3 <e> w0"], 1, max_new_tokens=4, seed=0
    )
    assert x.tokens.tolist() == [
        [pad, pad, 1, 2, EOS, pad, pad],
        [EOS, PAD, 4, EOS, pad, pad, pad],
        [3, EOS, 0, 0, 0, 0, 0],
    ]
    assert x.attention_mask.tolist() == [[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert x.score_mask.int().tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert (x.prompt_len, x.context_id.tolist(), x.log_prob.tolist()) == (3, [0, 1, 2], [0.0, 0.0, 0.0])
    assert x.text == ["w2", "", "w0 w0 w0 w0"]


def test_the_end_token_counts_and_what_follows_does_not():
    # <e> has a chance of 1/2; after <e> the chain would go on to w3 with a chance of 1/4
    model = LanguageModel(Table(chain({BOS: {1: 1.0}, 1: {EOS: 0.5, 1: 0.5}, EOS: {3: 0.25, EOS: 0.75}})), tok())
    x = model.sample(None, 200, max_new_tokens=5, seed=0)
    check_layout(x, [[BOS]], 200, 5, PAD)
    length = x.score_mask.sum(1)
    assert set(length.tolist()) == {2, 3, 4, 5}
    close(x.log_prob, math.log(0.5) * (length - 1).double(), 1e-7)
    close(model.log_prob(x).detach(), x.log_prob, 1e-6)


def test_the_width_shrinks_when_all_have_ended_and_ends_at_max_new_tokens_otherwise():
    short = LanguageModel(Table(chain({BOS: {1: 0.5, 2: 0.5}, 1: {EOS: 1.0}, 2: {EOS: 1.0}})), tok())
    assert short.sample(None, 50, max_new_tokens=20, seed=0).tokens.shape == (50, 3)
    endless = LanguageModel(Table(chain({BOS: {1: 0.5, 2: 0.5}})), tok())
    x = endless.sample(None, 50, max_new_tokens=20, seed=0)
    assert x.tokens.shape == (50, 21)
    assert x.score_mask[:, 1:].all() and x.attention_mask.all() and not (x.tokens == EOS).any()
    assert (x.log_prob - math.log(0.5)).abs().max() < 1e-7


@pytest.mark.parametrize("eos", [[EOS, 2, 3], (2,), 2])
def test_other_end_tokens(eos):
    policy = LanguageModel(build(), tok(), eos_token_id=eos)
    eos = (eos,) if isinstance(eos, int) else tuple(eos)
    for prompts in (None, PROMPTS):
        x = policy.sample(prompts, 8, max_new_tokens=8, seed=0)
        prompt_ids = ids_of(prompts, "own pad")
        check_layout(x, prompt_ids, 8, 8, PAD, eos)
        assert (policy.log_prob(x) - x.log_prob).abs().max() < 1e-4
        assert (alone(policy.model, x, prompt_ids, 8, eos) - x.log_prob).abs().max() < 1e-4


def test_padding_is_the_pad_token_also_between_batches():
    x = lm().sample(PROMPTS, 6, max_new_tokens=8, seed=0, batch_size=5)
    check_layout(x, ids_of(PROMPTS, "own pad"), 6, 8, PAD)


@architectures
def test_generation_config_has_no_effect(name):
    policy = lm(name)
    before = policy.sample(PROMPTS, 5, max_new_tokens=8, seed=7)
    policy.model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0, min_length=20, max_length=3,
        no_repeat_ngram_size=1, forced_bos_token_id=1, forced_eos_token_id=2, suppress_tokens=[3, 4, 8],
        bad_words_ids=[[10]], eos_token_id=1, pad_token_id=3, num_beams=3, stop_strings=["w"], max_time=1e-9,
        cache_implementation="static", prefill_chunk_size=1, token_healing=True, use_cache=False,
    )  # fmt: skip
    theirs = policy.model.generation_config
    assert same(before, policy.sample(PROMPTS, 5, max_new_tokens=8, seed=7))
    assert policy.model.generation_config is theirs
    policy.model.generation_config = None
    assert same(before, policy.sample(PROMPTS, 5, max_new_tokens=8, seed=7))


@pytest.mark.parametrize("how", ["", "lora"])
def test_sampling_runs_within_transformers_generate(how, monkeypatch):
    policy = lm(how=how)
    inner = policy.model.get_base_model() if how == "lora" else policy.model
    given, generate = [], type(inner).generate

    def spy(self, *args, **options):
        def loop(*inputs, **prepared):
            given.append(prepared)
            return options["custom_generate"](*inputs, **prepared)

        return generate(self, *args, **{**options, "custom_generate": loop})

    monkeypatch.setattr(type(inner), "generate", spy)
    caches = []
    name = "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"
    inner.register_forward_pre_hook(lambda _, __, options: caches.append(options.get(name)), with_kwargs=True)
    policy.sample(PROMPTS, 2, max_new_tokens=3, seed=0)
    assert len(given) == 1
    # the forwards that check the scores have no cache
    caches = [cache for cache in caches if cache is not None]
    made = given[0].get(name)  # transformers 5.0 lets the model make it
    assert caches
    assert made is None or all(cache is made for cache in caches)
    assert [type(rule).__name__ for rule in given[0]["stopping_criteria"]] == ["MaxLengthCriteria", "EosTokenCriteria"]


def test_seeds():
    policy = lm()

    def draw(seed=None, **more):
        return policy.sample(PROMPTS, 5, max_new_tokens=8, seed=seed, **more)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert same(draw(1), draw(1)) and same(draw(1, batch_size=7), draw(1, batch_size=7))
    assert not torch.equal(draw(1).tokens, draw(2).tokens)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = draw(), draw()
    assert not torch.equal(torch.get_rng_state(), state) and not same(first, second)
    torch.manual_seed(5)
    assert same(first, draw()) and same(second, draw())


# --- dropout and training mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how", "count"),
    [
        ("gpt2", "", 1 + 2 * 3),
        ("gpt2 eager attention", "", 1 + 2 * 3),
        ("llama", "", 2),
        # lora adds a dropout to c_attn and to both c_proj of each of the 2 layers
        ("gpt2", "lora", 1 + 2 * 3 + 2 * 3),
        ("llama", "lora", 2 + 2 * 3),
    ],
)
def test_dropout_is_off_in_training_mode(name, how, count):
    model, ids = build(name, how), torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert disable_dropout(model) == count
    assert disable_dropout(model) == 0
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    assert all(module.training for module in model.modules())
    assert torch.equal(model(ids).logits, model(ids).logits)
    again = build(name, how)
    policy = LanguageModel(again, tok())
    assert disable_dropout(again) == 0
    close(again(ids).logits, model(ids).logits)
    assert policy.model is again


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("how", ["", "checkpointing", "lora"])
def test_sampling_leaves_the_mode_of_every_module(mode, how):
    policy = lm(how=how)
    policy.model.train(mode)
    policy.sample(None, 2, max_new_tokens=3, seed=0)
    assert {module.training for module in policy.model.modules()} == {mode}


def test_sampling_leaves_a_submodule_in_its_own_mode():
    policy = lm()
    policy.model.transformer.h[0].eval()
    before = [module.training for module in policy.model.modules()]
    policy.sample(None, 2, max_new_tokens=3, seed=0)
    assert [module.training for module in policy.model.modules()] == before


def test_a_failing_forward_leaves_the_mode(monkeypatch):
    policy = lm()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy.model.transformer, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        policy.sample(None, 2, max_new_tokens=3)
    assert all(module.training for module in policy.model.modules())


# --- log_prob, logits and their gradients -----------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("how", ["", "checkpointing"])
def test_log_prob_has_the_gradient_of_plain_log_softmax(name, how):
    policy = lm(name, "pad = eos", how)
    prompt_ids = ids_of(PROMPTS, "pad = eos")
    x = policy.sample(PROMPTS, 4, max_new_tokens=8, temperature=1.3, seed=0)
    assert not x.log_prob.requires_grad
    weight = torch.randn(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(policy.model).double()
    expected = alone(reference, x, prompt_ids, 4)
    (weight * expected).sum().backward()
    expected_gradients = gradients(reference)
    assert len(expected_gradients) == len(list(policy.model.parameters()))
    for size in (None, 1, 5):
        log_prob = policy.log_prob(x, batch_size=size)
        close(log_prob.detach(), expected.detach())
        (weight * log_prob).sum().backward()
        check_gradients(gradients(policy.model), expected_gradients)
    with torch.no_grad():
        assert not policy.log_prob(x).requires_grad


def test_log_prob_is_of_this_model_and_at_the_temperature_of_the_samples():
    policy, other = lm(), lm("llama")
    x = policy.sample(PROMPTS, 4, max_new_tokens=8, temperature=0.8, seed=0)
    prompt_ids = ids_of(PROMPTS, "own pad")
    assert (other.log_prob(x) - alone(other.model, x, prompt_ids, 4)).abs().max() < 1e-4
    hot = dataclasses.replace(x, temperature=2.0)
    assert (policy.log_prob(hot) - alone(policy.model, hot, prompt_ids, 4)).abs().max() < 1e-4


class AllLogits(nn.Module):
    """Be a model that always returns the logits of the prompt too."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.get_input_embeddings = model, model.config, model.get_input_embeddings

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, use_cache=False):
        return self.inner(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache,
        )  # fmt: skip


@architectures
def test_logits_with_and_without_those_of_the_prompt(name):
    keeps = lm(name)
    alls = LanguageModel(AllLogits(keeps.model), tok())
    x = keeps.sample(PROMPTS, 4, max_new_tokens=8, seed=0)
    full = alls.sample(PROMPTS, 4, max_new_tokens=8, seed=0)
    assert torch.equal(x.tokens, full.tokens)
    close(x.log_prob, full.log_prob, 1e-6)
    (logits, labels), (all_logits, all_labels) = keeps.logits(x), alls.logits(x)
    k = x.tokens.shape[1] - x.prompt_len + 1
    assert (logits.shape, all_logits.shape) == ((len(x), k, V), (len(x), x.tokens.shape[1], V))
    assert torch.equal(labels, all_labels[:, -k:]) and (all_labels[:, :-k] == -100).all()
    assert torch.equal(labels[:, :-1], torch.where(x.score_mask, x.tokens, -100)[:, x.prompt_len :])
    assert (labels[:, -1] == -100).all()
    close(logits[labels >= 0], all_logits[all_labels >= 0])
    found = []
    for model in (keeps, alls):
        log_prob = model.log_prob(x)
        log_prob.sum().backward()
        found.append((log_prob.detach(), gradients(keeps.model)))
    close(found[0][0], found[1][0])
    check_gradients(found[0][1], found[1][1])


@architectures
@pytest.mark.parametrize("how", ["", "checkpointing", "lora"])
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_dm_loss_in_place_through_the_model(name, how, objective):
    policy = lm(name, how=how)
    x = policy.sample(PROMPTS, 4, max_new_tokens=8, seed=0)
    noise = torch.randn(2, len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = {"log_target": x.log_prob + noise[0], "log_proposal": x.log_prob + 0.1 * noise[1], "log_z": 0.3}
    found = []
    for dm_loss, more in ((dmfast.dm_loss, {"inplace": True}), (dmfast.eager.dm_loss, {})):
        out = dm_loss(*policy.logits(x), objective=objective, **inputs, **more)
        out.loss.backward()
        found.append((out.loss.detach(), gradients(policy.model)))
    close(found[0][0], found[1][0])
    assert found[1][1]
    check_gradients(found[0][1], found[1][1])


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"prompts": "w1 w2"}, TypeError, "list of strings.*'w1 w2'"),
        ({"prompts": []}, ValueError, "prompt"),
        ({"n": 0}, ValueError, "n must be an integer, 1 or more, got 0"),
        ({"n": -3}, ValueError, "1 or more, got -3"),
        ({"n": 2.5}, ValueError, "n must be an integer, 1 or more, got 2.5"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"temperature": "1"}, ValueError, "temperature must be a number, positive and finite, got '1'"),
        ({"max_new_tokens": [3]}, ValueError, r"max_new_tokens must be an integer, 1 or more, got \[3\]"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": INF}, ValueError, "temperature"),
        ({"batch_size": -1}, ValueError, "batch_size"),
        ({"batch_size": 2.0}, ValueError, "batch_size must be an integer, 1 or more, got 2.0"),
        ({"prompts": ["w1", "w1 " * 30]}, ValueError, "30 tokens.*context of 24"),
        ({"max_new_tokens": 24}, ValueError, "context of 24"),
        ({"prompts": ["w1", "w1 " * 17]}, ValueError, "context of 24"),
    ],
)
def test_sample_refuses(more, error, match):
    policy = lm()
    with pytest.raises(error, match=match):
        policy.sample(**{"max_new_tokens": 8, "seed": 0, **more})
    assert policy.model.training


def test_a_prompt_that_just_fits():
    policy = lm()
    assert policy.sample(["w1 " * 16], 3, max_new_tokens=8, seed=0).prompt_len == 16


def test_language_model_refuses_models_and_tokenizers_that_do_not_fit():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="decoder-only"):
        LanguageModel(t5, tok())
    words = tok("no bos")
    words.eos_token = None
    endless = build()
    endless.config.eos_token_id = endless.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos"):
        LanguageModel(endless, words)
    assert LanguageModel(build(), words, eos_token_id=EOS).eos_token_ids == [EOS]
    with pytest.raises(ValueError, match="eos"):
        LanguageModel(build(), tok(), eos_token_id=[])
    prompted = peft.get_peft_model(build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt-learning"):
        LanguageModel(prompted, tok())


@pytest.mark.parametrize(
    ("tokens", "prompts", "match"),
    [
        ({"eos_token": "w1", "pad_token": "w0"}, ["w1", "w7 w2"], "token 10.*9 embeddings"),
        ({"eos_token": "w1", "pad_token": "w0", "bos_token": "w7"}, None, "token 10.*9 embeddings"),
        ({"eos_token": "w1", "pad_token": "<s>"}, ["w1 w2", "w2"], "pad_token_id is 9.*9 embeddings"),
        # padding is needed once a sequence has ended
        ({"eos_token": "w1", "pad_token": "<s>"}, None, "9 embeddings"),
        # without an end token in the embedding no sequence would end
        ({"eos_token": "<s>", "pad_token": "w0", "bos_token": "w1"}, None, "9 embeddings"),
    ],
    ids=["prompt", "bos", "pad in a prompt", "pad", "eos"],
)
def test_token_ids_beyond_the_embedding(tokens, prompts, match):
    model = build()
    model.resize_token_embeddings(9)
    words = PreTrainedTokenizerFast(tokenizer_object=tok().backend_tokenizer, **tokens)

    def attempt():
        LanguageModel(model, words).sample(prompts, 20, max_new_tokens=8, seed=0)

    with pytest.raises(ValueError, match=match):
        attempt()


def test_nan_in_the_models_logits_is_a_clear_error():
    policy = lm()
    with torch.no_grad():
        policy.model.transformer.wte.weight[3] = math.nan
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)\bnan\b"):
        policy.sample(["w1"], 4, max_new_tokens=3, seed=0)


def test_logits_that_a_device_has_recorded_as_bad_are_an_error_at_the_end(monkeypatch):
    """A GPU does not stop at NaN: it writes token 0 and a log-probability of NaN, and goes on."""
    draw = dmfast.models.sample_tokens

    def recording(logits, *, row_ids, step, **options):
        tokens, log_prob = draw(logits, row_ids=row_ids, step=step, **options)
        bad = (row_ids == 13) & (step == 1)
        return torch.where(bad, 0, tokens), torch.where(bad, math.nan, log_prob)

    monkeypatch.setattr(dmfast.models, "sample_tokens", recording)
    for size in (None, 5):
        with pytest.raises(ValueError, match=r"hold NaN .* in 1 of 24 sequences, first in sequence 13"):
            lm().sample(PROMPTS, 6, max_new_tokens=5, seed=2, batch_size=size)


# --- the loss ---------------------------------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("how", ["", "checkpointing", "lora"])
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_loss_is_dm_loss_on_each_sequence_alone(name, how, objective):
    policy = lm(name, how=how)
    x = policy.sample(PROMPTS, 3, max_new_tokens=6, temperature=1.3, seed=4)
    generator = torch.Generator().manual_seed(2)
    terms = {"log_target": x.log_prob + torch.randn(len(x), generator=generator).double(), "log_z": 0.3}
    out = policy.loss(x, log_proposal=x.log_prob - 0.2, objective=objective, num_sequences=20, **terms)
    out.loss.backward()
    found = gradients(policy.model)
    log_pi = alone(policy.model, x, ids_of(PROMPTS, "own pad"), 3)
    weight = (terms["log_target"] - terms["log_z"] - x.log_prob + 0.2).exp()
    if objective == "gdc++":
        weight = weight - (log_pi.detach() - x.log_prob + 0.2).exp()
    close(out.weight, weight, 1e-4)
    loss = -(weight * log_pi).sum() / 20
    loss.backward()
    close(out.loss.detach(), loss.detach())
    check_gradients(found, gradients(policy.model))


# --- the offline proposal, the loop, the commands ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama tied"])
@pytest.mark.parametrize("how", ["", "lora", "checkpointing"])
def test_offline_proposal_of_a_language_model(name, how):
    policy = lm(name, how=how)
    proposal = dmfast.OfflineProposal(policy, interval=1)
    q = proposal.snapshot
    assert isinstance(q, LanguageModel) and q.model is not policy.model and q.tokenizer is policy.tokenizer

    def memory(model):
        return {t.data_ptr() for t in (*model.parameters(), *model.buffers())}

    assert not memory(policy.model) & memory(q.model)
    assert not any(p.requires_grad for p in q.model.parameters())
    assert any(p.requires_grad for p in policy.model.parameters())
    x, of_policy = (model.sample(PROMPTS, 4, max_new_tokens=8, seed=0) for model in (q, policy))
    assert torch.equal(x.tokens, of_policy.tokens)
    close(x.log_prob, of_policy.log_prob)
    before = proposal.state_dict()
    with torch.no_grad():
        # these are the parameters that training moves and that a state holds
        for p in (p for p in policy.model.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    assert torch.equal(q.log_prob(x), q.log_prob(x)) and (q.log_prob(x) - x.log_prob).abs().max() < 1e-4
    assert (policy.log_prob(x) - q.log_prob(x)).abs().max() > 0.01
    proposal.swap()
    assert proposal.snapshot is q and not memory(policy.model) & memory(q.model)
    close(policy.log_prob(x), q.log_prob(x))
    drawn, of_policy = (model.sample(None, 9, max_new_tokens=8, seed=1) for model in (q, policy))
    assert torch.equal(drawn.tokens, of_policy.tokens)

    after = proposal.state_dict()
    proposal.load_state_dict(before)
    assert proposal.swaps == 0 and same(x, q.sample(PROMPTS, 4, max_new_tokens=8, seed=0))
    fresh = dmfast.OfflineProposal(lm(name, how=how), interval=1)
    fresh.load_state_dict(after)
    assert fresh.swaps == 1
    close(fresh.snapshot.log_prob(x), policy.log_prob(x))


def test_doctor_into_a_pipe_that_closes():
    command = f"{sys.executable} -c 'import sys; from dmfast.cli import main; sys.exit(main())' doctor | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("dmfast ") and "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_sources_without_kernels_in_the_place_of_the_installation(monkeypatch, tmp_path):
    """The working directory is a clone, and the installation comes later on the path."""
    (tmp_path / "dmfast").mkdir()
    (tmp_path / "dmfast" / "_C.abi3.so").touch()
    monkeypatch.setattr(extension, "_C", None)
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "clone" / "dmfast" / "kernels" / "extension.py"))
    (tmp_path / "clone" / "csrc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    why = extension.why_not()
    assert f"imported from {tmp_path / 'clone' / 'dmfast'}" in why
    assert f"the installation in {tmp_path / 'dmfast'}" in why
    # now this is an installation without kernels, and another installation lies beside it
    (tmp_path / "clone" / "csrc").rmdir()
    assert "installed without its compiled kernels" in extension.why_not()
    (tmp_path / "clone" / "csrc").mkdir()
    monkeypatch.setattr(sys, "path", [""])
    assert "installed without its compiled kernels" in extension.why_not()


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        dmfast.cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"dmfast {dmfast.__version__}\n"


def test_doctor(capsys):
    assert dmfast.cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"dmfast {dmfast.__version__}" in printed and f"torch {torch.__version__}" in printed
    for info in dmfast.backends().values():
        assert f"{info.name} " in printed and info.detail in printed
    assert "in use" in printed and "transformers" in printed


def test_import_is_lean(tmp_path):
    heavy = ("transformers", "triton", "matplotlib", "rich", "datasets", "packaging", "trl", "verl", "wandb", "trackio")
    code = f"import sys, dmfast; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_a_token_below_0_and_no_samples_at_all():
    policy = lm()
    with pytest.raises(ValueError, match="prompt 1 holds token -1"):
        policy.sample([[1, 2, 3], [1, -1]], 2, max_new_tokens=2, seed=0)
    none = policy.sample(None, 2, max_new_tokens=2, seed=0)[:0]
    with pytest.raises(ValueError, match="samples is empty"):
        policy.loss(none, log_target=torch.zeros(0), log_z=0.0)
