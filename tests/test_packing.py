"""Test that sequences which lie end to end in a row get the scores and the gradient that they get padded and alone.

Models that can't tell such sequences apart are found by asking them.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dmfast import LanguageModel
from dmfast.packing import Costs, arrange, costs_of, pack

V, ENDS, PROMPTS = 41, [0, 2, 3, 4, 5], [[7, 8, 9], [14, 15, 16, 17, 18]]
SMALL = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {**SMALL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**LLAMA | options))


class Mixing(LlamaForCausalLM):
    """Be a model that lets all tokens of a row see each other, whatever their positions are."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return super().forward(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, **more)


MODELS = {
    "llama": llama,
    "tied gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
    "gemma2 with a window": lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA, head_dim=16, sliding_window=8)),
    "lora": lambda: peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)),
}


def policy(model: Any, **options: Any) -> LanguageModel:
    words = Tokenizer(models.WordLevel({"<e>": 0, "w": 1}, unk_token="w"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>")
    return LanguageModel(model, tokenizer, eos_token_id=ENDS, **options)


@pytest.fixture
def shapes() -> Any:
    """Return the shapes of the batches that a model embeds."""

    def watch(lm: LanguageModel) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []
        lm._unwrapped().get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
        return seen

    return watch


def scored(lm: LanguageModel, x: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return log pi, and the gradient of a sum of it with different weights."""
    lm.model.zero_grad()
    log_prob = lm.log_prob(x)
    (log_prob * torch.linspace(-1, 1, len(x))).sum().backward()
    grads = {name: each.grad.clone() for name, each in lm.model.named_parameters() if each.grad is not None}
    return log_prob.detach(), grads


@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_have_the_probability_and_the_gradient_of_padded_ones(name: str, shapes: Any) -> None:
    torch.manual_seed(0)
    lm = policy(MODELS[name]())
    x = lm.sample(PROMPTS, 12, max_new_tokens=24, seed=1)
    seen = shapes(lm)
    packed, gradient = scored(lm, x)
    (rows, width), = seen  # fmt: skip
    assert lm.why_padded is None and rows <= len(x) // 2 and rows * width < 0.8 * x.tokens.numel()
    lm.packs = False
    padded, expected = scored(lm, x)
    assert seen[1:] == [x.tokens.shape] and lm.why_padded == "packs is False"
    assert (packed - padded).abs().max() < 1e-5 and (packed - x.log_prob).abs().max() < 1e-4
    assert gradient.keys() == expected.keys() and gradient
    for each, values in expected.items():
        assert (gradient[each] - values).abs().max() < 1e-5 * max(1.0, float(values.abs().max())), each


def test_a_packed_loss_is_the_padded_one_in_every_part(shapes: Any) -> None:
    torch.manual_seed(0)
    lm = policy(llama())
    x = lm.sample(PROMPTS, 12, max_new_tokens=24, seed=1)
    options = {"log_target": x.log_prob + 0.3, "log_proposal": x.log_prob, "log_z": 0.1, "entropy_coefficient": 0.01}
    seen = shapes(lm)
    outs = []
    for lm.packs in (True, False):
        outs.append(lm.loss(x, **options))
    assert seen[0][0] < seen[1][0] == len(x)
    for name in ("loss", "log_prob", "weight", "entropy", "token_log_prob"):
        packed, padded = (getattr(out, name) for out in outs)
        assert packed.shape == padded.shape and (packed - padded).abs().max() < 1e-5, name


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (lambda: BloomForCausalLM(BloomConfig(**SMALL, hidden_size=64, n_layer=2, n_head=4)), {}, "no position ids"),
        (lambda: Mixing(LlamaConfig(**LLAMA)), {}, "another probability behind another one"),
        (lambda: llama(max_position_embeddings=15), {}, "context of 15 is too short"),
        (llama, {"check_scores": False}, "check_scores=False"),
        (lambda: llama().bfloat16(), {}, "longer rows rounds otherwise than the sampler's in torch.bfloat16"),
    ],
)
def test_a_model_that_can_not_take_packed_sequences_gets_them_padded(
    model: Any, options: Any, why: str, shapes: Any
) -> None:
    torch.manual_seed(0)
    lm = policy(model(), **options)
    assert lm.why_padded is not None
    x = lm.sample(PROMPTS, 8, max_new_tokens=10, seed=1)
    seen = shapes(lm)
    assert why in str(lm.why_padded)
    log_prob, _ = scored(lm, x)
    near = 0.2 if lm.model.dtype == torch.bfloat16 else 1e-4
    assert seen == [x.tokens.shape] and (log_prob - x.log_prob).abs().max() < near


COSTS = Costs(1000.0, 1.0, False)


def test_rows_hold_every_sequence_once_and_no_more_than_the_context() -> None:
    lengths = [3, 50, 7, 7, 31, 12, 1, 44, 5, 9]
    rows = arrange(lengths, COSTS, 52)
    assert rows is not None and sorted(i for row in rows for i in row) == list(range(10))
    assert all(sum(lengths[i] for i in row) <= 52 for row in rows) and len(rows) < 10
    free = arrange(lengths, COSTS, None)
    assert free is not None and len(free) < len(rows)


@pytest.mark.parametrize(
    ("lengths", "costs"),
    [
        ([], COSTS),
        ([5], COSTS),
        ([0, 0], COSTS),
        ([40] * 8, COSTS),  # there is no padding
        ([40, 40, 40, 38], COSTS),  # there is too little padding to be worth it
        # here attention between the sequences of a row costs more than padding
        ([40, 20, 40, 20], Costs(1.0, 1.0, False)),
        ([4000, 2000] * 40, Costs(1e9, 1.0, False)),  # the mask would be too large
    ],
)
def test_sequences_are_padded_where_rows_cost_no_less(lengths: list[int], costs: Costs) -> None:
    assert arrange(lengths, costs, None) is None


def test_flash_attention_takes_one_row_of_all_sequences() -> None:
    assert arrange([40, 20, 40, 20], Costs(1.0, 1.0, True), 50) == [[0, 1, 2, 3]]


def test_costs_are_those_of_the_body_of_a_model() -> None:
    body = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert costs_of(llama()) == costs_of(llama(tie_word_embeddings=True)) == Costs(body / 2, 128.0, False)
    assert costs_of(llama(attn_implementation="eager")) == Costs(body / 2, 128.0, False)


def test_packing_and_padding_again_gives_what_was_there() -> None:
    torch.manual_seed(0)
    x = policy(llama()).sample(PROMPTS, 6, max_new_tokens=12, seed=1)
    lengths = x.attention_mask.sum(1).tolist()
    packed = pack(x, [[3, 0, 7], [1, 2], [4, 5, 6, 8], [9, 10, 11]])
    ids = packed.padded(packed.tokens[..., None].double(), x.tokens.shape[1])[..., 0]
    assert torch.equal(ids.long() * x.attention_mask, x.tokens * x.attention_mask)
    first = packed.positions[0, : lengths[3] + lengths[0]].tolist()
    assert first == [*range(lengths[3]), *range(lengths[0])]
