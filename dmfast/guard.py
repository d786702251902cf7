"""Whether what a model scores is what it draws: asked of the model itself, because no list of models is complete.

Before the first forward a probe asks how a batch is to be laid out: whether position ids mean what the model itself
takes for positions, and whether left padding leaves a sequence's probabilities alone. After the first draw two of its
sequences are scored as the trainer will, and alone, and must have the log q that they were drawn with.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .decoding import positions_of
from .families import first_position, without_adapters
from .samples import Samples

if TYPE_CHECKING:
    from .models import LanguageModel

_PROBE, _PADS = 8, 3
#: What rounding may change a token's log-probability by, in nats. TF32 has the 10 bits of fp16.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


class Guard:
    """What is known of how a model is to be fed. The copies of a ``LanguageModel`` share it.

    Attributes:
        first_position: the position id that it is given for the first token. None: it is given none and counts itself.
        padded: whether sequences with prompts of several lengths go together, left-padded.
        cached: whether it is sampled with a cache.
        enabled: whether the model is asked; otherwise its forward's parameters say what they can.
    """

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        parameters = inspect.signature(without_adapters(model).forward).parameters
        self.enabled = enabled
        self.padded = self._named = "position_ids" in parameters
        self.first_position = first_position(model) if self._named else None
        self.cached = True
        self.why_uncached = "its forward returns nothing to go on from"
        self._required = {name for name, each in parameters.items() if each.default is inspect.Parameter.empty}
        self._probed = not enabled
        self._checked: set[bool] = {True, False} if not enabled else set()

    # ---- before the first forward

    @torch.no_grad()
    def probe(self, lm: LanguageModel, tokens: Tensor, mask: Tensor) -> None:
        """Find out ``first_position`` and ``padded`` from three forwards of a few tokens, once.

        Args:
            lm: the model.
            tokens: (N, T) int64, of which the first row's are taken.
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
            try:
                expected = self._plain(lm, ids)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                kind = type(without_adapters(lm._module())).__name__
                raise RuntimeError(f"{kind} can't be used: a forward of {length} tokens fails: {error}") from error
            unit = rounding()
            optional = self._named and "position_ids" not in self._required
            if optional and _differ(self._whole(lm, ids, torch.ones_like(ids)), expected, unit):
                self.first_position = None
            pads = torch.full((1, _PADS), lm.pad_token_id, device=ids.device)
            both = torch.cat([torch.cat([pads, ids[:, :-1]], 1), torch.cat([pads[:, 1:], ids], 1)])
            seen = torch.ones_like(both)
            seen[0, :_PADS], seen[1, : _PADS - 1] = 0, 0
            found = self._whole(lm, both, seen)
            self.padded = (self.first_position is None) != self._named and not (
                found is None
                or _differ(found[:1, _PADS:], expected[:, :-1], unit)
                or _differ(found[1:, _PADS - 1 :], expected, unit)
            )

    def _plain(self, lm: LanguageModel, ids: Tensor) -> Tensor:
        """(1, T, V) logits of an unpadded sequence with the model's own positions, without a cache."""
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
        if "position_ids" in self._required:
            given["position_ids"] = positions_of(given["attention_mask"])
        given |= {name: torch.zeros_like(ids) for name in lm._text_inputs}
        logits: Tensor = lm._module()(input_ids=ids, use_cache=False, **given).logits
        return logits

    def _whole(self, lm: LanguageModel, ids: Tensor, mask: Tensor) -> Tensor | None:
        """(N, T, V) logits as ``LanguageModel`` gets them. None: the model can't take such a batch."""
        try:
            logits: Tensor = lm._module()(input_ids=ids, use_cache=False, **lm._inputs(mask)).logits
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
        return logits

    # ---- after the first draw

    @torch.no_grad()
    def check(self, lm: LanguageModel, drawn: Samples) -> bool:
        """Compare log q of two sequences with what scoring gives, once; again when prompts first differ in length.

        Args:
            lm: the model that drew them.
            drawn: one or more sequences.

        Returns:
            False where scoring is sound and drawing is not: then ``cached``, and where that was not it ``padded``, has
            become False, and the draw is to be made again.

        Raises:
            RuntimeError: they differ by more than rounding, with what differs and what to do.
        """
        lengths = drawn.attention_mask[:, : drawn.prompt_len].sum(1)
        ragged = bool((lengths != lengths[0]).any()) and not _several_processes()
        if ragged in self._checked:
            return True
        ends = (lengths == lengths.min(), lengths == lengths.max())
        scored = drawn.score_mask.sum(1)  # the longest of them show the most, and another of one length beside it
        first = int((scored * ends[0]).argmax())
        scored[first] = 0
        picked = sorted({first, int(((scored + 1) * ends[1]).argmax())})
        x = drawn[picked if self.padded else [*picked, *picked]]  # two of a length, so that a batch has several rows
        with _undisturbed(lm, training=True), _rounding_of(lm) as rounding:
            try:
                together = lm._score(x.trimmed())[0]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                kind = type(without_adapters(lm._module())).__name__
                raise RuntimeError(f"{kind} can't be trained: its forward fails in training mode: {error}") from error
            lm.model.eval()
            alone = self._alone(lm, x)
            allowed = rounding() * x.score_mask.sum(1)
            if not (_beyond(together, x.log_prob, allowed) or _beyond(alone, x.log_prob, allowed)):
                self._checked |= {ragged, False}
                return True
            lm.model.train()
            again = lm._score(x.trimmed())[0]
            in_training = torch.cat([lm._score(x[i : i + 1].trimmed())[0] for i in range(len(x))])
            lm.model.eval()
            in_evaluation = lm._score(x.trimmed())[0]
            step_by_step = self._step_by_step(lm, x)
        scores = (together, again, in_training, in_evaluation, step_by_step)
        if (self.cached or self.padded) and not any(_beyond(each, alone, allowed) for each in scores):
            if self.cached:
                self.cached = False
                self.why_uncached = "with a cache it draws from another distribution than without"
            else:
                self.padded = False  # what generate passes on to it lacks the mask
            return False
        kind = type(without_adapters(lm._module())).__name__
        figures = "; ".join(
            f"{name}: {', '.join(f'{value:.4f}' for value in values.tolist())}"
            for name, values in (
                ("log q as drawn", x.log_prob), ("scored together in training mode", together), ("again", again),
                ("each alone in training mode", in_training), ("together in evaluation mode", in_evaluation),
                ("each alone by the plain model", alone), ("by prefixes, a token at a time", step_by_step),
            )
        )  # fmt: skip
        if _beyond(again, together, allowed):
            why, what = "scoring the same sequences twice in training mode gives different values", (
                "something in it is random in training (a router's noise, dropout of its own, hashing): switch it off"
            )  # fmt: skip
        elif _beyond(in_evaluation, together, allowed):
            why, what = "training mode computes another distribution than evaluation mode", (
                "set what acts in training only to what it is in evaluation"
            )  # fmt: skip
        elif _beyond(step_by_step, alone, allowed):
            why, what = "a token's probability in a whole sequence is not that after its prefix, so it is not causal", (
                "set is_decoder=True in the config where it has that; otherwise it is no model to sample from"
            )  # fmt: skip
        elif _beyond(together, in_training, allowed) or _beyond(alone, in_training, allowed):
            why, what = "a sequence's probability depends on what it is batched with", (
                "train with a batch size of 1, or with another model"
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

    def _alone(self, lm: LanguageModel, x: Samples) -> Tensor:
        """(N,) log-probability of each sequence by a plain forward."""
        values = []
        for tokens, mask, scored in zip(x.tokens, x.attention_mask.bool(), x.score_mask, strict=True):
            ids, n = tokens[mask][None], int(scored.sum())
            log_p = (self._plain(lm, ids)[0, -n - 1 : -1].double() / x.temperature).log_softmax(-1)
            values.append(log_p.gather(-1, ids[0, -n:, None]).sum())
        return torch.stack(values)

    def _step_by_step(self, lm: LanguageModel, x: Samples) -> Tensor:
        """(N,) the same, each token from a forward of what precedes it."""
        values = []
        for tokens, mask, scored in zip(x.tokens, x.attention_mask.bool(), x.score_mask, strict=True):
            ids, n = tokens[mask][None], int(scored.sum())
            total = ids.new_zeros((), dtype=torch.float64)
            for t in range(ids.shape[1] - n, ids.shape[1]):
                log_p = (self._plain(lm, ids[:, :t])[0, -1].double() / x.temperature).log_softmax(-1)
                total = total + log_p[ids[0, t]]
            values.append(total)
        return torch.stack(values)


def _several_processes() -> bool:
    """Return whether other processes may have to run the same number of forwards."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _beyond(a: Tensor, b: Tensor, allowed: Tensor) -> bool:
    """Return whether two log-probabilities differ by more than is allowed. NaN is for others to find."""
    return bool(((a != b) & ((a - b).abs() > allowed)).any())


def _differ(logits: Tensor | None, expected: Tensor, unit: float) -> bool:
    """Return whether two distributions of the next token differ, by the part of their mass that does; None does."""
    if logits is None:
        return True
    distance = (logits.double().softmax(-1) - expected.double().softmax(-1)).abs().sum(-1) / 2
    return bool((distance > unit / 4).any())


@contextmanager
def _undisturbed(lm: LanguageModel, *, training: bool) -> Iterator[None]:
    """Run in one mode, and leave each module's mode and the random state as they were."""
    modes = [(module, module.training) for module in lm.model.modules()]
    device = lm.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        lm.model.train(training)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _rounding_of(lm: LanguageModel) -> Iterator[Any]:
    """Give a function that returns what rounding is allowed per token, once forwards have run within.

    The coarsest dtype decides: of the parameters, of autocast within the forward, of TF32.
    """
    dtypes = {each.dtype for each in lm.model.parameters()}
    coarse = [dtype if dtype in _ROUNDING else torch.bfloat16 for dtype in dtypes] or [torch.float32]

    def note(module: nn.Module, args: Any, out: Any) -> None:
        device = lm.device.type
        if torch.is_autocast_enabled(device):
            coarse.append(torch.get_autocast_dtype(device))
        if device == "cuda" and torch.get_float32_matmul_precision() != "highest":
            coarse.append(torch.float16)

    hook = lm._module().get_input_embeddings().register_forward_hook(note)
    try:
        yield lambda: max(_ROUNDING[dtype] for dtype in coarse)
    finally:
        hook.remove()
