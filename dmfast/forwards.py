"""Run a model on samples, and return the hidden states, the logits or the scores of their tokens.

A batch is laid out left-padded, by the length of its prompts, or end to end in fewer rows, whichever the model can take
and computes the least. The logits come from the model, or from its hidden states and head.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import sharding
from .decoding import positions_of, without_advice_on_masks
from .families import context_length, disable_dropout, execution_device, text_inputs, without_adapters
from .functional import linear_sequence_log_prob, sequence_log_prob, shift_labels
from .guard import Guard
from .head import SIXTEEN_BIT, HeadProbe, HiddenAndHead, unwrapped
from .kernels.batch import IGNORE
from .packing import Costs, Packed, arrange, costs_of, pack
from .samples import Samples

_T = TypeVar("_T")


class Forwards:
    """Run forwards of a model, with what is known about feeding it. ``LanguageModel`` is made of this.

    Args:
        model: as in ``LanguageModel``. All dropout and router jitter is set to 0.
        pad_token_id: the token that pads a batch.
        check_scores, logits_dtype: as in ``LanguageModel``.
    """

    _gathers_zero = False  # whether this class gathers parameters that DeepSpeed's ZeRO-3 has cut

    def __init__(self, model: nn.Module, pad_token_id: int, *, check_scores: bool, logits_dtype: str) -> None:
        self.model, self.pad_token_id = model, pad_token_id
        self.vocab_size = vocab_size_of(model)
        disable_dropout(model)
        # the forward of a PEFT model takes **kwargs, so its signature does not show the argument
        self._keeps_logits = "logits_to_keep" in inspect.signature(without_adapters(model).forward).parameters
        self._text_inputs, self._context = text_inputs(model), context_length(model)
        self._guard = Guard(model, check_scores)
        self.logits_dtype = logits_dtype
        self._head = HeadProbe(logits_dtype)
        self.packs = True
        self._costs: Costs | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return execution_device(self.model)

    @property
    def in_step(self) -> bool:
        """Whether all ranks run each forward together, so that all of them must call whatever runs one."""
        return sharding.in_step(self.model)

    def _others(self) -> Callable[[bool], bool] | None:
        """Return a function that tells whether any rank goes on drawing, from whether this one does.

        It is None if ranks draw independently of each other.
        """
        if not sharding.in_step(self.model):
            return None
        return lambda mine: bool(sharding.most(self.model, mine))

    def _in_forward(
        self, samples: Samples, function: Callable[[], _T], outputs: Callable[[Any], object] = operator.itemgetter(0)
    ) -> _T:
        """Run a function that needs the parameters of a sharded model within one of its forwards.

        Args:
            samples: the samples that it runs on. The model is probed with them first.
            function, outputs: as in ``sharding.call``.
        """
        self._probe(samples.tokens, samples.attention_mask)
        return sharding.call(self.model, function, outputs)

    def logits(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return logits and the labels that they score, for ``dm_loss``: (N, K, V) and (N, K) int64, -100 = not scored.

        It takes one forward through the model, with a gradient if grad mode is on. If the model can't take prompts of
        several lengths padded, it takes one forward for each length. K is T, or the continuation and the position
        before it if the model can leave out the logits of the prompt. The logits of a 16-bit head are made from its
        hidden states in fp32, as in the losses.
        """
        return self._in_forward(samples, lambda: self._logits(samples))

    def _logits(self, samples: Samples) -> tuple[Tensor, Tensor]:
        if self._head.unknown(self.model):
            with torch.no_grad():
                self._hidden(samples[:1])
        found = self._hidden(samples) if self._head.rounds(self.model) else None
        if found is not None:
            return found.logits(), found.labels
        labels = self._labels(samples)
        parts = self._laid_out(samples)
        if parts is not None:
            kept = slice(-labels.shape[1], None)
            return _joined([(places, self._forward(part).logits[:, kept]) for places, part in parts]), labels
        logits = self._forward(samples).logits
        ahead = logits.shape[1] - labels.shape[1]
        return logits, nn.functional.pad(labels, (ahead, 0), value=IGNORE) if ahead else labels

    def _labels(self, samples: Samples) -> Tensor:
        """Return the labels for the continuation and the position before it, (N, K) int64."""
        labels = shift_labels(samples.tokens, samples.score_mask, samples.prompt_len)
        return labels[:, samples.prompt_len - 1 :]

    def _laid_out(self, samples: Samples) -> list[tuple[Tensor, Samples]] | None:
        """Return the samples by the length of their prompts, or None if the model can take them padded."""
        self._check_placed()
        self._probe(samples.tokens, samples.attention_mask)
        if self._guard.padded or bool(samples.attention_mask[:, : samples.prompt_len].all()):
            return None
        parts = samples.by_prompt_length()
        if len(parts) > 1 and (self.model is not self._unwrapped() or sharding.in_step(self.model)):
            raise ValueError(
                f"{self._kind} can't take prompts of several lengths in one batch, and under "
                f"{'FSDP' if sharding.is_sharded(self.model) else 'DDP'} all processes must run the same number of "
                "forwards: give all prompts of a microbatch one length"
            )
        return parts

    def _check_placed(self) -> None:
        if not self._gathers_zero and sharding.is_cut_by_zero(self.model):
            raise ValueError(
                f"DeepSpeed's ZeRO-3 has cut the parameters of the {self._kind}, which LanguageModel needs whole "
                "outside of DMTrainer: train by that, take ZeRO-2, or make it a "
                "dmfast.training.deepspeed.PartitionedModel, as docs/scale.md shows"
            )
        if self.device.type == "meta":
            raise ValueError(
                f"the parameters of the {self._kind} are on the device meta, without values: "
                "load the model with its weights, or dispatch it by accelerate, whose hooks say where it runs"
            )

    def _probe(self, tokens: Tensor, mask: Tensor) -> None:
        """Probe how the model takes a batch, before its first forward."""
        self._guard.probe(self, tokens, mask)

    def _inputs(self, mask: Tensor) -> dict[str, Tensor]:
        """Return the arguments of a whole forward besides its tokens."""
        first = self._guard.first_position
        positions = {} if first is None else {"position_ids": positions_of(mask) + first}
        return {"attention_mask": mask, **positions, **{name: torch.zeros_like(mask) for name in self._text_inputs}}

    def _forward(self, samples: Samples) -> Any:
        """Run one forward, without the logits of the prompt if the model can leave them out."""
        kept = samples.tokens.shape[1] - samples.prompt_len + 1
        more = {"logits_to_keep": kept} if self._keeps_logits else {}
        return self._run(samples.tokens, **self._inputs(samples.attention_mask), **more)

    def _run(self, tokens: Tensor, **inputs: Any) -> Any:
        """Run one forward of the model, with a gradient if one is wanted."""
        return sharding.forward_of(self.model)(input_ids=tokens, use_cache=False, **inputs)

    @property
    def why_padded(self) -> str | None:
        """The reason why sequences of several lengths are never packed, or None if they are where this computes less.

        The first forward tells whether the model can take packed sequences.
        """
        if not self.packs:
            return "packs is False"
        if not self._guard.packed:
            return self._guard.why_padded
        fault = self._head.why_not(self.model)
        if fault is not None:
            return f"all logits are formed: {fault}"
        if self._costs is None:
            self._costs = costs_of(self._unwrapped())
        if self._costs is None:
            return "the model's configuration has no hidden_size and num_hidden_layers, by which its cost is estimated"
        dtype = self._in_16_bits()
        if dtype is not None and not self._costs.varlen:  # without varlen, most of a packed row's attention is masked
            what = f"{dtype}, or in TF32, which has the precision of float16"
            return f"attention over longer rows rounds otherwise than the sampler's in {what}"
        return None

    def _in_16_bits(self) -> torch.dtype | None:
        """Return the 16-bit dtype that the model computes in, or None, as far as it is known before a forward."""
        device = self.device.type
        cast_to = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        seen = (self._guard.rounding, self._unwrapped().get_input_embeddings().weight.dtype, cast_to)
        return next((dtype for dtype in seen if dtype in SIXTEEN_BIT), None)

    def _packed(self, samples: Samples) -> Packed | None:
        """Return the samples laid end to end, or None if padding them computes no more or is the only way."""
        if self.why_padded is not None:
            return None
        assert self._costs is not None
        rows = arrange(samples.attention_mask.sum(1).tolist(), self._costs, self._context)
        return None if rows is None else pack(samples, rows)

    def _forward_packed(self, packed: Packed) -> Any:
        """Run one forward over sequences that lie end to end, which the model tells apart by their positions."""
        first = self._guard.first_position
        assert first is not None
        more = {name: torch.zeros_like(packed.tokens) for name in self._text_inputs}
        with without_advice_on_masks():  # with a mask the sequences of a row would see each other
            return self._run(packed.tokens, position_ids=packed.positions + first, **more)

    def hidden_and_head(self, samples: Samples) -> HiddenAndHead:
        """Return the hidden states and the head that the logits are made of, for ``linear_dm_loss``.

        It takes one forward, in which the head projects nothing. The forward is the model's own, so that its hooks,
        adapters and checkpointing run.

        Raises:
            ValueError: the model's logits are not a plain nn.Linear of hidden states, scaled and capped by constants of
                its config. The head is quantised, sharded, offloaded or has an adapter, or the logits are processed in
                another way, which the first use finds by comparing a few. ``logits`` serves such models.
        """
        if sharding.is_sharded(self.model):
            raise ValueError(
                "hidden_and_head: FSDP has whole parameters within a forward only, and starts backward at what it "
                "returns; use loss(), log_prob() or logits()"
            )
        found = self._hidden(samples)
        if found is None:
            raise ValueError(f"hidden_and_head: {self._head.why_not(self.model)}; use logits() and dm_loss")
        return found

    def _hidden(self, samples: Samples) -> HiddenAndHead | None:
        """Return ``hidden_and_head``, or None if ``HeadProbe.why_not`` gives a reason why it can't be had."""
        parts = self._laid_out(samples)
        packed = self._packed(samples)  # this comes second, because only a model that takes padding may take packing
        if packed is not None:
            read = self._head.read(self.model, packed.tokens, lambda: self._forward_packed(packed))
            if read is None:
                return None
            labels = self._labels(samples)
            return read._replace(hidden=packed.padded(read.hidden, labels.shape[1]), labels=labels)
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
        """Return the module itself, without the wrappers of DDP and torch.compile."""
        return module_of(self)

    @property
    def _kind(self) -> str:
        """The name of the model's class."""
        return sharding.class_of(self._unwrapped()).__name__

    def _unwrapped(self) -> Any:
        """Return the model without DDP around it."""
        return unwrapped(self.model)

    def _score(self, samples: Samples) -> tuple[Tensor, bool]:
        """Return log pi, (N,) fp64, and whether all logits were formed for it."""
        found = self._hidden(samples)
        if found is None:
            logits, labels = self._logits(samples)
            inplace = not logits.is_leaf
            return sequence_log_prob(logits, labels, temperature=samples.temperature, inplace=inplace), True
        log_prob = linear_sequence_log_prob(
            found.hidden, found.weight, found.labels, bias=found.bias, softcap=found.softcap,
            temperature=samples.temperature / found.scale, logits_dtype=self.logits_dtype,
        )  # fmt: skip
        return log_prob, False


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the rows of several parts in the order of their places."""
    places = torch.cat([each for each, _ in parts])
    return torch.cat([rows for _, rows in parts])[places.argsort()]


def vocab_size_of(model: Any) -> int:
    """Return the number of tokens that a model's embedding has."""
    size: int = model.get_input_embeddings().weight.shape[0]
    return size


def module_of(source: Forwards | nn.Module) -> Any:
    """Return the module itself, without the wrappers of DDP and torch.compile."""
    module = unwrapped(source.model if isinstance(source, Forwards) else source)
    return getattr(module, "_orig_mod", module)
