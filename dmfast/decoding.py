"""Draw sequences token by token within transformers' generate, which makes the cache and the rules for the end.

Sequences that continue one prompt share its forward, whose state is then copied for each of them.

The model's own ``prepare_inputs_for_generation`` makes the inputs of each forward, as in generate's own loop. Rows that
have ended leave the batch where every state that is carried from step to step can be cut to the other rows.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import sharding

# Models return the state for the next step in one of these outputs.
_STATES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


class Drawn(NamedTuple):
    """The result of ``decode``: the sequences, whether it kept a cache, and whether it could share prompts."""

    tokens: Tensor  # (N, prompt and continuation) int64
    mask: Tensor  # the shape of tokens, 1 on prompt and continuation up to and with the first EOS
    log_prob: Tensor  # (N,) fp64
    cached: bool
    shared: bool


def decode(
    model: nn.Module,
    inner: Any,
    prompts: Tensor,
    mask: Tensor,
    steps: int,
    *,
    draw: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    eos_token_ids: list[int],
    pad_token_id: int,
    first_position: int | None,
    cached: bool,
    more: dict[str, Any],
    last_logits: Callable[[Callable[[], Any]], tuple[Any, Tensor]],
    others: Callable[[bool], bool] | None = None,
    share: bool = True,
) -> Drawn:
    """Draw the continuations of N left-padded prompts.

    Args:
        model: the module that is called: ``inner``, perhaps with adapters around it, whose hooks then run.
        inner: the transformers model, within whose ``generate`` the steps run.
        prompts: (N, L) int64.
        mask: (N, L) int64, 0 on padding.
        steps: the number of tokens after which a sequence without EOS ends.
        draw: a function that takes (R, V) logits, the (R,) places of the rows among the N and the number of the step,
            and returns (R,) tokens and their log-probabilities.
        eos_token_ids: the tokens that end a sequence.
        pad_token_id: the token that follows the end.
        first_position: the position id of a sequence's first token. None: the model is given no position ids.
        cached: whether each step takes only the newest token. False runs the whole sequence in each step.
        more: further inputs of the model, (N, L) tensors each, which are continued as generate continues them.
        last_logits: a function that runs a forward of the model and returns its output, and (R, V) logits of the last
            position.
        others: a function for models whose forwards need all ranks. It takes whether this rank runs another forward,
            and returns whether any rank does. A rank that has ended then takes part until none is left.
        share: whether equal prompts are computed once.
    """
    n, prompt_len = prompts.shape
    tokens = torch.cat([prompts, prompts.new_full((n, steps), pad_token_id)], 1)
    whole = torch.cat([mask, mask.new_zeros(n, steps)], 1)
    log_prob = torch.zeros(n, dtype=torch.float64, device=prompts.device)
    kept_cache = cached
    # with ``others`` the number of forwards must not depend on this rank's prompts
    shared = share and others is None and prompt_len > 1
    if shared:
        places, copies = _distinct(torch.stack([prompts, mask, *more.values()], -1))
        shared = len(places) < n

    def loop(_: nn.Module, given: Tensor, *, stopping_criteria: Callable[..., Tensor], **prepared: Any) -> Tensor:
        nonlocal kept_cache, shared
        rows = torch.arange(n, device=given.device)  # rows: still in the batch; alive: not ended yet
        alive = torch.ones(n, dtype=torch.bool, device=given.device)
        for name in ("logits_processor", "generation_config", "synced_gpus", "streamer"):
            prepared.pop(name, None)
        batch = _Steps(model, inner, prepared, prompt_len, given.device, first_position, last_logits, list(more))
        for end in range(prompt_len, prompt_len + steps):
            if end == prompt_len and shared:
                logits = batch.logits(prompts[places])[copies]
                if not batch.copy(copies, len(places)):
                    shared = False
                    return prompts
            else:
                logits = batch.logits(tokens[rows, :end])
            drawn, drawn_log_prob = draw(logits, rows, end - prompt_len)
            log_prob[rows] += torch.where(alive, drawn_log_prob, 0.0)
            tokens[rows, end] = torch.where(alive, drawn, pad_token_id)
            whole[rows, end] = alive.long()
            alive = alive & ~stopping_criteria(tokens[rows, : end + 1], None)
            n_alive = int(alive.sum())
            if others is not None:
                goes_on = n_alive > 0 and end + 1 < prompt_len + steps
                if others(goes_on) and not goes_on:
                    batch.take_part(others)
            if n_alive == 0:
                break
            # Moving the cache reads and writes all of it, which takes about as long as a step. So one row that ends is
            # no reason to move it.
            if n_alive <= 0.75 * len(rows) and batch.keep(alive):
                rows, alive = rows[alive], alive[alive]
        kept_cache = batch.cached
        return tokens[:, : end + 1]

    def run(rows: Tensor | slice) -> Tensor:
        given = {name: value[rows] for name, value in more.items()}
        if hasattr(inner, "generate"):
            return _within_generate(inner, loop, prompts[rows], mask[rows], steps, eos_token_ids, pad_token_id, cached,
                                    given)  # fmt: skip
        # Without generate EOS is the only rule for the end, and the forward makes its cache.
        eos = torch.tensor(eos_token_ids, device=prompts.device)
        given |= {"attention_mask": mask[rows], "position_ids": positions_of(mask[rows])}
        return loop(inner, prompts[rows], stopping_criteria=lambda ids, _: torch.isin(ids[:, -1], eos),
                    use_cache=cached, **given)  # fmt: skip

    could = shared
    found = run(places if shared else slice(None))
    if could and not shared:  # the state that the forward left can't be copied
        found = run(slice(None))
    return Drawn(found, whole[:, : found.shape[1]], log_prob, kept_cache, share and (shared or not could))


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a place of each distinct row, and (N,) the number of the distinct row that each row is equal to."""
    _, which = torch.unique(rows.flatten(1), dim=0, return_inverse=True)
    n = len(which)
    places = which.new_full((int(which.max()) + 1 if n else 0,), n)
    return places.scatter_reduce(0, which, torch.arange(n, device=which.device), "amin"), which


def positions_of(mask: Tensor) -> Tensor:
    """Return (N, T) position ids of left-padded rows. The first real token is at 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _within_generate(
    inner: Any, loop: Callable[..., Tensor], prompts: Tensor, mask: Tensor, steps: int, eos_token_ids: list[int],
    pad_token_id: int, cached: bool, more: dict[str, Any],
) -> Tensor:  # fmt: skip
    from transformers import GenerationConfig

    rules = GenerationConfig(
        max_new_tokens=steps, eos_token_id=eos_token_ids, pad_token_id=pad_token_id, do_sample=True, use_cache=cached
    )
    theirs = inner.generation_config
    # The model's config would fill in the fields that ours leaves open: stop_strings, max_time, cache_implementation.
    inner.generation_config = GenerationConfig()
    try:
        with without_advice_on_masks():  # generate itself leaves out a mask that masks nothing
            return cast(
                Tensor,
                inner.generate(prompts, attention_mask=mask, generation_config=rules, custom_generate=loop, **more),
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"{sharding.class_of(inner).__name__} can't be sampled: transformers' generate fails on it with {error!r}"
        ) from error
    finally:
        inner.generation_config = theirs


@contextmanager
def without_advice_on_masks() -> Iterator[None]:
    """Silence transformers' advice to pass a mask within the block, in which no mask is the right one."""
    logger = logging.getLogger("transformers.modeling_utils")
    outermost = _misses_no_mask not in logger.filters
    logger.addFilter(_misses_no_mask)
    try:
        yield
    finally:
        if outermost:
            logger.removeFilter(_misses_no_mask)


def _misses_no_mask(record: logging.LogRecord) -> bool:
    """Return False for the advice to pass a mask."""
    return "passing in an `attention_mask`" not in record.getMessage()


class _Steps:
    """The forwards of one batch, and the state that is carried from one to the next.

    Attributes:
        cached: whether a forward takes only the newest token.
    """

    def __init__(
        self, model: nn.Module, inner: Any, given: dict[str, Any], prompt_len: int, device: torch.device,
        first_position: int | None, last_logits: Callable[[Callable[[], Any]], tuple[Any, Tensor]], more: list[str],
    ) -> None:  # fmt: skip
        self.model, self.inner, self.given = model, inner, given
        self.device, self.more = device, more
        self.first_position, self.last_logits = first_position, last_logits
        self.first = True
        self.cached = bool(given.get("use_cache", True))
        self.can_select: bool | None = None  # None until it is needed
        self.found = {(id(module), name): (value, _version(value)) for module, name, value in _held(inner)}
        self.prepare = getattr(inner, "prepare_inputs_for_generation", None)
        self.parameters = inspect.signature(inner.forward).parameters
        if self.prepare is not None:
            from transformers import GenerationMixin

            general = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
            self.by_length = "next_sequence_length" in general
            if not self.by_length:  # older releases tell by the places in the cache which tokens are new
                self.given = inner._get_initial_cache_position(prompt_len, device, given)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the (R, V) logits of the token after these (R, t) tokens."""
        try:
            inputs = self._inputs(tokens)
            out, logits = self.last_logits(lambda: self.model(**inputs))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            kind, length = sharding.class_of(self.inner).__name__, tokens.shape[1]
            raise RuntimeError(
                f"{kind} can't be sampled: its forward of {length} tokens fails with {error!r}"
            ) from error
        if self.first and not self._goes_on_from(out):
            self.cached = self.given["use_cache"] = False
            self.given = {name: value for name, value in self.given.items() if name not in _STATES}
        self.first = False
        self._go_on(out)
        return logits

    def take_part(self, others: Callable[[bool], bool]) -> None:
        """Run forwards of one token until no rank runs another."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        given: dict[str, Any] = {"attention_mask": torch.ones_like(token)}
        if "position_ids" in self.parameters:
            given["position_ids"] = torch.zeros_like(token)
        given |= {name: torch.zeros_like(token) for name in self.more}
        self.model(input_ids=token, use_cache=False, **given)
        while others(False):
            self.model(input_ids=token, use_cache=False, **given)

    def _inputs(self, tokens: Tensor) -> dict[str, Any]:
        if self.prepare is None:
            return self._plain(tokens)
        new = {"next_sequence_length": 1 if self.cached and not self.first else None} if self.by_length else {}
        inputs = {**self.prepare(tokens, is_first_iteration=self.first, **new, **self.given), "return_dict": True}
        if inputs.get("position_ids") is not None and self.first_position != 0:  # generate counts from 0
            positions = inputs.pop("position_ids")
            if self.first_position is not None:
                inputs["position_ids"] = positions + self.first_position
        return inputs

    def _goes_on_from(self, out: Any) -> bool:
        """Return whether a forward has returned a state, or has filled the cache that it was given."""
        given = (self.given.get(name) for name in _STATES)
        return any(getattr(out, name, None) is not None for name in _STATES) or any(
            next(_tensors(cache), None) is not None for cache in given
        )

    def _plain(self, tokens: Tensor) -> dict[str, Any]:
        """Return the inputs for a module that does not prepare them itself."""
        start = tokens.shape[1] - 1 if self.cached and not self.first else 0
        given = {name: value for name, value in self.given.items() if name != "position_ids"}
        if "position_ids" in self.given and "position_ids" in self.parameters:
            given["position_ids"] = self.given["position_ids"][:, start:]
        if "logits_to_keep" in self.parameters:
            given["logits_to_keep"] = 1
        return {"input_ids": tokens[:, start:], **given}

    def _go_on(self, out: Any) -> None:
        if self.prepare is not None:
            self.given = self.inner._update_model_kwargs_for_generation(out, self.given, is_encoder_decoder=False)
            return
        mask = self.given["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        name = "cache" if "cache" in self.parameters else "past_key_values"
        self.given = {**self.given, "attention_mask": mask, "position_ids": positions_of(mask)}
        if self.cached:
            self.given[name] = getattr(out, name, None)

    def keep(self, alive: Tensor) -> bool:
        """Drop the rows that are not alive. Return False, and keep all, if the carried state can't be cut by rows."""
        return self._select(alive.nonzero()[:, 0], len(alive))

    def copy(self, places: Tensor, n: int) -> bool:
        """Put row ``places[i]`` of n into row i. Return False if the carried state can't be taken apart by rows."""
        return self._select(places, n)

    def _select(self, places: Tensor, n: int) -> bool:
        if self.can_select is None:
            self.can_select = all(_can_select(name, value, n) for name, value in self.given.items())
        if self.can_select:
            self.given = {name: _selected(name, value, places) for name, value in self.given.items()}
            for module, name, value in list(_held(self.inner)):
                before, version = self.found.get((id(module), name), (None, 0))
                written = value is not before or _version(value) != version or value.is_inference()
                if written and value.shape[0] == n:
                    setattr(module, name, value.index_select(0, places.to(value.device)))
        return self.can_select


def _held(inner: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the tensors that modules hold besides parameters and buffers, where a few models keep states of rows."""
    for module in inner.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.dim() > 1:
                yield module, name, value


def _version(x: Tensor) -> int:
    """Return how often a tensor was written, or 0 for a tensor of inference mode, which does not count it."""
    return 0 if x.is_inference() else x._version


def _axis(name: str, value: Tensor) -> int:
    """Return the dimension of the rows. It is 1 for position ids that come once for each of an image's axes."""
    return 1 if name == "position_ids" and value.dim() == 3 else 0


def _selected(name: str, value: Any, places: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value if value.dim() < 2 else value.index_select(_axis(name, value), places.to(value.device))
    if hasattr(value, "reorder_cache"):
        value.reorder_cache(places)
    return value


def _can_select(name: str, value: Any, n: int) -> bool:
    """Return whether ``_selected`` can take rows from every tensor of this input."""
    if isinstance(value, Tensor):
        return value.dim() < 2 or value.shape[_axis(name, value)] == n
    if not hasattr(value, "reorder_cache"):
        return value is None or isinstance(value, (bool, int, float, str))
    before = list(_tensors(value))
    trial = copy.deepcopy(value, {id(tensor): tensor for tensor in before})  # the trial shares the tensors
    try:
        trial.reorder_cache(torch.zeros(1, dtype=torch.int64, device=before[0].device if before else "cpu"))
    except (NotImplementedError, AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False
    after = list(_tensors(trial))
    return len(before) == len(after) and all(
        old.dim() == 0 or (old.shape[0] == n and new.shape[0] == 1) for old, new in zip(before, after, strict=True)
    )


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors that a cache holds, in an order that depends only on its structure."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or value is None or isinstance(value, (str, int, float, bool, type)):
        return
    seen.add(id(value))
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif hasattr(value, "__dict__") and not hasattr(value, "to_dict"):  # only configs have to_dict
        parts = vars(value).values()
    for part in parts:
        yield from _tensors(part, seen)
