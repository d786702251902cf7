"""Test hidden states and head in the place of logits.

They give what logits give, for every head that is found to be plain. A head that is not plain is refused by name.
"""

from __future__ import annotations

import inspect
import re
import warnings

import peft
import pytest
import torch
import transformers
from exact_body import with_exact_body
from test_models import BOS, EOS, PAD, PROMPTS, V, architectures, build, check_gradients, close, gradients, lm, tok
from torch import nn
from transformers import LlamaForCausalLM

import dmfast
from dmfast.models import LanguageModel

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*gradient_checkpointing")

SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.4, "max_position_embeddings": 24, "bos_token_id": BOS,
    "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
HEADS = {
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 4},
    "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 4, "query_pre_attn_scalar": 4},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},  # its head has a bias
}


def other(family, **changes):
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **HEADS[family], **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).train()


def through_logits(policy):
    """Return the same policy, which may no longer use its head."""
    policy._head.failure = "a test"
    return policy


def compare_paths(build_model, hidden=True):
    found = []
    for path in (lambda policy: policy, through_logits):
        policy = path(LanguageModel(build_model(), tok()))
        x = policy.sample(PROMPTS, 4, max_new_tokens=6, temperature=1.2, seed=0)
        assert (policy.log_prob(x, batch_size=5) - x.log_prob).abs().max() < 1e-4
        log_prob = policy.log_prob(x)
        log_prob.sum().backward()
        grads = gradients(policy.model)
        out = policy.loss(
            x, log_target=x.log_prob + 0.3, log_proposal=x.log_prob - 0.2, log_z=0.1, return_entropy=True,
            chunk_bytes=999,
        )  # fmt: skip
        out.loss.backward()
        found.append((log_prob.detach(), grads, out, gradients(policy.model)))
        assert (policy._head.failure is None) == (hidden and path is not through_logits)
    (a, grads, out, loss_grads), (b, other_grads, other_out, other_loss_grads) = found
    close(a, b, 1e-6)
    close(out.entropy, other_out.entropy)
    close(out.weight, other_out.weight)
    check_gradients(grads, other_grads)
    check_gradients(loss_grads, other_loss_grads)


@pytest.mark.parametrize("family", HEADS)
def test_other_architectures_give_hidden_states_and_head(family):
    compare_paths(lambda: other(family))


@architectures
@pytest.mark.parametrize("how", ["", "checkpointing", "lora", "lora, embedding too"])
def test_hidden_states_and_head_give_what_logits_give(name, how):
    compare_paths(lambda: build(name, how))


@pytest.mark.parametrize("name", ["gpt2", "llama tied"])
def test_the_prompt_is_never_projected_and_no_logits_are_made(name, monkeypatch):
    policy = lm(name)
    x = policy.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    policy = LanguageModel(policy.model, policy.tokenizer, check_scores=False)
    k = x.tokens.shape[1] - x.prompt_len + 1
    shapes = []
    head = policy.model.get_output_embeddings()
    forward = nn.Linear.forward

    def spy(self, hidden):
        if self is head:
            shapes.append(tuple(hidden.shape[:2]))
        return forward(self, hidden)

    monkeypatch.setattr(nn.Linear, "forward", spy)
    for _ in range(3):
        found = policy.hidden_and_head(x)
        assert (found.hidden.shape, found.labels.shape) == ((len(x), k, 16), (len(x), k))
        assert found.weight is head.weight and found.hidden.requires_grad
    # The head multiplies a few rows once, to compare with, and none afterwards.
    assert shapes == [(2, 2), (1, 0), (1, 0)]
    assert not head._forward_pre_hooks


def test_a_forward_put_on_the_heads_instance_is_heeded():
    policy = lm("llama")
    x = policy.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    head = policy.model.get_output_embeddings()
    head.forward = lambda hidden: nn.functional.linear(hidden.double(), head.weight.double()) / 2
    with pytest.warns(UserWarning, match="head's forward was replaced"):
        found = policy.log_prob(x)
    logits = policy.model(input_ids=x.tokens[:1][x.attention_mask[:1].bool()][None]).logits
    assert logits.dtype == torch.float64
    n = int(x.score_mask[0].sum())
    labels = x.tokens[0][x.score_mask[0]]
    expected = logits[0, -n - 1 : -1].log_softmax(-1).gather(-1, labels[:, None]).sum()
    assert abs(float(found[0]) - float(expected)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*lower precision")
def test_hidden_states_under_autocast():
    policy = lm("llama")
    x = policy.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    forward = policy.model.forward

    def within(*args, **kwargs):  # accelerate wraps a forward like this
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    within.__signature__ = inspect.signature(forward)
    policy.model.forward = within
    log_prob = policy.log_prob(x)
    assert policy._head.verified
    log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.model.parameters())
    logits, labels = through_logits(policy).logits(x)
    assert logits.dtype == torch.bfloat16  # the head's own product rounds them, and the losses do not
    close(log_prob.detach(), dmfast.sequence_log_prob(logits, labels).detach(), 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_a_16_bit_head_is_multiplied_into_fp32_by_sampler_scorer_and_loss(name, dtype):
    policy = lm(name)
    with_exact_body(policy.model).to(dtype)
    x = policy.sample(PROMPTS, 16, max_new_tokens=6, seed=0)
    assert policy._head.rounds(policy.model)
    # The first step of the first call did not know the head yet.
    again = policy.sample(PROMPTS, 16, max_new_tokens=6, seed=0)
    assert torch.equal(x.tokens, again.tokens) and torch.equal(x.log_prob, again.log_prob)
    logits, labels = policy.logits(x)
    assert logits.dtype == torch.float32
    with torch.no_grad():
        scored = policy.log_prob(x)
        close(dmfast.sequence_log_prob(logits, labels), scored, 1e-4)
        out = policy.loss(x, log_target=x.log_prob, log_proposal=x.log_prob, log_z=0.0)
        assert torch.equal(out.log_prob, scored)
    rounded = through_logits(policy)
    drawn, labels = rounded.sample(PROMPTS, 16, max_new_tokens=6, seed=0), rounded.logits(x)[1]
    apart = (dmfast.sequence_log_prob(rounded.logits(x)[0], labels) - x.log_prob).std()
    assert (scored - x.log_prob).abs().max() < 1e-4 < apart
    assert (drawn.log_prob - x.log_prob).abs().max() > 0


def off_by(policy, x):
    with torch.no_grad():
        return float((policy.log_prob(x) - x.log_prob).abs().max())


def test_a_model_that_changes_its_dtype_is_asked_again():
    policy = lm("llama")
    with_exact_body(policy.model)
    policy.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    policy.model.to(torch.bfloat16)
    x = policy.sample(PROMPTS, 16, max_new_tokens=6, seed=0)
    assert policy._head.rounds(policy.model) and policy.logits(x)[0].dtype == torch.float32
    assert off_by(policy, x) < 1e-3
    policy.model.float()
    assert off_by(policy, policy.sample(PROMPTS, 16, max_new_tokens=6, seed=0)) < 1e-4
    assert not policy._head.rounds(policy.model)


def test_autocast_that_comes_later_is_noticed():
    policy = lm("llama")
    x = policy.sample(PROMPTS, 16, max_new_tokens=6, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert policy.logits(x)[0].dtype == torch.float32  # this is the first call under autocast
        x = policy.sample(PROMPTS, 16, max_new_tokens=6, seed=0)
        assert policy._head.rounds(policy.model) and policy._head.dtype == torch.bfloat16
        logits, labels = policy.logits(x)
        close(dmfast.sequence_log_prob(logits, labels).detach(), policy.log_prob(x).detach(), 1e-4)


def test_a_forbidden_token_hides_no_head():
    model = with_exact_body(other("Phi")).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.bias[5] = -float("inf")
    policy = LanguageModel(model, tok())
    x = policy.sample(PROMPTS, 16, max_new_tokens=6, seed=0)
    assert policy._head.verified and policy._head.rounds(model)
    assert off_by(policy, x) < 1e-3


def test_the_losses_take_the_models_logits_dtype():
    policy = lm("llama")
    x = policy.sample(PROMPTS, 2, max_new_tokens=4, seed=0)
    with pytest.raises(TypeError, match="logits_dtype is LanguageModel"):
        policy.loss(x, log_target=x.log_prob, log_z=0.0, logits_dtype="same")


def test_with_the_heads_own_dtype_all_three_round():
    model = lm("llama").model.to(torch.bfloat16)
    policy = LanguageModel(model, tok(), logits_dtype="same")
    x = policy.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    assert not policy._head.rounds(model) and policy._head.failure is None
    logits, labels = policy.logits(x)
    assert logits.dtype == torch.bfloat16
    close(dmfast.sequence_log_prob(logits, labels).detach(), policy.log_prob(x).detach(), 1e-6)
    with pytest.raises(ValueError, match="logits_dtype must be 'float32' or 'same', got 'bfloat16'"):
        LanguageModel(model, tok(), logits_dtype="bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_policy_with_a_16_bit_model_warns_once(dtype, recwarn):
    policy = lm("llama")
    policy.model.to(dtype)
    x = policy.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    for _ in range(2):
        policy.loss(x, log_target=x.log_prob, log_z=0.0, on_policy=True)
    said = [each for each in recwarn if "sets the importance ratio to 1" in str(each.message)]
    assert len(said) == (dtype == torch.bfloat16)
    assert all(each.filename == __file__ for each in said)


def heads_with_an_adapter(**options):
    config = peft.LoraConfig(init_lora_weights=False, **options)
    return peft.get_peft_model(build("llama"), config)


class Biased(LlamaForCausalLM):
    """Change the logits in a way that no config tells."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 0.1 * torch.arange(V)
        return out


class Halved(nn.Linear):
    """Act as a head of another kind, such as a quantised one."""

    def forward(self, x):
        return super().forward(x) / 2


def with_another_head():
    model = build("llama")
    model.lm_head.__class__ = Halved
    return model


def with_a_hook():
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out / 2)
    return model


REFUSED = {
    "lora on the head": (lambda: heads_with_an_adapter(target_modules=["q_proj", "lm_head"]), "peft.*not an nn.Linear"),
    "modules_to_save": (
        lambda: heads_with_an_adapter(target_modules=["q_proj"], modules_to_save=["lm_head"]), "not an nn.Linear",
    ),
    "another kind": (with_another_head, "Halved, not an nn.Linear"),
    "a hook": (with_a_hook, "has hooks"),
    "unknown processing": (lambda: Biased(build("llama").config), "differ by up to"),
    "a cap and a scale": (lambda: other("Gemma2", logit_scale=0.5), "scaled by 0.5 with a softcap of 3.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_heads_that_are_refused_go_through_logits_and_say_so_once(case):
    model, match = REFUSED[case]
    torch.manual_seed(1)
    policy = LanguageModel(model(), tok())
    x = policy.sample(PROMPTS, 3, max_new_tokens=5, seed=0)
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            policy.hidden_and_head(x)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        log_prob = policy.log_prob(x, batch_size=4)
        policy.loss(x, log_target=x.log_prob, log_proposal=x.log_prob, log_z=0.0).loss.backward()
    said = [w for w in warned if "forms all logits" in str(w.message)]
    assert [w.filename for w in said] == [__file__] and re.search(match, str(said[0].message))
    if case != "a cap and a scale":  # this model does not apply its scale
        assert (log_prob - x.log_prob).abs().max() < 1e-4


# --- one probe for each model -----------------------------------------------------------------------------------


def test_what_is_found_out_of_a_copy_says_nothing_of_the_model():
    """A snapshot and a wrapped policy start from what is known of the policy, and then find out for themselves."""
    policy = lm("llama")
    q, wrapped = dmfast.OfflineProposal(policy).snapshot, policy.around(policy.model)
    x = policy.sample(PROMPTS, 3, max_new_tokens=5, seed=0)
    policy.log_prob(x)
    assert [each._head.verified for each in (policy, q, wrapped)] == [True, False, False]
    assert policy.around(policy.model)._head.verified
    q.model.lm_head.register_forward_hook(lambda module, args, out: out)
    assert "has hooks" in q._head.why_not(q.model) and policy._head.why_not(policy.model) is None
    through_logits(wrapped)
    assert policy.hidden_and_head(x).weight is policy.model.lm_head.weight
    with pytest.raises(ValueError, match="a test; use logits"):
        wrapped.hidden_and_head(x)
