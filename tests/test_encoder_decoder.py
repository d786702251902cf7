"""Test encoder-decoder models through their logits and dm_loss, with the functions of examples/encoder_decoder.py.

The models are a random T5 and a random BART in fp64. With all sequences of up to three tokens, probabilities, Z of each
context and the gradient of E_c KL(p_c||pi_c) are sums. The tests compare what generate() draws with what the model's
own loss and decoding token by token say of it. They also hold the convention of labels, and show what goes wrong
without it.
"""

from __future__ import annotations

import copy
import math

import encoder_decoder
import pytest
import torch
from encoder_decoder import draw, logits_of, sample_plainly
from tabular import one_thread  # noqa: F401
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import dmfast
from dmfast.functional import sample_tokens

V, T, PAD = 6, 3, {"t5": 0, "bart": 1}
SOURCES = [[3, 4, 5, 4], [5], [4, 3]]
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


def build(name, dtype=torch.float64, vocab_size=V):
    torch.manual_seed(1)
    if name == "t5":
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.1,
                     initializer_factor=1.0, decoder_start_token_id=0)
        )  # fmt: skip
    else:
        model = BartForConditionalGeneration(
            BartConfig(vocab_size=vocab_size, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                       decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
                       init_std=0.3)
        )  # fmt: skip
        model.final_logits_bias.copy_(torch.randn(1, vocab_size))
    dmfast.models.disable_dropout(model)
    return model.to(dtype)


@pytest.fixture(params=PAD)
def name(request):
    return request.param


def inputs_of(name, sources=SOURCES, n=1):
    width = max(map(len, sources))
    tokens = torch.tensor([row + [PAD[name]] * (width - len(row)) for row in sources])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sources])
    return {"input_ids": tokens.repeat_interleave(n, 0), "attention_mask": mask.repeat_interleave(n, 0)}


def everything(eos):
    """Return labels of all sequences that end in EOS or at T tokens, (S, T), -100 after EOS."""
    rows = torch.cartesian_prod(*[torch.arange(V)] * T)
    end = rows == eos
    return rows.masked_fill(end.cumsum(1) - end.long() > 0, -100).unique(dim=0)


def everywhere(name, model):
    """Return inputs and labels of all sequences for every source, (C S, ...), and the indices of the sources."""
    labels = everything(model.config.eos_token_id)
    context = torch.arange(len(SOURCES)).repeat_interleave(len(labels))
    return inputs_of(name, n=len(labels)), labels.repeat(len(SOURCES), 1), context


def by_hand(model, source, labels):
    """Return log pi of one sequence. The decoder reads its start token and the tokens so far, one step at a time."""
    inputs, read, total = {"input_ids": torch.tensor([source])}, [model.config.decoder_start_token_id], 0.0
    for token in labels.tolist():
        if token == -100:
            break
        logits = model(**inputs, decoder_input_ids=torch.tensor([read])).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        read.append(token)
    return total


@torch.no_grad()
def test_log_prob_sums_to_one_and_is_that_of_decoding_token_by_token(name):
    """Padded sources of different lengths are right. EOS and a drawn pad token count, and what follows EOS does not."""
    model = build(name)
    inputs, labels, context = everywhere(name, model)
    log_prob = dmfast.sequence_log_prob(logits_of(model, inputs, labels), labels)
    totals = torch.zeros(len(SOURCES), dtype=torch.float64).index_add_(0, context, log_prob.exp())
    torch.testing.assert_close(totals, torch.ones_like(totals), rtol=0, atol=1e-12)
    for row in range(0, len(labels), 29):
        wanted = by_hand(model, SOURCES[context[row]], labels[row])
        assert float(log_prob[row]) == pytest.approx(wanted, abs=1e-11), (SOURCES[context[row]], labels[row].tolist())
    in_fp32 = dmfast.sequence_log_prob(logits_of(build(name, torch.float32), inputs, labels), labels)
    torch.testing.assert_close(in_fp32, log_prob, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["pads not scored", "labels shifted again"])
def test_other_conventions_are_no_distribution(name, wrong):
    model = build(name)
    inputs, labels, context = everywhere(name, model)
    logits = logits_of(model, inputs, labels)
    if wrong == "pads not scored":
        labels = labels.masked_fill(labels == PAD[name], -100)
    else:
        labels = dmfast.shift_labels(labels)
    totals = torch.zeros(len(SOURCES), dtype=torch.float64)
    totals.index_add_(0, context, dmfast.sequence_log_prob(logits, labels).exp())
    assert bool((totals > 1.1).all())


@torch.no_grad()
def test_the_model_s_own_loss_agrees(name):
    """transformers' cross-entropy is a mean over tokens, from logits that it aligns itself."""
    model = build(name)
    inputs, labels, _ = everywhere(name, model)
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.logits, logits_of(model, inputs, labels), rtol=0, atol=0)
    total = dmfast.sequence_log_prob(out.logits, labels).sum()
    torch.testing.assert_close(-out.loss * (labels != -100).sum(), total, rtol=1e-12, atol=0)


def shares(model, inputs, n):
    """Return how often generate() draws each of all sequences for a source, (S,)."""
    labels = everything(model.config.eos_token_id)
    torch.manual_seed(0)
    drawn = draw(model, {key: value.expand(n, -1) for key, value in inputs.items()}, T)
    drawn = torch.nn.functional.pad(drawn, (0, T - drawn.shape[1]), value=-100)
    return (drawn[:, None] == labels).all(2).sum(0)


@torch.no_grad()
def test_generate_draws_what_is_scored(name):
    """Pearson's statistic of 20,000 draws is within 5 standard deviations of what the exact probabilities predict."""
    model, n = build(name), 20_000
    sample_plainly(model)
    inputs = inputs_of(name, SOURCES[:1])
    counts, labels = shares(model, inputs, n), everything(model.config.eos_token_id)
    assert int(counts.sum()) == n
    p = dmfast.sequence_log_prob(logits_of(model, inputs_of(name, SOURCES[:1], len(labels)), labels), labels).exp()
    often = n * p > 5
    statistic = float(((counts - n * p) ** 2 / (n * p))[often].sum())
    freedom = int(often.sum()) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom), (statistic, freedom)


@torch.no_grad()
def test_bart_s_own_generation_config_ends_what_the_model_would_not():
    """BART forces EOS at the last token. An argument of None does not undo that, because it is filled in again."""
    model, n = build("bart"), 2000
    inputs = inputs_of("bart", SOURCES[:1])
    labels = everything(2)
    unfinished = (labels != 2).all(1)
    p = dmfast.sequence_log_prob(logits_of(model, inputs_of("bart", SOURCES[:1], len(labels)), labels), labels).exp()
    share = float(p[unfinished].sum())
    assert share > 0.1
    model.generation_config.update(do_sample=True, top_k=0, forced_eos_token_id=2)
    assert int(shares(model, inputs, n)[unfinished].sum()) == 0
    plain = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=T, forced_eos_token_id=None)
    rows = model.generate(**{key: value.expand(n, -1) for key, value in inputs.items()}, generation_config=plain)
    assert bool((rows[:, 1:] == 2).any(1).all())
    sample_plainly(model)
    assert abs(float(shares(model, inputs, n)[unfinished].sum()) / n - share) < 5 * math.sqrt(share * (1 - share) / n)


@torch.no_grad()
def test_generate_without_top_k_takes_50():
    model, inputs = build("t5", vocab_size=200), inputs_of("t5", [[3]], 2000)
    model.lm_head.weight.mul_(0.1)  # the distribution is nearly flat now
    torch.manual_seed(0)
    assert draw(model, inputs, 1).unique().numel() == 1  # decoding is greedy by the model's own config
    model.generation_config.update(do_sample=True)
    assert draw(model, inputs, 1).unique().numel() <= 50
    sample_plainly(model)
    assert draw(model, inputs, 1).unique().numel() > 100


@torch.no_grad()
def test_generate_s_own_log_probabilities(name):
    """The log-probabilities are those of its decoding with a KV cache, summed up to EOS."""
    model = build(name)
    sample_plainly(model)
    torch.manual_seed(0)
    inputs = inputs_of(name, n=20)
    out = model.generate(**inputs, max_new_tokens=T, return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(0)
    labels = draw(model, inputs, T)
    stepwise = torch.stack(out.logits, 1).double().log_softmax(-1)  # generate keeps them in fp32
    scored = labels != -100
    wanted = (stepwise.gather(2, labels.clamp(min=0)[..., None])[..., 0] * scored).sum(1)
    found = dmfast.sequence_log_prob(logits_of(model, inputs, labels), labels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not bool(scored.all()) and bool((labels == PAD[name]).any())


@torch.no_grad()
def test_sample_tokens_draws_with_log_q(name):
    """In a custom loop, the log-probabilities of the draws are those of the scorer."""
    model = build(name, torch.float32)
    inputs, eos = inputs_of(name, n=20), model.config.eos_token_id
    encoded = model.get_encoder()(**inputs)
    read = torch.full((60, 1), model.config.decoder_start_token_id)
    labels, log_q, alive = torch.full((60, T), -100), torch.zeros(60, dtype=torch.float64), torch.ones(60).bool()
    for step in range(T):
        logits = model(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], decoder_input_ids=read).logits
        drawn, log_drawn = sample_tokens(logits[:, -1], seed=0, step=step)
        log_q += torch.where(alive, log_drawn, 0.0)
        labels[:, step] = torch.where(alive, drawn, -100)
        alive &= drawn != eos
        read = torch.cat([read, drawn[:, None]], 1)
    found = dmfast.sequence_log_prob(logits_of(model, inputs, labels), labels)
    torch.testing.assert_close(found, log_q, rtol=0, atol=1e-4)
    assert 0 < int(alive.sum()) < 60


def a_target(model, inputs, labels, context):
    """Return log P of each sequence, log Z of its context, and p.

    P(x|c) is a(x|c) b(x, c), where b is 0 for about a third of the sequences.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        log_a = dmfast.eager.sequence_log_prob(logits_of(model, inputs, labels), labels)
    b = 3 * torch.rand(len(labels), generator=generator, dtype=torch.float64) * (1 + context)
    b[torch.rand(len(labels), generator=generator) < 0.35] = 0
    log_target = log_a + b.log()
    z = torch.zeros(len(SOURCES), dtype=torch.float64).index_add_(0, context, log_target.exp())
    assert float(z.max() / z.min()) > 1.5
    return log_target, z.log()[context], log_target.exp() / z[context]


def moved(model, seed):
    """Return a model that differs from the given one, because pi and q are not a."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys() and found
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("objective", ["dpg", "gdc++"])
def test_the_expected_gradient_is_that_of_the_mean_kl(name, objective):
    """It is the gradient of E_c KL(p_c||pi_c), which autograd takes from the sum over all sequences.

    dm_loss gets all sequences, each as often as q draws it. The softmax within T5's attention and its backward are in
    fp32 whatever the model's dtype is.
    """
    base = build(name)
    inputs, labels, context = everywhere(name, base)
    log_target, log_z, p = a_target(base, inputs, labels, context)
    policy = moved(base, 5)
    log_pi = logits_of(policy, inputs, labels).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    log_pi = (log_pi * (labels != -100)).sum(1)
    (-(p * log_pi).sum() / len(SOURCES)).backward()
    wanted = gradients(policy)
    for dtype, tolerance in ((torch.float64, {"t5": 1e-6, "bart": 1e-11}[name]), (torch.float32, 2e-5)):
        policy = moved(base, 5).to(dtype)
        with torch.no_grad():
            log_q = dmfast.eager.sequence_log_prob(logits_of(moved(base, 6), inputs, labels), labels)
        out = dmfast.dm_loss(logits_of(policy, inputs, labels), labels, log_target=log_target, log_proposal=log_q,
                             log_z=log_z, objective=objective, reduction="none")  # fmt: skip
        (out.loss @ log_q.exp() / len(SOURCES)).backward()
        assert_close(gradients(policy), wanted, tolerance)


@pytest.mark.parametrize("objective", ["gdc++", "dpg", "js"])
def test_gradient_of_a_batch_is_the_oracle_s(name, objective):
    """The kernels on fp32 logits, in place, give what plain torch gives in fp64."""
    base = build(name)
    inputs, labels, context = everywhere(name, base)
    log_target, log_z, _ = a_target(base, inputs, labels, context)
    some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:40]
    inputs, labels = {key: value[some] for key, value in inputs.items()}, labels[some]
    with torch.no_grad():
        log_q = dmfast.sequence_log_prob(logits_of(moved(base, 6), inputs, labels), labels)
    values = {"log_target": log_target[some], "log_proposal": log_q, "log_z": log_z[some], "objective": objective}
    exact, policy = moved(base, 5), moved(base, 5).float()
    dmfast.eager.dm_loss(logits_of(exact, inputs, labels), labels, **values).loss.backward()
    dmfast.dm_loss(logits_of(policy, inputs, labels), labels, inplace=True, **values).loss.backward()
    assert_close(gradients(policy), gradients(exact), 2e-5)


def test_the_example_runs(monkeypatch, capsys):
    """KL(p||a) is -log Z of each context, by two different sums. The training steps make KL smaller."""
    small = "--pretraining 60 --steps 6 --contexts 6 --per-step 6 --samples 16"
    monkeypatch.setattr("sys.argv", ["encoder_decoder.py", *small.split()])
    found = encoder_decoder.main()
    torch.testing.assert_close(found["before"], -found["log_z"], rtol=1e-9, atol=1e-9)
    assert float(found["after"].mean()) < float(found["before"].mean())
    assert "Z: exact, found" in capsys.readouterr().out
