"""Treat causal language models of transformers as distributions: sample sequences and score sequences.

Sampler and scorer share one mask rule, one temperature and no dropout, so that log pi(x) of the scorer is log q(x) of
the sampler when pi = q. Only the EOS of the model's generation_config is used. Its other settings are ignored
(transformers' default has top_k = 50), because a truncated sampler draws from another distribution than the one that is
scored.

``forwards.py`` runs the model on samples. ``AdapterView`` is a policy's backbone under another of its adapters, so that
a, pi and q share the memory of one model.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from . import adapters, sharding, tensor_parallel
from .completions import check_unknown_proposal, samples_of
from .decoding import decode
from .families import disable_dropout, why_context, without_adapters
from .forwards import Forwards, module_of, vocab_size_of
from .functional import dm_loss, linear_dm_loss, sample_tokens
from .head import SIXTEEN_BIT
from .kernels import warn_caller
from .kernels.result import DMLossOutput
from .objectives import Terms
from .prompts import PromptEncoder, end_tokens, text_part
from .samples import Prompt, Samples, check_counts, check_temperature
from .shipped import located
from .tensors import copy_into

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The source that a sampler is loaded from: a model, or a folder that its ``save_pretrained`` wrote.
Source: TypeAlias = "LanguageModel | nn.Module | str | os.PathLike[str]"

_WHERE_FROM = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "force_download", "subfolder")


class LanguageModel(Forwards):
    """A transformers causal language model as a distribution over token sequences.

    It sets all dropout and router jitter of ``model`` to 0, because a sampled sequence and its score must come from one
    distribution. ``docs/models.md`` lists the architectures for which this was tried.

    It is a ``Sampler``.

    Args:
        model: a decoder-only model with the forward of transformers, or a PEFT model around one. Device and dtype stay
            as they are.
        tokenizer: the tokenizer. Its ``bos_token_id`` (or else EOS) is the empty prompt. It may be a multimodal
            processor, of which only the tokenizer is used, because dmfast supports text only.
        eos_token_id: the token ids that end a sequence. Default: the tokenizer's, and those of the model's
            ``generation_config``, which end a sequence in transformers' generate.
        chat_template_kwargs: what the chat template gets besides the messages of a prompt, such as
            ``{"enable_thinking": False}``, ``tools``, or another ``chat_template``.
        check_scores: whether to test the model once in a few small forwards. They find out whether it can take prompts
            of several lengths left-padded, and whether two of its first sequences score as they were drawn: alone and
            together, in training mode and with the cache. False assumes that all this holds, but still gives a model
            whose forward has no ``position_ids`` prompts of one length at a time.
        logits_dtype: ``"float32"`` makes a 16-bit head give fp32 logits to sampler, scorer and loss alike, so that log
            pi is that of the 16-bit tensors and not of rounded logits. ``"same"`` keeps the head's own dtype for all.

    Attributes:
        eos_token_ids: the token ids that end a sequence.
        gather_for_sampling: whether a model that FSDP has sharded is made whole on every rank while it is sampled from.
            With False each layer is gathered in each forward, and a rank whose sequences have ended takes part until
            those of all ranks have. This needs less memory, more time and ``check_scores=False``.
        packs: whether sequences of several lengths are laid end to end in fewer rows. This is done if loss and
            ``log_prob`` are made from hidden states and packing is estimated to compute less than padding.
            ``why_padded`` says why it is never done.
        version: the ``Samples.version`` of its draws. An ``OfflineProposal`` assigns it to its q.

    Raises:
        TypeError: ``eos_token_id`` is not one or several integers, or ``chat_template_kwargs`` is not a mapping.
        ValueError: the model is an encoder-decoder or has a prompt-learning adapter; there is no EOS token; the model
            lacks the EOS or padding token; ``chat_template_kwargs`` has a key that dmfast sets itself; ``logits_dtype``
            is unknown; or DeepSpeed has cut the parameters.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *,
        eos_token_id: int | Sequence[int] | Tensor | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        check_scores: bool = True,
        logits_dtype: torch.dtype | str = "float32",
    ) -> None:  # fmt: skip
        if logits_dtype not in ("float32", torch.float32, "same"):
            raise ValueError(f"logits_dtype must be 'float32' or 'same', got {logits_dtype!r}")
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"LanguageModel takes decoder-only models, and {type(model).__name__} is not one; for an "
                "encoder-decoder call dm_loss on its logits, as examples/encoder_decoder.py does"
            )
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "LanguageModel takes no prompt-learning adapters (prefix tuning, prompt tuning): PEFT would put their "
                "virtual tokens before every token that is sampled; use LoRA or another adapter of weights"
            )
        sharding.refuse(model)
        if sharding.is_cut_by_zero(model):
            raise ValueError(
                f"DeepSpeed's ZeRO-3 has cut the parameters of the {type(model).__name__} (deepspeed.zero.Init, or "
                "from_pretrained while a DeepSpeed config with stage 3 exists), and LanguageModel needs them whole: "
                "load the model before that config is made; DMTrainer lets DeepSpeed cut the policy"
            )
        tokenizer, chat_template_kwargs = text_part(tokenizer, chat_template_kwargs)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.eos_token_ids = end_tokens(model, tokenizer, vocab_size_of(model), eos_token_id)
        self._encoder = PromptEncoder(tokenizer, self.eos_token_ids, vocab_size_of(model), chat_template_kwargs)
        logits_dtype = "same" if logits_dtype == "same" else "float32"
        super().__init__(model, self._encoder.pad_token_id, check_scores=check_scores, logits_dtype=logits_dtype)
        self._why_context = why_context(model)
        self.version = 0
        self.gather_for_sampling = True
        self._shares_prompts = True  # until a forward leaves a cache that can't be copied for several sequences
        self._said: set[str] = set()

    @property
    def checks_scores(self) -> bool:
        """Whether the first forwards and draws are compared with plain ones."""
        return self._guard.enabled

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """The arguments that the chat template gets besides the messages of a prompt."""
        return self._encoder.chat_template_kwargs

    def around(self, model: nn.Module) -> LanguageModel:
        """Return this language model around another module that computes the same, such as a wrapper by DDP."""
        disable_dropout(model)
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
        eos_token_id: int | Sequence[int] | Tensor | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        check_scores: bool = True,
        logits_dtype: torch.dtype | str = "float32",
        **kwargs: Any,
    ) -> LanguageModel:
        """Load model and tokenizer by transformers' ``AutoModelForCausalLM`` and ``AutoTokenizer``.

        Args:
            name_or_path: ``tiny-bios``, which ships with dmfast; a folder; or a name on the hub.
            dtype: the dtype of the parameters. Default: transformers', which is that of the checkpoint.
            device: the device of the model. Default: where transformers puts it.
            eos_token_id, chat_template_kwargs, check_scores, logits_dtype: as in ``LanguageModel``.
            kwargs: arguments of the model's ``from_pretrained``. Those that say where it comes from (``revision``,
                ``token``, ``cache_dir``, ``local_files_only``, ``trust_remote_code``, ...) go to the tokenizer's, too.

        Raises:
            ImportError: transformers is not installed.
            OSError, ValueError: as transformers, and as ``LanguageModel``.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name_or_path = located(name_or_path)
        where = {name: value for name, value in kwargs.items() if name in _WHERE_FROM}
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **where)
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path, **({} if dtype is None else {"dtype": dtype}), **kwargs
        )
        return cls(
            model if device is None else model.to(device), tokenizer, eos_token_id=eos_token_id,
            chat_template_kwargs=chat_template_kwargs, check_scores=check_scores, logits_dtype=logits_dtype,
        )  # fmt: skip

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """Replace this model's parameters and buffers by those of another: q <- pi. Devices and dtypes stay.

        Args:
            source: a model of the same architecture, or a folder that its ``save_pretrained`` wrote. The folder may
                hold an adapter, if this model has one of the same kind around the same base.

        Raises:
            TypeError: the source is neither a model nor a folder.
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
        """Return the tensors that this model computes with, by the names of ``adapters.tensors``."""
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
        mine = without_adapters(module_of(self))
        kind: Any = sharding.class_of(mine)
        spread = getattr(mine, "is_distributed_loading_by_transformers", False)
        how = {"distributed_config": mine.config.distributed_config} if spread else {}  # each process reads its parts
        return adapters.tensors(kind.from_pretrained(folder, local_files_only=True, **how))

    def base(self) -> LanguageModel:
        """Return the pretrained model below a PEFT model's adapter.

        It is the same module, with the adapter switched off in each forward. It takes no memory of its own and is
        frozen. An ``EBM`` around it makes a, pi and q share one backbone.

        Raises:
            ValueError: ``model`` is not a PEFT model, or its adapter can't be switched off (see ``AdapterView``).
        """
        return AdapterView(self)

    def _encode(self, prompts: Sequence[Prompt] | Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens of left-padded prompts and their mask, (P, L) each."""
        return self._encoder.left_padded(list(self._encoder(prompts)), self.device)

    def with_prompt(self, samples: Samples, prompt: Prompt) -> Samples:
        """Return the same continuations after another prompt, which is the same for all.

        ``log_prob`` stays that of the distribution that they were drawn from. ``context_id`` becomes 0.

        Raises:
            ValueError: as ``sample`` of the prompt; also if prompt and continuation are beyond the model's context.
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

    def check_prompts(self, prompts: Sequence[Prompt], max_new_tokens: int, longest: int | None = None) -> list[int]:
        """Check that all prompts can be sampled from, and return the number of tokens of each.

        Args:
            prompts, max_new_tokens: as in ``sample``.
            longest: the most tokens of a prompt that is used. Longer prompts need not fit.

        Raises:
            TypeError, ValueError: as ``sample`` of a prompt. The message has the place of the prompt.
        """
        context, lengths = self._context, []
        for i, ids in enumerate(self._encoder(prompts)):
            lengths.append(len(ids))
            left_out = longest is not None and len(ids) > longest
            if context is not None and len(ids) + max_new_tokens > context and not left_out:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that is beyond the "
                    f"model's context of {context}{self._why_context}"
                )
        return lengths

    def samples_of(
        self,
        prompts: Sequence[Prompt] | Tensor | None,
        completions: Sequence[str | Sequence[int] | Tensor],
        *,
        append_eos: bool | Sequence[bool],
        eos_token_id: int | None = None,
        log_prob: Sequence[float] | Tensor | None = None,
        score_mask: Sequence[Sequence[bool] | Tensor] | None = None,
        temperature: float = 1.0,
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> Samples:
        """Return sequences that came from elsewhere, such as a file or another engine, as ``Samples`` of this model.

        With log q they train like any others. Without it they can be scored, and trained on by likelihood:
        ``loss(samples, objective="reinforce", on_policy=True, reward=torch.ones(len(samples)))``.

        Args:
            prompts: as in ``sample``, one for each completion. None is the empty prompt for all of them.
            completions: N lists of token ids, as they were drawn; or strings, which are tokenized anew, apart from
                their prompts and without special tokens around them.
            append_eos: whether EOS is put after a completion that does not end in one; one bool for all, or one for
                each. A whole answer has ended, and one that was cut at a length has not. With ``log_prob`` EOS is never
                put after a completion, because ``log_prob`` would not cover it.
            eos_token_id: the EOS that is appended. Default: the first of ``eos_token_ids``, which is the tokenizer's. A
                chat model may end its turn with another.
            log_prob: (N,) float32 or float64, log q(x) in nats, of the distribution at ``temperature`` that the token
                ids were drawn from. It includes EOS, which is then among the ids. None says that it is unknown.
            score_mask: for each completion as many bools as it has token ids: True for a token that was drawn, and
                False for context that came in between, such as a tool's output or another speaker's turn. Context feeds
                the model, and has no part in ``log_prob`` (this one and that of any scorer), in the loss, in the length
                or in ``text``. An EOS that was drawn may then end a turn, before context. None says that all tokens
                were drawn.
            temperature: the temperature at which they were drawn and are scored.
            rows: for each completion the row of its data set, which scorers see as ``samples.rows``.

        Returns:
            ``Samples``, N sequences. ``context_id`` numbers different prompts in the order in which they come.

        Raises:
            TypeError: an argument has another type.
            ValueError: the numbers of prompts, completions and ``log_prob`` differ; there are tokens after an EOS; a
                completion has no token that was drawn; log_prob or score_mask is given for strings; a log_prob is of a
                completion that ``append_eos`` would add to, is not finite or is above 0; a score_mask has another
                length, or ends in context with ``append_eos``; the temperature is not a positive, finite number; prompt
                and completion are beyond the model's context; or as ``sample`` of a prompt.
        """
        samples = samples_of(
            self._encoder, self.eos_token_ids, prompts, completions, append_eos=append_eos, eos_token_id=eos_token_id,
            log_prob=log_prob, score_mask=score_mask, temperature=temperature, rows=rows, device=self.device,
        )  # fmt: skip
        context = self._context
        longest = samples.attention_mask.sum(1)
        if context is not None and int(longest.max()) > context:
            raise ValueError(
                f"prompt and completion {int(longest.argmax())} have {int(longest.max())} tokens, beyond the model's "
                f"context of {context}{self._why_context}"
            )
        return samples

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt] | Tensor | None = None,
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
            prompts: strings, lists of token ids (or a (P, L) tensor of them), or lists of chat messages. Messages go
                through the tokenizer's chat template; if the last one is the assistant's, it is continued. None is the
                one empty prompt. An EOS that the tokenizer appends to a string is left out, and so is a second BOS.
            n: sequences per prompt. Those of a prompt lie together.
            max_new_tokens: the most tokens of a sequence, which ends there if there was no EOS.
            temperature: the temperature, positive.
            seed: the seed. A draw is a function of it, of each sequence's place among the N, and of the model's logits.
                None takes a seed from torch's global generator.
            batch_size: sequences at a time. Default: all.
            first_row: the place of the first sequence among those of all processes, if these are one process's share.

        Returns:
            ``Samples`` with log q, N = n * number of prompts.

        Raises:
            TypeError: the prompts have another type, such as a tokenizer's padded output.
            ValueError: n, max_new_tokens or batch_size is not a positive integer; temperature is not a positive number;
                there is no prompt; a prompt leaves no room in the model's context; token ids have padding; a message
                has an image; the chat template fails; the tokenizer does not fit the model; or the model's logits are
                not a distribution (NaN, +inf, or nothing but -inf), on any device.
        """
        check_counts(n=n, max_new_tokens=max_new_tokens, batch_size=1 if batch_size is None else batch_size)
        check_temperature(temperature)
        self._check_placed()
        prompt, prompt_mask = self._encode(prompts)
        context = self._context
        if context is not None and prompt.shape[1] + max_new_tokens > context:
            raise ValueError(
                f"the longest prompt has {prompt.shape[1]} tokens; with max_new_tokens={max_new_tokens} that is beyond "
                f"the model's context of {context}{self._why_context}"
            )
        if seed is None:
            seed = tensor_parallel.from_first(self.model, int(torch.randint(2**63 - 1, ())))
        context_id = torch.arange(prompt.shape[0], device=self.device).repeat_interleave(n)

        def draw() -> Samples:
            batches = torch.split(torch.arange(len(context_id), device=self.device), batch_size or len(context_id))
            if not self._guard.padded:
                lengths = prompt_mask.sum(1)[context_id]
                whole = len(batches)
                batches = tuple(ids[lengths[ids] == length] for ids in batches for length in set(lengths[ids].tolist()))
                if self.in_step and len(batches) > whole:
                    raise ValueError(
                        f"{self._kind} can't take prompts of several lengths in one batch, and "
                        "with gather_for_sampling=False all processes must run the same number of forwards: give all "
                        "prompts of a step one length, or set gather_for_sampling=True"
                    )
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
            with self._ready_to_sample():
                self._probe(prompt, prompt_mask)
                samples = draw()
                while not self._guard.check(self, samples):
                    samples = draw()
        finally:
            for module in training:
                module.training = True
        self._head.agree(self.model)
        sharding.reshard(self.model)
        if not self._guard.cached:
            self._say(
                f"dmfast runs the whole sequence in each step of sampling from {self._kind}, "
                f"which takes more time: {self._guard.why_uncached}"
            )
        bad = samples.log_prob.isnan()  # the CPU raises this error at once, and a GPU records it as NaN
        if bool(bad.any()):
            raise ValueError(
                f"the model's logits hold NaN or +inf, or nothing but -inf, in {int(bad.sum())} of {len(samples)} "
                f"sequences, first in sequence {int(bad.nonzero()[0, 0])}: there is no distribution to draw from"
            )
        return samples

    def _ready_to_sample(self) -> AbstractContextManager[None]:
        """Make a sharded model whole within a block, unless all ranks run each forward together.

        Raises:
            ValueError: the model stays sharded, and its scores have not been checked yet.
        """
        if self.gather_for_sampling or not sharding.is_sharded(self.model):
            return sharding.gathered(self.model)
        if self._guard.to_check:
            raise ValueError(
                "gather_for_sampling=False leaves the model sharded, and check_scores=True compares scores with draws "
                "in forwards whose number differs by rank: set check_scores=False, after a run of the same model "
                "with gather_for_sampling=True has passed the check"
            )
        return nullcontext()

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
            last_logits=lambda forward: self._head.last_logits(self.model, forward), others=self._others(),
            share=self._shares_prompts,
        )  # fmt: skip
        self._guard.cached, self._shares_prompts = drawn.cached, drawn.shared
        score = drawn.mask.bool()
        score[:, : prompts.shape[1]] = False
        return Samples(
            drawn.tokens, drawn.mask, score, prompts.shape[1], drawn.log_prob, context_id, temperature, self.tokenizer,
            self.pad_token_id, torch.full_like(context_id, self.version), eos_token_ids=tuple(self.eos_token_ids),
        )  # fmt: skip

    def _say(self, message: str) -> None:
        """Warn once, at the line that called dmfast."""
        if message not in self._said:
            self._said.add(message)
            warn_caller(message)

    def _say_why_logits(self) -> None:
        self._say(f"dmfast forms all logits of {self._kind}, which takes more memory: {self._head.why_not(self.model)}")

    def _say_what_on_policy_neglects(self, dtype: torch.dtype, options: Mapping[str, Any]) -> None:
        if options.get("on_policy") is True and dtype in SIXTEEN_BIT:
            self._say(
                f"on_policy=True sets the importance ratio to 1, but the model computes in {dtype}: by rounding, log "
                "pi of a sample is not quite the log q that it was drawn with. on_policy=False would correct that"
            )

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return log pi(x) of each sequence under this model at the samples' temperature, differentiable.

        If ``hidden_and_head`` serves the model, it is made from hidden states and head, so that the logits never exist
        all at once.

        Args:
            samples: N sequences.
            batch_size: sequences at a time. Default: all.

        Returns:
            (N,) fp64, nats.
        """
        size = max(batch_size or len(samples), 1)
        batches = [samples[start : start + size].trimmed() for start in range(0, len(samples), size)]
        fewer = self._fewer_than_others(len(batches))
        parts = []
        for batch in batches:
            log_prob, formed = self._in_forward(batch, lambda batch=batch: self._score(batch))  # type: ignore[misc]
            if formed:
                self._say_why_logits()
            parts.append(log_prob)
        for _ in range(fewer):
            one = self._any_sample(samples)
            self._in_forward(one, lambda one=one: self._score(one))  # type: ignore[misc]
        return torch.cat(parts) if parts else samples.log_prob.new_empty(0)

    @torch.no_grad()
    def token_log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return log pi of each of ``samples.tokens`` given those before it, without a gradient.

        It is at the samples' temperature. A ``token_weight`` of ``loss`` can be made of it: once under q, when a batch
        was drawn, and under the policy in each step.

        Args:
            samples, batch_size: as in ``log_prob``.

        Returns:
            (N, T) fp64, nats; 0 where a token is not scored.
        """
        size = max(batch_size or len(samples), 1)
        found = torch.zeros(samples.tokens.shape, dtype=torch.float64, device=samples.tokens.device)
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            short = part.trimmed()
            width = short.tokens.shape[1] - short.prompt_len
            out = self.loss(short, objective=_no_weight)
            # the label of a token is at the position before it, and the last position predicts nothing
            values = out.check().token_log_prob[:, -width - 1 : -1]
            found[start : start + size, part.prompt_len : part.prompt_len + width] = values
        return found

    def _fewer_than_others(self, batches: int) -> int:
        """Return how many batches this rank has fewer than the rank with the most; 0 if ranks run forwards alone.

        Raises:
            ValueError: the numbers of batches differ, and a gradient is wanted.
        """
        if not self.in_step:
            return 0
        most, fewest = sharding.most(self.model, batches), -sharding.most(self.model, -batches)
        if torch.is_grad_enabled() and most > fewest:
            raise ValueError(
                "log_prob with a gradient needs equally many batches on all ranks of a model that FSDP has sharded; "
                f"they have from {fewest} to {most} batches, and this rank has {batches}"
            )
        return most - batches

    def _any_sample(self, like: Samples) -> Samples:
        """Return a sequence for a forward in which this rank only takes part."""
        tokens = torch.full((1, 2), self.eos_token_ids[0], device=self.device)
        ones, zeros = torch.ones_like(tokens), torch.zeros_like(tokens[:, 0])
        return replace(
            like, tokens=tokens, attention_mask=ones, score_mask=ones.cumsum(1) == 2, prompt_len=1,
            log_prob=zeros.double(), context_id=zeros, version=zeros, rows=None,
        )  # fmt: skip

    def loss(self, samples: Samples, **options: Any) -> DMLossOutput:
        """Return ``dm_loss`` of this model on the samples, at their temperature: its forward and the fused loss.

        If ``hidden_and_head`` serves the model, it is made from hidden states and head, so that the logits never exist
        all at once.

        Args:
            samples: N sequences.
            options: those of ``linear_dm_loss`` from ``log_target`` on, but for ``temperature``, ``softcap``,
                ``cu_seqlens`` and ``logits_dtype``, which follow from the model and the samples. ``token_weight`` is
                (N, T), a weight for each of ``samples.tokens``. Only the weights of scored tokens count.

        Returns:
            ``DMLossOutput``; ``loss`` carries the gradient of the model's parameters.

        Raises:
            TypeError, ValueError: as ``dm_loss``. Also if there are no samples, or the weights depend on log q and the
                samples have none.
        """
        if len(samples) == 0:
            raise ValueError("samples is empty: there is nothing for the model's forward to take")
        if "logits_dtype" in options:
            raise TypeError("logits_dtype is LanguageModel's argument, because sampler and loss need the same one")
        if not samples.has_log_prob:
            check_unknown_proposal(options)
        token_weight = options.pop("token_weight", None)
        _check_token_weight(token_weight, samples)
        whole, samples = samples, samples.trimmed()
        if token_weight is not None:
            after = slice(whole.prompt_len, whole.prompt_len + samples.tokens.shape[1] - samples.prompt_len)
            # weights are placed as the labels are, and the last position predicts nothing
            options["token_weight"] = nn.functional.pad(token_weight[:, after], (0, 1))
        return self._in_forward(samples, lambda: self._loss(samples, options), lambda out: out.loss)

    def _loss(self, samples: Samples, options: dict[str, Any]) -> DMLossOutput:
        found = self._hidden(samples)
        if found is not None:
            self._say_what_on_policy_neglects(found.weight.dtype, options)
            return linear_dm_loss(
                found.hidden, found.weight, found.labels, bias=found.bias, softcap=found.softcap,
                temperature=samples.temperature / found.scale, logits_dtype=self.logits_dtype, **options,
            )  # fmt: skip
        self._say_why_logits()
        options.pop("chunk_bytes", None)
        logits, labels = self._logits(samples)
        if "token_weight" in options:
            ahead = labels.shape[1] - options["token_weight"].shape[1]
            options["token_weight"] = nn.functional.pad(options["token_weight"], (ahead, 0))
        self._say_what_on_policy_neglects(logits.dtype, options)
        return dm_loss(logits, labels, temperature=samples.temperature, inplace=not logits.is_leaf, **options)


class AdapterView(LanguageModel):
    """A policy's backbone under another of its adapters, or under none. It is frozen: nothing has a gradient.

    Args:
        policy: a ``LanguageModel`` around a ``peft.PeftModel`` with one active adapter of LoRA's kind.
        adapter: the name of the other adapter, or None for the pretrained model without an adapter.

    Raises:
        ValueError: the adapters of the policy's model can't be switched (it is not a PEFT model, or has
            ``modules_to_save``, trained biases, a merged adapter, several active ones, ...); the model has no adapter
            of this name; or the adapter is the policy's own.
    """

    def __init__(self, policy: LanguageModel, adapter: str | None = None) -> None:
        model: Any = policy._unwrapped()
        trained = adapters.check(model)
        if adapter is not None and adapter not in model.peft_config:
            raise ValueError(f"the model has no adapter {adapter!r}, only {', '.join(model.peft_config)}")
        if adapter == trained:
            raise ValueError(f"the adapter {adapter!r} is the policy's, which moves; a view of it would move too")
        super().__init__(
            model, policy.tokenizer, eos_token_id=policy.eos_token_ids, logits_dtype=policy.logits_dtype,
            chat_template_kwargs=policy.chat_template_kwargs,
        )  # fmt: skip
        self._guard, self._said = policy._guard, policy._said
        self.gather_for_sampling, self.packs = policy.gather_for_sampling, policy.packs
        self.adapter = adapter
        self._config = model.peft_config.get(adapter)

    def _tensors(self) -> dict[str, Tensor]:
        self.check_there()
        return adapters.tensors_under(self.model, self.adapter)

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """Replace the adapter's weights: q <- pi.

        Args:
            source: the policy that this is a view of, another view of its model, or a folder with an adapter.

        Raises:
            TypeError: this is a view under no adapter, or the source is another model, whose base may be another.
            FileNotFoundError, RuntimeError: as ``LanguageModel.load``; the adapter stays as it was.
        """
        if self.adapter is None:
            raise TypeError("this AdapterView is the base, without an adapter, so there is nothing to load into")
        if not isinstance(source, (str, os.PathLike)) and module_of(source) is not self.model:
            raise TypeError(
                "an AdapterView loads what is an adapter of its own model, the policy or a folder that has one saved; "
                f"the source, a {type(source).__name__}, is another model, whose base may be another"
            )
        copy_into(of_adapter(self._tensors()), of_adapter(self._given(source)))

    def check_there(self) -> None:
        """Check that the adapter is the one that this is a view of.

        Raises:
            RuntimeError: it was deleted, or another of its name took its place, as that of a newer proposal does.
        """
        model: Any = self.model
        if self.adapter is not None and model.peft_config.get(self.adapter) is not self._config:
            raise RuntimeError(
                f"the adapter {self.adapter!r} that this is a view of was deleted or replaced (a newer OfflineProposal "
                "of the same model takes the place of an older one); make a new trainer or proposal"
            )

    def sample(self, *args: Any, **kwargs: Any) -> Samples:
        """Draw as ``LanguageModel.sample`` does."""
        self.check_there()
        with self._ready_to_sample(), adapters.switched(self.model, self.adapter):
            return super().sample(*args, **kwargs)

    @torch.no_grad()
    def _run(self, tokens: Tensor, **inputs: Any) -> Any:
        self.check_there()
        with adapters.switched(self.model, self.adapter):
            return super()._run(tokens, **inputs)

    def loss(self, samples: Samples, **options: Any) -> NoReturn:
        """Refuse: a view has no gradient.

        Raises:
            TypeError: always.
        """
        raise TypeError("an AdapterView is frozen, so it has no loss; call loss of the policy's own LanguageModel")


def _no_weight(terms: Terms) -> Tensor:
    assert terms.log_prob is not None
    return torch.zeros_like(terms.log_prob)


def _check_token_weight(token_weight: Any, samples: Samples) -> None:
    if token_weight is None:
        return
    if not isinstance(token_weight, Tensor) or token_weight.shape != samples.tokens.shape:
        got = tuple(token_weight.shape) if isinstance(token_weight, Tensor) else f"{token_weight!r:.100}"
        raise ValueError(
            f"token_weight must have a weight for each of samples.tokens, {tuple(samples.tokens.shape)}, prompt and "
            f"padding included, got {got}"
        )


def _is_adapter(source: Source) -> bool:
    """Return whether this is a folder that holds an adapter and not a whole model."""
    return isinstance(source, (str, os.PathLike)) and (Path(source) / "adapter_config.json").is_file()


def of_adapter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors among those of ``adapters.tensors`` that belong to an adapter."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(adapters.ADAPTER)}
