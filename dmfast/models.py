"""Causal language models of transformers as distributions: sample sequences, score sequences.

Sampler and scorer share one mask rule, one temperature and no dropout, so that log pi(x) of the scorer is log q(x) of
the sampler when pi = q. Nothing of the model's generation_config acts (transformers' default has top_k = 50):
a truncated sampler draws from another distribution than the one that is scored.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from . import adapters
from .decoding import decode, positions_of
from .families import context_length, disable_dropout, execution_device, text_inputs, why_context, without_adapters
from .functional import (
    dm_loss,
    linear_dm_loss,
    linear_sequence_log_prob,
    sample_tokens,
    sequence_log_prob,
    shift_labels,
)
from .guard import Guard
from .head import HeadProbe, HiddenAndHead, unwrapped
from .kernels.batch import IGNORE
from .kernels.result import DMLossOutput
from .samples import Prompt, Samples
from .tensors import copy_into

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a sampler is loaded from: a model, or a folder that its ``save_pretrained`` wrote.
Source: TypeAlias = "LanguageModel | nn.Module | str | os.PathLike[str]"

_WHERE_FROM = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "force_download", "subfolder")


class LanguageModel:
    """A transformers causal language model as a distribution over token sequences.

    Sets all dropout and router jitter of ``model`` to 0, since a sampled sequence and its score must come from one
    distribution. ``docs/models.md`` lists the architectures for which that was tried.

    It is a ``Sampler``.

    Args:
        model: decoder-only, with the forward of transformers; PEFT models too. Device and dtype stay as they are.
        tokenizer: its ``eos_token_id`` ends a sequence, its ``bos_token_id`` (or else EOS) is the empty prompt.
        eos_token_id: other token ids that end a sequence, in the tokenizer's place.
        check_scores: ask the model itself, in a few small forwards once, whether it can take prompts of several lengths
            left-padded, and whether two of its first sequences score as they were drawn: alone and together, in
            training mode and with the cache. False takes that for granted, save that a model whose forward has no
            ``position_ids`` gets prompts of one length at a time.

    Attributes:
        version: what ``Samples.version`` of its draws holds; an ``OfflineProposal`` whose q it is assigns it.

    Raises:
        ValueError: an encoder-decoder model, a prompt-learning adapter, no EOS token, or an EOS or padding token that
            the model does not have.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, eos_token_id: int | Sequence[int] | None = None,
        check_scores: bool = True,
    ) -> None:  # fmt: skip
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
        self._keeps_logits = "logits_to_keep" in inspect.signature(without_adapters(model).forward).parameters
        self._text_inputs, self._context = text_inputs(model), context_length(model)
        self._why_context = why_context(model)
        self._guard = Guard(model, check_scores)
        self._head = HeadProbe()
        self.version = 0
        self._said = False  # why all logits are formed

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return execution_device(self.model)

    def _check_token(self, token: int, what: str) -> None:
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"{what} {token}, but the model has {self.vocab_size} embeddings: tokenizer and model don't fit"
            )

    def around(self, model: nn.Module) -> LanguageModel:
        """Return the same around another module that computes the same, such as a DDP or compiled wrapper of it."""
        other = copy.copy(self)
        other.model, other._head = model, copy.copy(self._head)
        return other

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        check_scores: bool = True,
        **kwargs: Any,
    ) -> LanguageModel:
        """Load model and tokenizer by transformers' ``AutoModelForCausalLM`` and ``AutoTokenizer``.

        Args:
            name_or_path: a folder, or a name on the hub.
            dtype: of the parameters. Default: transformers', which is that of the checkpoint.
            device: where the model goes. Default: where transformers puts it.
            eos_token_id, check_scores: as in ``LanguageModel``.
            kwargs: go to the model's ``from_pretrained``; those that say where from (``revision``, ``token``,
                ``cache_dir``, ``local_files_only``, ``trust_remote_code``, ...) to the tokenizer's, too.

        Raises:
            ImportError: transformers is not installed.
            OSError, ValueError: as transformers, and as ``LanguageModel``.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where = {name: value for name, value in kwargs.items() if name in _WHERE_FROM}
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **where)
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path, **({} if dtype is None else {"dtype": dtype}), **kwargs
        )
        model = model if device is None else model.to(device)
        return cls(model, tokenizer, eos_token_id=eos_token_id, check_scores=check_scores)

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """Replace this model's parameters and buffers by those of another: q <- pi. Devices and dtypes stay.

        Args:
            source: a model of the same architecture, or a folder that its ``save_pretrained`` wrote; of an adapter,
                if this model has one of the same kind, around the same base.

        Raises:
            TypeError: the source is no model and no folder.
            FileNotFoundError: there is no such folder.
            ValueError: the source is this model itself.
            RuntimeError: names or shapes of the parameters differ. This model stays as it was.
        """
        if not isinstance(source, (str, os.PathLike)) and module_of(source) is module_of(self):
            raise ValueError("a LanguageModel can't be loaded from its own module, with which it already moves")
        mine, given = self._tensors(), self._given(source)
        if _is_adapter(source):
            mine = of_adapter(mine) | {name: mine[name] for name in given if name in mine}
        copy_into(mine, given)

    def _tensors(self) -> dict[str, Tensor]:
        """Return what this model computes with, by the names of ``adapters.tensors``."""
        return adapters.tensors(module_of(self))

    def _given(self, source: Source) -> dict[str, Tensor]:
        """Return the tensors of a source, by the same names."""
        if isinstance(source, LanguageModel):
            return source._tensors()
        if isinstance(source, nn.Module):
            return adapters.tensors(module_of(source))
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"load takes a LanguageModel, its module or a folder, got a {type(source).__name__}")
        folder = Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r} to load a model from")
        if _is_adapter(folder):
            return adapters.saved(folder, self._tensors().keys())
        return adapters.tensors(without_adapters(module_of(self)).from_pretrained(folder, local_files_only=True))

    def base(self) -> LanguageModel:
        """Return the pretrained model below a PEFT model's adapter: the same module, the adapter off in each forward.

        It takes no memory of its own and is frozen. An ``EBM`` around it makes a, pi and q share one backbone.

        Raises:
            ValueError: ``model`` is no PEFT model, or one whose adapter can't be switched: see ``AdapterView``.
        """
        from .views import AdapterView

        return AdapterView(self)

    def _encode(self, prompts: Sequence[Prompt] | None) -> tuple[Tensor, Tensor]:
        """Return left-padded prompts and their mask, (P, L) each. An empty prompt is the BOS token."""
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
        """Return the same continuations after another prompt, the same for all.

        ``log_prob`` stays what it was: that of what they were drawn from. ``context_id`` becomes 0.

        Raises:
            ValueError: as ``sample`` of the prompt; prompt and continuation are beyond the model's context.
        """
        tokens, mask = (x.to(samples.tokens.device) for x in self._encode([prompt]))
        rest = slice(samples.prompt_len, None)
        context = self._context
        width = tokens.shape[1] + samples.tokens.shape[1] - samples.prompt_len
        if context is not None and width > context:
            raise ValueError(
                f"the prompt has {tokens.shape[1]} tokens; with the continuations that is {width}, beyond the model's "
                f"context of {context}{self._why_context}"
            )

        def after(head: Tensor, tail: Tensor) -> Tensor:
            return torch.cat([head.expand(len(samples), -1), tail[:, rest]], 1)

        return replace(
            samples, tokens=after(tokens, samples.tokens), attention_mask=after(mask, samples.attention_mask),
            score_mask=after(torch.zeros_like(mask, dtype=torch.bool), samples.score_mask),
            prompt_len=tokens.shape[1], context_id=torch.zeros_like(samples.context_id),
        )  # fmt: skip

    def check_prompts(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Check that all of them can be sampled from.

        Raises:
            ValueError: a prompt that leaves no room for ``max_new_tokens`` in the model's context, or has a token that
                the model does not have; with its place.
        """
        context = self._context
        for i, prompt in enumerate(prompts):
            ids = self._token_ids(prompt)
            if context is not None and len(ids) + max_new_tokens > context:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that is beyond the "
                    f"model's context of {context}{self._why_context}"
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
        """Draw n continuations of each prompt from softmax(logits / temperature), token by token with a KV cache.

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
                room in the model's context, a tokenizer that does not fit the model, logits of the model that are no
                distribution (NaN, +inf, nothing but -inf), on any device.
        """
        numbers = {"n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": batch_size}
        for name, number in numbers.items():
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {number!r}")
        self._check_placed()
        prompt, prompt_mask = self._encode(prompts)
        context = self._context
        if context is not None and prompt.shape[1] + max_new_tokens > context:
            raise ValueError(
                f"the longest prompt has {prompt.shape[1]} tokens; with max_new_tokens={max_new_tokens} that is beyond "
                f"the model's context of {context}{self._why_context}"
            )
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        context_id = torch.arange(prompt.shape[0], device=self.device).repeat_interleave(n)

        def draw() -> Samples:
            batches = torch.split(torch.arange(len(context_id), device=self.device), batch_size or len(context_id))
            if not self._guard.padded:
                lengths = prompt_mask.sum(1)[context_id]
                batches = tuple(ids[lengths[ids] == length] for ids in batches for length in set(lengths[ids].tolist()))
            parts = []
            for ids in batches:
                width = prompt.shape[1] if self._guard.padded else int(prompt_mask[context_id[ids[0]]].sum())
                parts.append(self._sample(prompt[:, -width:], prompt_mask[:, -width:], context_id[ids], first_row + ids,
                                          max_new_tokens, temperature, seed))  # fmt: skip
            drawn = Samples.cat(parts)
            return drawn if self._guard.padded else drawn[torch.cat(batches).argsort()]

        training = [module for module in self.model.modules() if module.training]
        self.model.eval()  # gradient checkpointing forbids the KV cache in training mode; dropout is 0 in both
        try:
            self._probe(prompt, prompt_mask)
            samples = draw()
            while not self._guard.check(self, samples):
                samples = draw()
        finally:
            for module in training:
                module.training = True
        if not self._guard.cached and not self._guard.said:
            self._guard.said = True
            warnings.warn(
                f"dmfast runs the whole sequence in each step of sampling from {type(self._unwrapped()).__name__}, "
                f"which takes more time: {self._guard.why_uncached}",
                stacklevel=_outside(),
            )
        bad = samples.log_prob.isnan()  # what the CPU raises at once, a device has put here
        if bool(bad.any()):
            raise ValueError(
                f"the model's logits hold NaN or +inf, or nothing but -inf, in {int(bad.sum())} of {len(samples)} "
                f"sequences, first in sequence {int(bad.nonzero()[0, 0])}: there is no distribution to draw from"
            )
        return samples

    def _sample(
        self, prompts: Tensor, mask: Tensor, context_id: Tensor, row_ids: Tensor, steps: int, temperature: float,
        seed: int,
    ) -> Samples:  # fmt: skip
        def draw(logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
            return sample_tokens(logits, seed=seed, row_ids=row_ids[rows], step=step, temperature=temperature)

        prompt = prompts[context_id]
        drawn = decode(
            self.model, without_adapters(self._unwrapped()), prompt, mask[context_id], steps, draw=draw,
            eos_token_ids=self.eos_token_ids, pad_token_id=self.pad_token_id, first_position=self._guard.first_position,
            cached=self._guard.cached, more={name: torch.zeros_like(prompt) for name in self._text_inputs},
        )  # fmt: skip
        self._guard.cached = drawn.cached
        score = drawn.mask.bool()
        score[:, : prompts.shape[1]] = False
        return Samples(
            drawn.tokens, drawn.mask, score, prompts.shape[1], drawn.log_prob, context_id, temperature, self.tokenizer,
            self.pad_token_id, torch.full_like(context_id, self.version),
        )  # fmt: skip

    def logits(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return logits and the labels that they score, for ``dm_loss``: (N, K, V) and (N, K) int64, -100 = not scored.

        One forward through the model, with gradient where grad mode is on; one for each length of a prompt where the
        model can't take them padded. K is T, or the continuation and the position before it where the model can leave
        out the logits of the prompt.
        """
        labels = self._labels(samples)
        parts = self._laid_out(samples)
        if parts is not None:
            kept = slice(-labels.shape[1], None)
            return _joined([(places, self._forward(part).logits[:, kept]) for places, part in parts]), labels
        logits = self._forward(samples).logits
        ahead = logits.shape[1] - labels.shape[1]
        return logits, nn.functional.pad(labels, (ahead, 0), value=IGNORE) if ahead else labels

    def _labels(self, samples: Samples) -> Tensor:
        """Return (N, K) int64 for the continuation and the position before it."""
        labels = shift_labels(samples.tokens, samples.score_mask, samples.prompt_len)
        return labels[:, samples.prompt_len - 1 :]

    def _laid_out(self, samples: Samples) -> list[tuple[Tensor, Samples]] | None:
        """Return the samples by the length of their prompts where the model can't take them padded. None: it can."""
        self._check_placed()
        self._probe(samples.tokens, samples.attention_mask)
        if self._guard.padded or bool(samples.attention_mask[:, : samples.prompt_len].all()):
            return None
        parts = samples.by_prompt_length()
        if len(parts) > 1 and self.model is not self._unwrapped():
            raise ValueError(
                f"{type(self._unwrapped()).__name__} can't take prompts of several lengths in one batch, and under DDP "
                "all processes must run the same number of forwards: give all prompts of a microbatch one length"
            )
        return parts

    def _check_placed(self) -> None:
        if self.device.type == "meta":
            raise ValueError(
                f"the parameters of the {type(self._unwrapped()).__name__} are on the device meta, without values: "
                "load the model with its weights, or dispatch it by accelerate, whose hooks say where it runs"
            )

    def _probe(self, tokens: Tensor, mask: Tensor) -> None:
        """Ask the model how it takes a batch, before its first forward."""
        self._guard.probe(self, tokens, mask)

    def _inputs(self, mask: Tensor) -> dict[str, Tensor]:
        """Return what a whole forward takes besides its tokens."""
        first = self._guard.first_position
        positions = {} if first is None else {"position_ids": positions_of(mask) + first}
        return {"attention_mask": mask, **positions, **{name: torch.zeros_like(mask) for name in self._text_inputs}}

    def _forward(self, samples: Samples) -> Any:
        """Run one forward, without the logits of the prompt where the model can leave them out."""
        kept = samples.tokens.shape[1] - samples.prompt_len + 1
        return self.model(
            input_ids=samples.tokens, use_cache=False, **self._inputs(samples.attention_mask),
            **({"logits_to_keep": kept} if self._keeps_logits else {}),
        )  # fmt: skip

    def hidden_and_head(self, samples: Samples) -> HiddenAndHead:
        """Return what the logits are made of, for ``linear_dm_loss``: one forward in which the head projects nothing.

        The forward is the model's own, so that its hooks, adapters and checkpointing run.

        Raises:
            ValueError: the model's logits are not a plain nn.Linear of hidden states, scaled and capped by constants of
                its config: a head that is quantised, sharded, offloaded or has an adapter, or logits that are processed
                in another way (found on the first use, by comparing a few). ``logits`` serves such models.
        """
        found = self._hidden(samples)
        if found is None:
            raise ValueError(f"hidden_and_head: {self._head.why_not(self.model)}; use logits() and dm_loss")
        return found

    def _hidden(self, samples: Samples) -> HiddenAndHead | None:
        """Return ``hidden_and_head``, or None where ``HeadProbe.why_not`` says why."""
        parts = self._laid_out(samples)
        if parts is None:
            return self._head.read(self.model, self._labels(samples), lambda: self._forward(samples))
        found = []
        for places, part in parts:
            read = self._head.read(self.model, self._labels(part), lambda part=part: self._forward(part))  # type: ignore[misc]
            if read is None:
                return None
            found.append((places, read))
        hidden = _joined([(places, read.hidden) for places, read in found])
        return found[0][1]._replace(hidden=hidden, labels=self._labels(samples))

    def _module(self) -> Any:
        """Return the module itself, without what DDP or torch.compile put around it."""
        return module_of(self)

    def _unwrapped(self) -> Any:
        """Return the model without DDP around it."""
        return unwrapped(self.model)

    def _say_why_logits(self) -> None:
        """Warn once, at the line that called log_prob or loss."""
        if not self._said:
            self._said = True
            warnings.warn(
                f"dmfast forms all logits of {type(self.model).__name__}, which takes more memory: "
                f"{self._head.why_not(self.model)}",
                stacklevel=3,
            )

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return log pi(x) of each sequence under this model at the samples' temperature, differentiable.

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
            log_prob, formed = self._score(samples[start : start + size].trimmed())
            if formed:
                self._say_why_logits()
            parts.append(log_prob)
        return torch.cat(parts) if parts else samples.log_prob.new_empty(0)

    def _score(self, samples: Samples) -> tuple[Tensor, bool]:
        """Return (N,) log pi, and whether all logits were formed for it."""
        found = self._hidden(samples)
        if found is None:
            logits, labels = self.logits(samples)
            inplace = not logits.is_leaf
            return sequence_log_prob(logits, labels, temperature=samples.temperature, inplace=inplace), True
        log_prob = linear_sequence_log_prob(
            found.hidden, found.weight, found.labels, bias=found.bias, softcap=found.softcap,
            temperature=samples.temperature / found.scale,
        )  # fmt: skip
        return log_prob, False

    def loss(self, samples: Samples, **options: Any) -> DMLossOutput:
        """Return ``dm_loss`` of this model on the samples, at their temperature: its forward and the fused loss.

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


def _outside() -> int:
    """Return the stacklevel at which a warning of the caller is about the code that called dmfast."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("dmfast", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the rows of several parts in the order of their places."""
    places = torch.cat([each for each, _ in parts])
    return torch.cat([rows for _, rows in parts])[places.argsort()]


def module_of(source: LanguageModel | nn.Module) -> Any:
    """Return the module itself, without what DDP or torch.compile put around it."""
    module = unwrapped(source.model if isinstance(source, LanguageModel) else source)
    return getattr(module, "_orig_mod", module)


def _is_adapter(source: Source) -> bool:
    """Return whether this is a folder that holds an adapter and not a whole model."""
    return isinstance(source, (str, os.PathLike)) and (Path(source) / "adapter_config.json").is_file()


def of_adapter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of ``adapters.tensors`` that are an adapter's."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(adapters.ADAPTER)}
