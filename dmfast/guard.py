"""Check on the model itself that it scores what it draws, because no list of models is complete.

Before the first forward a probe finds out how to lay out a batch: whether position ids mean the model's own positions,
and whether left padding leaves a sequence's probabilities unchanged. After the first draw two of its sequences are
scored as the trainer scores them, and alone. Both scores must equal the log q that they were drawn with. Nothing may be
random in training mode. Two scorings can agree by chance, so the check looks for the use of random numbers itself.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import sharding
from .decoding import positions_of, without_advice_on_masks
from .draws import random_draw
from .families import attends_by_flash, first_position, text_config, without_adapters
from .head import HeadProbe
from .samples import Samples

_PROBE, _PADS = 8, 3
#: The errors that a model may raise at inputs that it can't take.
_FAULTS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
#: The most that two scorings of one batch may differ by where nothing is random, in nats per sequence.
_REPEATED, _REPEATED_RELATIVE = 1e-3, 1e-6
_KNOWN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PART = 0.1  # a dtype counts if it rounds at least this share of the parameters' elements


class Guarded(Protocol):
    """The parts of a model (``Forwards``) that the guard uses to probe and check it."""

    model: nn.Module
    vocab_size: int
    pad_token_id: int
    _context: int | None
    _text_inputs: list[str]
    _head: HeadProbe

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        ...

    def _module(self) -> Any: ...

    def _inputs(self, mask: Tensor) -> dict[str, Tensor]: ...

    def _score(self, samples: Samples) -> tuple[Tensor, bool]: ...


class Guard:
    """The knowledge about how to feed a model. The copies of a ``LanguageModel`` share it.

    Attributes:
        first_position: the position id of the first token. None: the model is given no position ids and counts itself.
        padded: whether sequences with prompts of several lengths go together, left-padded.
        packed: whether the model takes sequences that lie end to end in a row, told apart by their position ids.
        rounding: the dtype that limits the precision of the logits, once a forward has shown it.
        cached: whether the model is sampled with a cache.
        enabled: whether the model is probed and checked. Otherwise only the signature of its forward is used.
    """

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        parameters = inspect.signature(without_adapters(model).forward).parameters
        self.enabled = enabled
        self.padded = self._named = "position_ids" in parameters
        self.first_position = first_position(model) if self._named else None
        self.packed = False
        self.rounding: torch.dtype | None = None
        self.why_padded = "no forward has shown yet whether the model can take sequences end to end in a row"
        if not enabled:
            self.why_padded = "check_scores=False: nothing shows that the model can take sequences end to end in a row"
        self.cached = True
        self.why_uncached = "its forward returns nothing to go on from"
        self._required = {name for name, each in parameters.items() if each.default is inspect.Parameter.empty}
        self._probed = not enabled
        self._checked: set[bool] = {True, False} if not enabled else set()

    @property
    def to_check(self) -> bool:
        """Whether the next draw will be checked."""
        return False not in self._checked

    # ---- before the first forward

    @torch.no_grad()
    def probe(self, lm: Guarded, tokens: Tensor, mask: Tensor) -> None:
        """Find out ``first_position``, ``padded`` and ``packed`` from four forwards of a few tokens, once.

        Ranks that hold a sharded model together call it together, and go on in the same way.

        Args:
            lm: the model.
            tokens: (N, T) int64, of which the first row is used.
            mask: (N, T) int64, 0 on padding.
        """
        if self._probed:
            return
        self._probed = True
        context = lm._context or _PROBE + _PADS
        length = min(_PROBE, context - _PADS)
        if length < 2:
            return
        row = tokens[0][mask[0].bool()]
        ids = row.repeat(_PROBE // len(row) + 1)[None, :length]
        with _undisturbed(lm, training=False), _rounding_of(lm) as rounding:
            with _naming(lm, f"of {length} tokens"):
                expected = self._plain(lm, ids)
            unit = _unit(rounding(), _size(expected.amax(-1)))
            optional = self._named and "position_ids" not in self._required
            differs = optional and _differ(self._whole(lm, ids, torch.ones_like(ids)), expected, unit)
            if not sharding.agree(lm.model, not differs):
                self.first_position = None
            pads = torch.full((1, _PADS), lm.pad_token_id, device=ids.device)
            both = torch.cat([torch.cat([pads, ids[:, :-1]], 1), torch.cat([pads[:, 1:], ids], 1)])
            seen = torch.ones_like(both)
            seen[0, :_PADS], seen[1, : _PADS - 1] = 0, 0
            found = self._whole(lm, both, seen)
            padded = (self.first_position is None) != self._named and not (
                found is None
                or _differ(found[:1, _PADS:], expected[:, :-1], unit)
                or _differ(found[1:, _PADS - 1 :], expected, unit)
            )
            self.padded = sharding.agree(lm.model, padded)
            fault = self._why_not_packed(lm, ids, expected, unit)
            self.packed = sharding.agree(lm.model, fault is None)
            self.why_padded = fault or "another rank's model can't take sequences end to end in a row"
            self.rounding = rounding()
        sharding.reshard(lm.model)

    def _why_not_packed(self, lm: Guarded, ids: Tensor, expected: Tensor, unit: float) -> str | None:
        """Return why the model can't take sequences end to end in a row, or None where it can.

        Args:
            lm: the model.
            ids: (1, T) int64, a sequence that is put into rows of three, behind another one and before it.
            expected: (1, T, V), the logits of the sequence alone.
            unit: as in ``_unit``.
        """
        length, context = ids.shape[1], lm._context
        if not self.padded or self.first_position is None:
            return "the model's forward takes no position ids by which sequences in a row could be told apart"
        if getattr(text_config(lm._module()), "attention_chunk_size", None) is not None:
            return "the model attends in chunks, which may be counted from the start of a row"
        if context is not None and 3 * length > context:
            return f"the model's context of {context} is too short for several sequences in a row"
        other = (ids + 1) % lm.vocab_size
        # flash attention tells sequences apart only in a single row
        flash = attends_by_flash(lm._module())
        row = torch.cat([other, ids, ids], 1)
        rows = row if flash else torch.cat([row, torch.cat([ids, other, ids], 1)])
        positions = torch.arange(length, device=ids.device).repeat(3).expand(len(rows), -1)
        found = self._given(lm, rows, {"position_ids": positions + self.first_position})
        places = [(0, 1), (0, 2)] if flash else [(0, 1), (0, 2), (1, 0), (1, 2)]
        apart = found is not None and not any(
            _differ(found[r : r + 1, k * length : (k + 1) * length], expected, unit) for r, k in places
        )
        return None if apart else "a sequence has another probability behind another one in a row than alone"

    def _plain(self, lm: Guarded, ids: Tensor) -> Tensor:
        """Run an unpadded sequence with the model's own positions, without a cache, and return (1, T, V) logits."""
        logits: Tensor = self._output(lm, ids).logits
        return logits

    def _output(self, lm: Guarded, ids: Tensor) -> Any:
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
        if "position_ids" in self._required:
            given["position_ids"] = positions_of(given["attention_mask"])
        given |= {name: torch.zeros_like(ids) for name in lm._text_inputs}
        return lm._module()(input_ids=ids, use_cache=False, **given)

    def _last(self, lm: Guarded, ids: Tensor, n: int) -> Tensor:
        """Return (n, V) fp64, ``_plain``'s logits of the last n positions.

        Where sampler and scorer do not round a 16-bit head's logits, these are not rounded either.
        """
        if lm._head.rounds(lm.model):
            found = lm._head.read(lm.model, ids[:, -n:], lambda: self._output(lm, ids))
            if found is not None:
                return found.logits()[0].double()
        return self._plain(lm, ids)[0, -n:].double()

    def _whole(self, lm: Guarded, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Return (N, T, V) logits as ``LanguageModel`` gets them, or None if the model can't take such a batch."""
        return self._given(lm, ids, lm._inputs(mask))

    def _given(self, lm: Guarded, ids: Tensor, inputs: dict[str, Tensor]) -> Tensor | None:
        """Return (N, T, V) logits of a batch with these inputs, or None if the model can't take it."""
        inputs = {name: torch.zeros_like(ids) for name in lm._text_inputs} | inputs
        try:
            with without_advice_on_masks():  # a model tells packed sequences apart only where it gets no mask
                logits: Tensor = lm._module()(input_ids=ids, use_cache=False, **inputs).logits
        except _FAULTS as error:
            if _is_of_the_machine(error):
                raise
            return None
        return logits

    # ---- after the first draw

    @torch.no_grad()
    def check(self, lm: Guarded, drawn: Samples) -> bool:
        """Compare log q of two sequences with their scores, once, and again when prompts first differ in length.

        Ranks that hold a sharded model together call it together while the model is gathered, and go on in the same
        way.

        Args:
            lm: the model that drew the sequences.
            drawn: one or more sequences.

        Returns:
            False where scoring is sound and drawing is not. ``cached`` has then become False, or ``padded`` where
            ``cached`` was False already, and the caller has to draw again.

        Raises:
            RuntimeError: log q and a score differ by more than rounding, or the forward draws random numbers in
                training mode. The message names what differs and what to do.
        """
        lengths = drawn.attention_mask[:, : drawn.prompt_len].sum(1)
        ragged = bool((lengths != lengths[0]).any()) and not _several_processes()
        if ragged in self._checked:
            return True
        ends = (lengths == lengths.min(), lengths == lengths.max())
        scored = drawn.score_mask.sum(1)  # the longest continuations show errors best
        first = int((scored * ends[0]).argmax())
        scored[first] = 0
        picked = sorted({first, int(((scored + 1) * ends[1]).argmax())})
        x = drawn[picked if self.padded else [*picked, *picked]]  # a batch needs several rows of a length
        with _undisturbed(lm, training=True), _rounding_of(lm) as rounding:
            ids = x.tokens[0][x.attention_mask[0].bool()][None]
            with _naming(lm, "in training mode"):
                random = random_draw(lambda: self._output(lm, ids), _devices(lm))
                together, again = (lm._score(x.trimmed())[0] for _ in range(2))
            lm.model.eval()
            alone, largest = self._alone(lm, x)
            n = x.score_mask.sum(1).double()
            unit = _unit(rounding(), largest / min(x.temperature, 1.0))
            # The errors of 16-bit tokens have either sign and grow as sqrt(n). In 32 bits they are too small for this
            # to be safe.
            allowed = unit * (n.sqrt() if torch.finfo(rounding()).bits == 16 else n)
            equal = _REPEATED + _REPEATED_RELATIVE * together.abs()
            if lm.device.type != "cpu":  # atomic additions may run in another order each time
                equal = equal + 4 * (lm._score(x.trimmed())[0] - lm._score(x.trimmed())[0]).abs()
            equal = equal.minimum(allowed)
            repeats = random is None and not _beyond(again, together, equal)
            sound = repeats and not (_beyond(together, x.log_prob, allowed) or _beyond(alone, x.log_prob, allowed))
            if sharding.agree(lm.model, sound):
                self._checked |= {ragged, False}
                return True
            lm.model.train()
            in_training = torch.cat([lm._score(x[i : i + 1].trimmed())[0] for i in range(len(x))])
            lm.model.eval()
            in_evaluation = lm._score(x.trimmed())[0]
            step_by_step = self._step_by_step(lm, x)
        scores = (together, in_training, in_evaluation, step_by_step)
        only_drawing = repeats and not any(_beyond(each, alone, allowed) for each in scores)
        if sharding.agree(lm.model, only_drawing and (self.cached or self.padded)):
            if self.cached:
                self.cached = False
                self.why_uncached = "with a cache it draws from another distribution than without"
            else:
                self.padded = False  # generate does not pass the mask on to such a model
            return False
        kind = sharding.class_of(without_adapters(lm._module())).__name__
        if sound:
            raise RuntimeError(f"{kind} can't be trained: the message of another rank says what that rank has found")
        figures = "; ".join(
            f"{name}: {', '.join(f'{value:.4f}' for value in values.tolist())}"
            for name, values in (
                ("log q as drawn", x.log_prob), ("scored together in training mode", together), ("again", again),
                ("each alone in training mode", in_training), ("together in evaluation mode", in_evaluation),
                ("each alone by the plain model", alone), ("by prefixes, a token at a time", step_by_step),
            )
        )  # fmt: skip
        if random is not None:
            why, what = f"in training mode its forward draws random numbers ({random})", (
                "switch that off where its config can; otherwise it has no log pi to train"
            )  # fmt: skip
        elif not repeats:
            why, what = "scoring the same sequences twice in training mode gives different values", (
                "something in it is random in training or keeps a state (hashing, a counter): switch it off"
            )  # fmt: skip
        elif _beyond(in_evaluation, together, allowed):
            why, what = "training mode computes another distribution than evaluation mode", (
                "switch off what acts only in training, by its config"
            )  # fmt: skip
        elif _beyond(step_by_step, alone, allowed):
            hint = getattr(text_config(lm._module()), "is_decoder", None) is False
            why = "a token's probability in a whole sequence is not that after its prefix, so it is not causal"
            what = "set is_decoder=True in the config" if hint else "take another model; this one can't be sampled"
        elif _beyond(together, in_training, allowed):
            why, what = "a sequence in a batch has another probability than the same alone", (
                "train with a batch size of 1, or with another model"
            )  # fmt: skip
        elif _beyond(alone, in_training, allowed):
            why, what = "a forward with the position ids and the mask that dmfast gives differs from one without", (
                "update transformers, or take another model"
            )  # fmt: skip
        else:
            why, what = "it draws from another distribution than a forward of the whole sequence gives", (
                "update transformers, or take another model"
            )  # fmt: skip
        raise RuntimeError(
            f"{kind} can't be trained: {why}, so that log q of a sample would not be that of its distribution. Nats of "
            f"{len(x)} sequences: {figures} (rounding: up to {float(allowed.max()):.2g}). What to do: {what}. "
            "LanguageModel(..., check_scores=False) skips this check"
        )

    def _alone(self, lm: Guarded, x: Samples) -> tuple[Tensor, float]:
        """Return (N,) fp64, the log-probability of each sequence by a plain forward, and the largest size of a logit.

        Only the highest logit of each position and that of the drawn token count for this size, because the logit of a
        forbidden token may have any size.
        """
        values, largest = [], 0.0
        for tokens, mask, scored in zip(x.tokens, x.attention_mask.bool(), x.score_mask, strict=True):
            ids, n = tokens[mask][None], int(scored.sum())
            logits = self._last(lm, ids, n + 1)[:-1]
            places = ids[0, -n:, None]
            largest = max(largest, _size(logits.amax(-1)), _size(logits.gather(-1, places)))
            values.append((logits / x.temperature).log_softmax(-1).gather(-1, places).sum())
        return torch.stack(values), largest

    def _step_by_step(self, lm: Guarded, x: Samples) -> Tensor:
        """Return (N,) fp64, the log-probability of each sequence, whose tokens are scored by forwards of prefixes."""
        values = []
        for tokens, mask, scored in zip(x.tokens, x.attention_mask.bool(), x.score_mask, strict=True):
            ids, n = tokens[mask][None], int(scored.sum())
            total = ids.new_zeros((), dtype=torch.float64)
            for t in range(ids.shape[1] - n, ids.shape[1]):
                log_p = (self._last(lm, ids[:, :t], 1)[0] / x.temperature).log_softmax(-1)
                total = total + log_p[ids[0, t]]
            values.append(total)
        return torch.stack(values)


@contextmanager
def _naming(lm: Guarded, what: str) -> Iterator[None]:
    """Name the model in an error of its forward. An error of the machine or the compiler passes unchanged."""
    try:
        yield
    except _FAULTS as error:
        if _is_of_the_machine(error):
            raise
        kind = sharding.class_of(without_adapters(lm._module())).__name__
        raise RuntimeError(f"{kind} can't be used: a forward {what} fails with {error!r}") from error


def _is_of_the_machine(error: Exception) -> bool:
    """Return whether an error comes from a device or from torch.compile, and not from a model's inputs."""
    device = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    compilers = ("torch._dynamo", "torch._inductor")
    return isinstance(error, device) or any(kind.__module__.startswith(compilers) for kind in type(error).__mro__)


def _several_processes() -> bool:
    """Return whether other processes may have to run the same number of forwards."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _beyond(a: Tensor, b: Tensor, allowed: Tensor) -> bool:
    """Return whether two log-probabilities differ by more than is allowed. NaN passes, because others report it."""
    return bool(((a != b) & ((a - b).abs() > allowed)).any())


def _differ(logits: Tensor | None, expected: Tensor, unit: float) -> bool:
    """Return whether two distributions of the next token differ, by their total variation. None always differs."""
    if logits is None:
        return True
    distance = (logits.double().softmax(-1) - expected.double().softmax(-1)).abs().sum(-1) / 2
    return bool((distance > unit / 4).any())


def _devices(lm: Guarded) -> list[torch.device]:
    """Return the devices on which the model computes, each once."""
    return list({lm.device, *(parameter.device for parameter in lm.model.parameters())})


@contextmanager
def _undisturbed(lm: Guarded, *, training: bool) -> Iterator[None]:
    """Run the block in one mode. Restore the modules' modes, their buffers and the random state afterwards."""
    modes = [(module, module.training) for module in lm.model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in lm.model.buffers() if not buffer.is_meta] if training else []
    with torch.random.fork_rng([device for device in _devices(lm) if device.type == "cuda"]):
        lm.model.train(training)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, before in buffers:  # batch norms write in place; dynamic RoPE puts another buffer there
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _size(logits: Tensor) -> float:
    return float(logits.nan_to_num(0.0, 0.0, 0.0).abs().max())


def _unit(dtype: torch.dtype, largest: float) -> float:
    """Return the most by which rounding may change a token's log-probability, in nats.

    16-bit hidden states and logits have an error in proportion to the largest logit. For SmolLM2-135M in bf16 the sum
    over 32 tokens has a standard deviation of 0.2 nats, and this bound allows 1.4.
    """
    return max(2 * torch.finfo(dtype).eps * max(largest, 16.0), 1e-4)


@contextmanager
def _rounding_of(lm: Guarded) -> Iterator[Callable[[], torch.dtype]]:
    """Give a function that returns the dtype that limits the precision, once forwards have run within the block.

    It is the coarsest of the dtypes that at least a tenth of the parameters' elements have, and of autocast's within
    the forward. TF32 counts as fp16, because it has the same 10 bits. Quantised weights count as bf16.
    """
    elements: Counter[torch.dtype] = Counter()
    for parameter in lm.model.parameters():
        elements[parameter.dtype if parameter.dtype in _KNOWN else torch.bfloat16] += parameter.numel()
    coarse = [dtype for dtype, count in elements.items() if count >= _PART * elements.total()] or [torch.float32]
    device = lm.device.type  # it is read outside of the hook, because torch.compile may trace the hook

    def note(module: nn.Module, args: Any, out: Any) -> None:
        if torch.is_autocast_enabled(device):
            coarse.append(torch.get_autocast_dtype(device))
        if device == "cuda" and torch.get_float32_matmul_precision() != "highest":
            coarse.append(torch.float16)

    hook = lm._module().get_input_embeddings().register_forward_hook(note)
    try:
        yield lambda: max(coarse, key=lambda dtype: torch.finfo(dtype).eps)
    finally:
        hook.remove()
