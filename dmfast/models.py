"""Causal language models of transformers as distributions: sample sequences, score sequences.

Sampler and scorer share one mask rule, one temperature and no dropout, so that log pi(x) of the scorer is log q(x) of
the sampler when pi = q. Nothing of the model's generation_config acts (transformers' default has top_k = 50):
a truncated sampler draws from another distribution than the one that is scored.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .functional import (
    dm_loss,
    linear_dm_loss,
    linear_sequence_log_prob,
    sample_tokens,
    sequence_log_prob,
    shift_labels,
)
from .kernels.batch import IGNORE
from .kernels.result import DMLossOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A string, token ids, or chat messages ({"role": ..., "content": ...}).
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Mapping[str, str]]"


@dataclass(frozen=True, eq=False)
class Samples:
    """N sequences drawn from a language model.

    Attributes:
        tokens: (N, T) int64, prompt then continuation. Prompts are left-padded; after EOS comes padding.
        attention_mask: (N, T) int64, 1 on prompt and continuation up to and with the first EOS: what feeds the model.
        score_mask: (N, T) bool, True on the tokens whose log-probability counts: the generated ones up to and with
            the first EOS, also when pad == eos.
        prompt_len: the padded width of the prompts.
        log_prob: (N,) fp64, log q(x) in nats under ``temperature``, as drawn.
        context_id: (N,) int64, which prompt.
        temperature: that the sequences were drawn at and are scored at.
        tokenizer: for ``text``.
        pad_token_id: what pads ``tokens``.
    """

    tokens: Tensor
    attention_mask: Tensor
    score_mask: Tensor
    prompt_len: int
    log_prob: Tensor
    context_id: Tensor
    temperature: float
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Samples:
        """Some of the sequences: a slice, a (N,) bool mask or indices."""
        rows = ("tokens", "attention_mask", "score_mask", "log_prob", "context_id")
        return replace(self, **{name: getattr(self, name)[index] for name in rows})

    def to(self, device: torch.device | str) -> Samples:
        """With its tensors on a device."""
        rows = ("tokens", "attention_mask", "score_mask", "log_prob", "context_id")
        return replace(self, **{name: getattr(self, name).to(device) for name in rows})

    @cached_property
    def text(self) -> list[str]:
        """The continuations, without special tokens. Decoded on first use."""
        rows = zip(self.tokens.tolist(), self.score_mask.tolist(), strict=True)
        kept = [[token for token, scored in zip(*row, strict=True) if scored] for row in rows]
        texts: list[str] = self.tokenizer.batch_decode(kept, skip_special_tokens=True) if kept else []
        return texts

    def trimmed(self) -> Samples:
        """Without the columns that are padding in every one of these sequences."""
        used = self.attention_mask.any(0).nonzero()[:, 0]
        if len(used) == 0:
            return self
        first, last = min(int(used[0]), self.prompt_len - 1), int(used[-1]) + 1
        columns = ("tokens", "attention_mask", "score_mask")
        return replace(
            self, prompt_len=self.prompt_len - first, **{name: getattr(self, name)[:, first:last] for name in columns}
        )

    @staticmethod
    def cat(parts: Sequence[Samples]) -> Samples:
        """One batch of several, padded to one width. ``context_id`` is kept as it is.

        Raises:
            ValueError: no parts, or parts drawn at different temperatures.
        """
        if not parts or any(part.temperature != parts[0].temperature for part in parts):
            raise ValueError("Samples.cat needs one or more Samples, all of one temperature")
        prompt = max(part.prompt_len for part in parts)
        rest = max(part.tokens.shape[1] - part.prompt_len for part in parts)

        def padded(name: str, value: int = 0) -> Tensor:
            return torch.cat(
                [
                    nn.functional.pad(
                        getattr(part, name),
                        (prompt - part.prompt_len, rest - (part.tokens.shape[1] - part.prompt_len)),
                        value=value,
                    )
                    for part in parts
                ]
            )

        return replace(
            parts[0],
            tokens=padded("tokens", parts[0].pad_token_id),
            attention_mask=padded("attention_mask"),
            score_mask=padded("score_mask"),
            prompt_len=prompt,
            log_prob=torch.cat([part.log_prob for part in parts]),
            context_id=torch.cat([part.context_id for part in parts]),
        )


class HiddenAndHead(NamedTuple):
    """What a model's logits are made of: ``cap(scale * (hidden @ weight.T + bias))``."""

    hidden: Tensor  # (N, K, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N, K) int64, what each position predicts; -100 = not scored
    softcap: float | None
    scale: float


def disable_dropout(model: nn.Module) -> int:
    """Sets every dropout probability of the model to 0, LoRA's too, and returns how many were not.

    Not by eval(): training mode stays what it is, gradient checkpointing needs it.
    """
    changed = 0
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_probability = name == "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop" in name
            if is_probability and isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
                changed += 1
    return changed


class LanguageModel:
    """A transformers causal language model as a distribution over token sequences.

    Sets all dropout of ``model`` to 0, since a sampled sequence and its score must come from one distribution.

    Args:
        model: decoder-only, with the forward of transformers; PEFT models too. Device and dtype stay as they are.
        tokenizer: its ``eos_token_id`` ends a sequence, its ``bos_token_id`` (or else EOS) is the empty prompt.
        eos_token_id: other token ids that end a sequence, in the tokenizer's place.

    Raises:
        ValueError: an encoder-decoder model, a prompt-learning adapter, no EOS token, or an EOS or padding token that
            the model does not have.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, eos_token_id: int | Sequence[int] | None = None
    ) -> None:
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                "LanguageModel takes decoder-only models; for an encoder-decoder call dm_loss on its logits, as "
                "examples/encoder_decoder.py does"
            )
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "LanguageModel takes no prompt-learning adapters (prefix tuning, prompt tuning): PEFT would put their "
                "virtual tokens before every token that is sampled; use LoRA or another adapter of weights"
            )
        eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        if eos is None or eos == []:
            raise ValueError("the tokenizer has no eos_token, so no sequence would ever end; pass eos_token_id")
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size: int = cast(Any, model).get_input_embeddings().weight.shape[0]
        self.eos_token_ids = [eos] if isinstance(eos, int) else list(eos)
        self.pad_token_id: int = self.eos_token_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        for name, token in [("pad", self.pad_token_id), *(("eos", token) for token in self.eos_token_ids)]:
            self._check_token(token, f"{name}_token_id is")
        disable_dropout(model)
        # the forward of a PEFT model takes **kwargs and tells nothing
        parameters = inspect.signature(_without_adapters(model).forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._cache_name = (
            "cache" if "cache" in parameters else "past_key_values"
        )  # the old name, until transformers 5.40
        self._verified = False  # that hidden states and head make the model's logits
        self._no_head: str | None = None  # why they don't, once that is known
        self._said = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _check_token(self, token: int, what: str) -> None:
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"{what} {token}, but the model has {self.vocab_size} embeddings: tokenizer and model don't fit"
            )

    def around(self, model: nn.Module) -> LanguageModel:
        """The same with another module in its place that computes the same, such as a DDP or compiled wrapper of it."""
        other = copy.copy(self)
        other.model = model
        return other

    def base(self) -> LanguageModel:
        """The pretrained model below the adapter of a PEFT model: the same module, the adapter off in each forward.

        It takes no memory of its own and is frozen. An ``EBM`` around it makes a, pi and q share one backbone.

        Raises:
            ValueError: ``model`` is no PEFT model, or one whose adapter can't be switched: see ``AdapterView``.
        """
        from .adapters import AdapterView

        return AdapterView(self)

    def _encode(self, prompts: Sequence[Prompt] | None) -> tuple[Tensor, Tensor]:
        """Left-padded prompts and their mask, (P, L) each. An empty prompt is the BOS token."""
        start = self.tokenizer.bos_token_id
        start = self.eos_token_ids[0] if start is None else start
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a list of strings, got the string {prompts!r}")
        if prompts is not None and len(prompts) == 0:
            raise ValueError("prompts is empty; pass None for the one empty prompt")
        encoded = [self._token_ids(prompt) or [start] for prompt in prompts or [""]]
        width = max(len(ids) for ids in encoded)
        tokens = torch.tensor([[self.pad_token_id] * (width - len(ids)) + ids for ids in encoded], device=self.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=self.device)
        for token in torch.aminmax(tokens):
            self._check_token(int(token), "the tokenizer gave token")
        return tokens, mask

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, Mapping):
            raise TypeError(
                f"a prompt must be a string, a list of token ids or a list of chat messages, got {prompt!r:.100}; of a "
                "datasets.Dataset pass its column, dataset['prompt']"
            )
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if not all(isinstance(part, Mapping) for part in prompt) or not prompt:
            return list(cast("Sequence[int]", prompt))
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "a prompt is a list of chat messages, but the tokenizer has no chat_template; pass strings, or set one"
            )
        messages = cast(Any, list(prompt))
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return cast("list[int]", ids)

    def with_prompt(self, samples: Samples, prompt: Prompt) -> Samples:
        """The same continuations after another prompt, the same for all.

        ``log_prob`` stays what it was: that of what they were drawn from. ``context_id`` becomes 0.

        Raises:
            ValueError: as ``sample`` of the prompt; prompt and continuation are beyond the model's context.
        """
        tokens, mask = (x.to(samples.tokens.device) for x in self._encode([prompt]))
        rest = slice(samples.prompt_len, None)
        context = getattr(self.model.config, "max_position_embeddings", None)
        width = tokens.shape[1] + samples.tokens.shape[1] - samples.prompt_len
        if isinstance(context, int) and width > context:
            raise ValueError(
                f"the prompt has {tokens.shape[1]} tokens; with the continuations that is {width}, beyond the model's "
                f"context of {context}"
            )

        def after(head: Tensor, tail: Tensor) -> Tensor:
            return torch.cat([head.expand(len(samples), -1), tail[:, rest]], 1)

        return replace(
            samples, tokens=after(tokens, samples.tokens), attention_mask=after(mask, samples.attention_mask),
            score_mask=after(torch.zeros_like(mask, dtype=torch.bool), samples.score_mask),
            prompt_len=tokens.shape[1], context_id=torch.zeros_like(samples.context_id),
        )  # fmt: skip

    def check_prompts(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Whether all of them can be sampled from.

        Raises:
            ValueError: a prompt that leaves no room for ``max_new_tokens`` in the model's context, or has a token that
                the model does not have; with its place.
        """
        context = getattr(self.model.config, "max_position_embeddings", None)
        for i, prompt in enumerate(prompts):
            ids = self._token_ids(prompt)
            if isinstance(context, int) and len(ids) + max_new_tokens > context:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that is beyond the "
                    f"model's context of {context}"
                )
            self._check_token(max(ids, default=0), f"prompt {i}: the tokenizer gave token")

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt] | None = None,
        n: int = 1,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int | None = None,
        batch_size: int | None = None,
        first_row: int = 0,
    ) -> Samples:
        """Draws n continuations of each prompt from softmax(logits / temperature), token by token with a KV cache.

        Args:
            prompts: strings, lists of token ids, or lists of chat messages, which go through the tokenizer's chat
                template; None: the one empty prompt.
            n: sequences per prompt; those of a prompt lie together.
            max_new_tokens: where a sequence without EOS ends.
            temperature: positive.
            seed: what is drawn is a function of it, of each sequence's place among the N, and of the model's logits.
                None: one from torch's global generator.
            batch_size: sequences at a time. Default: all.
            first_row: the place of the first of them, where they are one process's share of more.

        Returns:
            ``Samples`` with log q, N = n * number of prompts.

        Raises:
            ValueError: n, max_new_tokens, temperature or batch_size not positive, no prompt, a prompt that leaves no
                room in the model's context, a tokenizer that does not fit the model, NaN among the model's logits.
        """
        numbers = {"n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": batch_size}
        for name, number in numbers.items():
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {number!r}")
        prompt, prompt_mask = self._encode(prompts)
        context = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(context, int) and prompt.shape[1] + max_new_tokens > context:
            raise ValueError(
                f"the longest prompt has {prompt.shape[1]} tokens; with max_new_tokens={max_new_tokens} that is beyond "
                f"the model's context of {context}"
            )
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        context_id = torch.arange(prompt.shape[0], device=self.device).repeat_interleave(n)
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()  # gradient checkpointing forbids the KV cache in training mode; dropout is 0 in both
        try:
            parts = [
                self._sample(prompt, prompt_mask, context_id[ids], first_row + ids, max_new_tokens, temperature, seed)
                for ids in torch.split(torch.arange(len(context_id), device=self.device), batch_size or len(context_id))
            ]
        finally:
            for module in training:
                module.training = True
        return Samples.cat(parts)

    def _sample(
        self, prompts: Tensor, prompts_mask: Tensor, context_id: Tensor, row_ids: Tensor, steps: int,
        temperature: float, seed: int,
    ) -> Samples:  # fmt: skip
        n, prompt_len, device = len(context_id), prompts.shape[1], prompts.device
        tokens = torch.cat([prompts[context_id], prompts.new_full((n, steps), self.pad_token_id)], 1)
        mask = torch.cat([prompts_mask[context_id], prompts_mask.new_zeros(n, steps)], 1)
        log_prob = torch.zeros(n, dtype=torch.float64, device=device)

        def draw(_: nn.Module, given: Tensor, *, stopping_criteria: Callable[..., Tensor], **prepared: Any) -> Tensor:
            # not the model that generate passes: the wrapped one's forward runs the hooks of PEFT and others
            rows = torch.arange(n, device=device)  # those that are still in the batch, and which of them have not ended
            alive = torch.ones(n, dtype=torch.bool, device=device)
            keep = {"logits_to_keep": 1} if self._keeps_logits else {}
            start, cache = 0, prepared.get(self._cache_name)
            for end in range(prompt_len, prompt_len + steps):
                seen = mask[rows, :end]
                out = self.model(
                    input_ids=tokens[rows, start:end], attention_mask=seen, position_ids=_positions(seen)[:, start:],
                    use_cache=True, **{self._cache_name: cache}, **keep,
                )  # fmt: skip
                start, cache = end, getattr(out, self._cache_name)
                drawn, drawn_log_prob = sample_tokens(
                    out.logits[:, -1], seed=seed, row_ids=row_ids[rows], step=end - prompt_len, temperature=temperature
                )
                log_prob[rows] += torch.where(alive, drawn_log_prob, 0.0)
                tokens[rows, end] = torch.where(alive, drawn, self.pad_token_id)
                mask[rows, end] = alive.long()
                alive = alive & ~stopping_criteria(tokens[rows, : end + 1], None)
                n_alive = int(alive.sum())
                if n_alive == 0:
                    break
                # moving the cache costs a read and a write of it, about what a step costs: not for every row that ends
                if n_alive <= 0.75 * len(rows) and (cache is None or hasattr(cache, "batch_select_indices")):
                    if cache is not None:
                        cache.batch_select_indices(alive.nonzero()[:, 0])
                    rows, alive = rows[alive], alive[alive]
            return tokens[:, : end + 1]

        tokens = self._generate(draw, tokens[:, :prompt_len], mask[:, :prompt_len], steps)
        mask = mask[:, : tokens.shape[1]]
        score = mask.bool()
        score[:, :prompt_len] = False
        return Samples(
            tokens, mask, score, prompt_len, log_prob, context_id, temperature, self.tokenizer, self.pad_token_id
        )

    def _generate(self, loop: Callable[..., Tensor], prompts: Tensor, mask: Tensor, steps: int) -> Tensor:
        """``loop`` within transformers' generate, which makes the KV cache and the stopping rules.

        A module without generate gets the rule for EOS alone, and its forward makes its cache.
        """
        model = _without_adapters(self._unwrapped())
        if not hasattr(model, "generate"):
            eos = torch.tensor(self.eos_token_ids, device=prompts.device)
            return loop(model, prompts, stopping_criteria=lambda ids, _: torch.isin(ids[:, -1], eos))
        from transformers import GenerationConfig

        rules = GenerationConfig(
            max_new_tokens=steps, eos_token_id=self.eos_token_ids, pad_token_id=self.pad_token_id, do_sample=True
        )
        theirs = model.generation_config
        # else what it says would fill what ours leaves open: stop_strings, max_time, cache_implementation, ...
        model.generation_config = GenerationConfig()
        try:
            found = model.generate(prompts, attention_mask=mask, generation_config=rules, custom_generate=loop)
            return cast(Tensor, found)
        finally:
            model.generation_config = theirs

    def logits(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Logits and the labels that they score, for ``dm_loss``: (N, K, V) and (N, K) int64, -100 = not scored.

        One forward through the model, with gradient where grad mode is on. K is T, or the continuation and the
        position before it where the model can leave out the logits of the prompt.
        """
        logits, labels = self._forward(samples).logits, self._labels(samples)
        ahead = logits.shape[1] - labels.shape[1]
        return logits, nn.functional.pad(labels, (ahead, 0), value=IGNORE) if ahead else labels

    def _labels(self, samples: Samples) -> Tensor:
        """(N, K) int64 for the continuation and the position before it."""
        labels = shift_labels(samples.tokens, samples.score_mask, samples.prompt_len)
        return labels[:, samples.prompt_len - 1 :]

    def _forward(self, samples: Samples) -> Any:
        """One forward, without the logits of the prompt where the model can leave them out."""
        kept = samples.tokens.shape[1] - samples.prompt_len + 1
        return self.model(
            input_ids=samples.tokens, attention_mask=samples.attention_mask,
            position_ids=_positions(samples.attention_mask), use_cache=False,
            **({"logits_to_keep": kept} if self._keeps_logits else {}),
        )  # fmt: skip

    def hidden_and_head(self, samples: Samples) -> HiddenAndHead:
        """What the logits are made of, for ``linear_dm_loss``: one forward in which the head projects nothing.

        The forward is the model's own, so that its hooks, adapters and checkpointing run.

        Raises:
            ValueError: the model's logits are not a plain nn.Linear of hidden states, scaled and capped by constants of
                its config: a head that is quantised, sharded, offloaded or has an adapter, or logits that are processed
                in another way (found on the first use, by comparing a few). ``logits`` serves such models.
        """
        found = self._hidden(samples)
        if found is None:
            raise ValueError(f"hidden_and_head: {self._why_no_head()}; use logits() and dm_loss")
        return found

    def _hidden(self, samples: Samples) -> HiddenAndHead | None:
        """``hidden_and_head``, or None where ``_why_no_head`` says why."""
        if self._why_no_head() is not None:
            return None
        head = self._unwrapped().get_output_embeddings()
        scale, softcap = self._scaling()
        labels = self._labels(samples)
        captured: list[Tensor] = []
        dtypes: list[torch.dtype | None] = []

        def capture(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not args:
                return None
            hidden = args[0]
            device = hidden.device.type
            captured.append(hidden)
            dtypes.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
            # not detached: DDP looks from the outputs for the parameters that will get a gradient
            return (hidden[:1, :0] if self._verified else hidden[:2, :2], *args[1:])

        hook = head.register_forward_pre_hook(capture)
        try:
            out = self._forward(samples)
        finally:
            hook.remove()
        if len(captured) != 1:
            self._no_head = f"the model calls its head {len(captured)} times in a forward, not once"
            return None
        hidden, weight, bias = captured[0], head.weight, head.bias
        if dtypes[0] is not None:  # the product ran in autocast's dtype, perhaps within the model's forward only
            hidden, weight = hidden.to(dtypes[0]), weight.to(dtypes[0])
            bias = None if bias is None else bias.to(dtypes[0])
        hidden = hidden[:, -labels.shape[1] :]
        result = HiddenAndHead(hidden, weight, bias, labels, softcap, scale)
        if not self._verified and len(samples):
            self._no_head = self._what_differs(out.logits, captured[0], result)
            self._verified = self._no_head is None and bool(out.logits.isfinite().all())
        return None if self._no_head is not None else result

    def _why_no_head(self) -> str | None:
        """Why ``hidden_and_head`` can't serve this model, as far as is known without a forward."""
        if self._no_head is not None:
            return self._no_head
        if hasattr(self.model, "_orig_mod"):
            return "the model is compiled, and torch.compile does not heed the hook that takes its hidden states"
        get: Any = getattr(self._unwrapped(), "get_output_embeddings", None)
        head = get() if get is not None else None
        if head is None:
            return "the model names no head (get_output_embeddings)"
        if type(head) is not nn.Linear:  # adapters, modules_to_save, quantised layers
            return f"the head is a {type(head).__module__}.{type(head).__qualname__}, not an nn.Linear"
        if type(head.weight) not in (nn.Parameter, Tensor):  # DTensor
            return f"the head's weight is a {type(head.weight).__qualname__}"
        if head.weight.is_meta or hasattr(head, "_hf_hook"):
            return "the head is offloaded"
        if head._forward_hooks or head._forward_pre_hooks:
            return "the head has hooks, which may change what it computes"
        scale, softcap = self._scaling()
        if not scale > 0 or (softcap is not None and scale != 1.0):
            return f"the model's logits are scaled by {scale} with a softcap of {softcap}"
        return None

    def _unwrapped(self) -> Any:
        """The model without DDP around it."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def _scaling(self) -> tuple[float, float | None]:
        """Constants of the config that act on logits: a factor, and Gemma's cap."""
        config: Any = self._unwrapped().config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        factor = getattr(config, "logit_scale", None)  # Cohere
        divisor = getattr(config, "logits_scaling", None)  # Granite
        scale = float(1.0 if factor is None else factor) / float(1.0 if divisor is None else divisor)
        return scale, getattr(config, "final_logit_softcapping", None)

    def _what_differs(self, logits: Tensor, hidden: Tensor, found: HiddenAndHead) -> str | None:
        """Between the model's logits for a few positions and those of their hidden states; None: nothing."""
        with torch.no_grad():
            shown = hidden.detach()[:2, :2].to(found.weight.dtype)
            ours = nn.functional.linear(shown, found.weight, found.bias).float() * found.scale
            if found.softcap is not None:
                ours = found.softcap * torch.tanh(ours / found.softcap)
            logits = logits.detach().float()
            if logits.shape != ours.shape:
                return f"for {tuple(shown.shape)} hidden states the model gives {tuple(logits.shape)} logits"
            tolerance = 1e-4 if found.weight.dtype in (torch.float32, torch.float64) else 2e-2
            error = float((logits - ours).abs().max())  # NaN where the model has diverged: the loss says where
            if error > tolerance * max(float(ours.abs().max()), 1.0):
                return (
                    f"the model's logits differ by up to {error:.2g} from those of its hidden states and head: it does "
                    "more to them than dmfast knows of"
                )
        return None

    def _say_why_logits(self) -> None:
        """One warning, at the line that called log_prob or loss."""
        if not self._said:
            self._said = True
            warnings.warn(
                f"dmfast forms all logits of {type(self.model).__name__}, which takes more memory: "
                f"{self._why_no_head()}",
                stacklevel=3,
            )

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """log pi(x) of each sequence under this model at the samples' temperature, differentiable.

        From hidden states and head, so that logits never exist at once, wherever ``hidden_and_head`` serves.

        Args:
            samples: N sequences.
            batch_size: sequences at a time. Default: all.

        Returns:
            (N,) fp64, nats.
        """
        size = max(batch_size or len(samples), 1)
        parts = []
        for start in range(0, len(samples), size):
            part = samples[start : start + size].trimmed()
            found = self._hidden(part)
            if found is not None:
                log_prob = linear_sequence_log_prob(
                    found.hidden, found.weight, found.labels, bias=found.bias, softcap=found.softcap,
                    temperature=part.temperature / found.scale,
                )  # fmt: skip
            else:
                self._say_why_logits()
                logits, labels = self.logits(part)
                log_prob = sequence_log_prob(logits, labels, temperature=part.temperature, inplace=not logits.is_leaf)
            parts.append(log_prob)
        return torch.cat(parts) if parts else samples.log_prob.new_empty(0)

    def loss(self, samples: Samples, **options: Any) -> DMLossOutput:
        """``dm_loss`` of this model on the samples, at their temperature: the policy's forward and the fused loss.

        From hidden states and head, so that logits never exist at once, wherever ``hidden_and_head`` serves.

        Args:
            samples: N sequences.
            options: those of ``linear_dm_loss`` from ``log_target`` on, save ``temperature``, ``softcap`` and
                ``cu_seqlens``, which the model and the samples say.

        Returns:
            ``DMLossOutput``; ``loss`` carries the gradient of the model's parameters.

        Raises:
            TypeError, ValueError: as ``dm_loss``; no samples.
        """
        if len(samples) == 0:
            raise ValueError("samples is empty: there is nothing for the model's forward to take")
        samples = samples.trimmed()
        found = self._hidden(samples)
        if found is not None:
            return linear_dm_loss(
                found.hidden, found.weight, found.labels, bias=found.bias, softcap=found.softcap,
                temperature=samples.temperature / found.scale, **options,
            )  # fmt: skip
        self._say_why_logits()
        options.pop("chunk_bytes", None)
        logits, labels = self.logits(samples)
        return dm_loss(logits, labels, temperature=samples.temperature, inplace=not logits.is_leaf, **options)


def _without_adapters(model: nn.Module) -> Any:
    """The transformers model within a PEFT model."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def _positions(mask: Tensor) -> Tensor:
    """(N, T) position ids of left-padded rows: the first real token is at 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
