"""Keep the offline proposal q: a frozen copy of the policy.

The policy replaces q when it gets nearer to the target (KL-adaptive DPG; arXiv:2206.00761, algorithm 1).

The scalars of the training steps since the last swap tell whether pi is nearer than q, which costs no forward. On
request fresh samples of q, drawn and scored for the check, tell it, as in the paper's code.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from . import adapters, tensor_parallel
from .copies import frozen_copy
from .estimators import Estimate, RunningEstimates, _alpha_terms, _js_terms, _mean, _mean_given_one, estimate
from .kernels.result import DMLossOutput
from .models import AdapterView, LanguageModel
from .objectives import is_number
from .samples import Samples
from .sampling import AsyncSampler, Sampler
from .tensors import all_tensors, copy_into, difference, without_aliases

CRITERIA = ("kl", "tvd", "js", "alpha", "interval")
#: The criteria for which log pi must be known also where P = 0.
NEED_ALL = frozenset({"js", "alpha"})


class HasModel(Protocol):
    """An object that wraps a module, such as a ``LanguageModel``."""

    model: nn.Module


Policy = TypeVar("Policy", bound=nn.Module | HasModel)

#: log pi(x), log q(x), log P(x) and log Z of N sequences x ~ q, each (N,); log Z may be a number.
Scores = tuple[Tensor, Tensor, Tensor, Tensor | float]


def _module(policy: nn.Module | HasModel) -> nn.Module:
    return policy if isinstance(policy, nn.Module) else policy.model


def _source(policy: nn.Module | HasModel) -> LanguageModel | nn.Module:
    """Return the part of a policy that a sampler loads.

    Raises:
        RuntimeError: the policy is cut by tensor parallelism.
    """
    if tensor_parallel.is_cut(_module(policy)):
        raise RuntimeError(
            "the policy is cut by tensor parallelism, whose processes need the same sequences, and each of them would "
            "draw its own from the engine: OfflineProposal(sampler=...) does not run under tensor parallelism; load "
            "the model with fsdp_size alone, or leave sampler out"
        )
    return policy if isinstance(policy, (nn.Module, LanguageModel)) else policy.model


def nearer(
    criterion: str, log_prob: Tensor, log_proposal: Tensor, log_target: Tensor, log_z: Tensor, sample_weight: Tensor,
    alpha: float | None = None,
) -> Estimate:  # fmt: skip
    """Return D(p, q) - D(p, pi) from sequences x ~ q, with a paired standard error.

    The value is positive where pi is nearer to p.

    ``kl`` is the self-normalised mean of u (log pi - log q). A Z that all sequences share cancels. The Z of the steps
    is a running estimate, which cancels up to its drift. ``tvd`` and ``js`` use u and rho as in ``estimators``.
    ``alpha`` is E_q[u^(1-alpha) (rho^alpha - 1)]/(alpha (1-alpha)). A Z that all sequences share does not change its
    sign. Because E_q[rho] = 1, rho serves as a control variate against the part that varies with rho, which grows
    without bound as alpha -> 1.

    All inputs are (N,) fp64. The result is NaN where no sequence has P > 0, and for alpha >= 1 where one has P = 0.
    """
    log_u = torch.where(log_z == -math.inf, -math.inf, log_target - log_z - log_proposal)
    if log_u.numel() == 0 or log_u.max() == -math.inf:
        return Estimate(math.nan, math.nan)
    log_rho = log_prob - log_proposal
    if criterion == "kl":
        u = (log_u - log_u.max()).exp()
        return _mean(torch.where(u > 0, log_rho, 0.0), sample_weight * u)
    if criterion == "tvd":
        u = log_u.exp()
        rho = torch.where(u > 0, log_rho.exp(), 0.0)  # log pi may be unknown where P = 0
        return _mean((u - 1).clamp(min=0) - (u - rho).clamp(min=0), sample_weight)
    terms = _js_terms if criterion == "js" else partial(_alpha_terms, cast(float, alpha))
    of_q, of_pi = (terms(log_u, other)[0] for other in (torch.zeros_like(log_rho), log_rho))
    if criterion == "alpha":
        return _mean_given_one(of_q - of_pi, log_rho.exp(), sample_weight)
    return _mean(of_q - of_pi, sample_weight)


def _as_adapter(policy: Any, device: torch.device | str | None) -> tuple[Any, str]:
    """Return q as a second adapter of the policy's model, and the name of the policy's own."""
    if not isinstance(policy, LanguageModel):
        raise TypeError(f"adapter=True needs a LanguageModel around a PEFT model, got {type(policy).__name__}")
    if device is not None:
        raise ValueError(f"adapter=True keeps q in the policy's own model, so it can't be on device={device!r}")
    name = adapters.add_copy(policy._unwrapped())
    return AdapterView(policy, adapters.PROPOSAL), name


def _with_module(policy: Any, module: nn.Module) -> Any:
    """Return the policy with another module in place of its own."""
    if isinstance(policy, nn.Module):
        return module
    if isinstance(policy, LanguageModel):
        return policy.around(module)
    other = copy.copy(policy)
    other.model = module
    return other


def _as_samples(scores: Scores) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return fresh scores in the form of ``RunningEstimates.samples``: fp64, all of the same weight.

    Raises:
        ValueError: the tensors have different lengths, or hold values that are not possible.
    """
    *each, log_z = (torch.as_tensor(x, dtype=torch.float64, device=scores[0].device).detach() for x in scores)
    shapes = [tuple(x.shape) for x in each]
    if each[0].dim() != 1 or len(set(shapes)) > 1 or log_z.shape not in ((), each[0].shape):
        raise ValueError(
            "fresh must give log pi, log q and log P of N sequences, (N,) each, and log Z, (N,) or a number; got the "
            f"shapes {', '.join(map(str, [*shapes, tuple(log_z.shape)]))}"
        )
    log_prob, log_proposal, log_target = each
    if not bool(((log_target < math.inf) & log_proposal.isfinite() & ~(log_prob == math.inf)).all()):
        raise ValueError(
            "fresh gave a log P that is NaN or +inf, a log q that is not finite, or a log pi of +inf: no check can "
            "rest on that"
        )
    return log_prob, log_proposal, log_target, log_z.expand_as(log_prob), torch.ones_like(log_prob)


class OfflineProposal(Generic[Policy]):
    """A frozen copy of the policy that draws the sequences, and is replaced when the policy is nearer to the target.

    Args:
        policy: the module under training, or a ``LanguageModel`` around it. It is copied now.
        criterion: the divergence from p that decides whether pi is nearer than q: ``kl`` (KL(p||.)), ``tvd``, ``js``,
            or ``alpha`` for the divergence that the objective ``alpha`` descends. ``interval`` always swaps.
        interval: the number of optimiser steps between checks.
        alpha: the alpha of the criterion ``alpha``, a finite number. From 1 on q stays while a sequence has P = 0.
        best_only: whether q is only swapped if the divergence of pi is also below its value at every earlier swap.
        stderrs: the number of (paired) standard errors by which pi must be nearer.
        decay: the weight of a step's samples relative to the next step's, since pi moves.
        device: the device that keeps the copy, such as "cpu" beside a policy on a GPU. Default: the policy's device.
        adapter: whether q is a second adapter in the policy's own model, which must be a ``LanguageModel`` around a
            PEFT model. q then needs the memory of one adapter, and q <- pi copies the adapter.
        sampler: another engine that draws from q. It loads the policy now and at each swap, and it loads q when a
            state is loaded. The copy above stays, because q must remain readable: a checkpoint holds it, and a
            restarted engine loads it. ``sampling.AsyncSampler`` around an engine draws ahead of the steps. Default:
            the copy itself draws.

    Attributes:
        snapshot: q, of the same type as ``policy`` (an ``AdapterView`` with ``adapter``), without gradients.
        sampler: the other engine, or None.
        swaps: how often q was replaced. At 0, q is the policy as it was at the start.
        last_check: D(p, q) - D(p, pi) at the last check, an ``Estimate``, or None.

    Raises:
        TypeError, ValueError: an argument is out of range; ``adapter`` comes with a device, or with a policy that is
            not a ``LanguageModel`` around a PEFT model whose adapter can be switched; ``sampler`` is not a sampler, or
            it moves with the policy; the policy is sharded already. The errors of the sampler's ``load`` pass through.
    """

    def __init__(
        self,
        policy: Policy,
        criterion: str = "kl",
        interval: int = 10,
        *,
        alpha: float | None = None,
        best_only: bool = False,
        stderrs: float = 0.0,
        decay: float = 0.8,
        device: torch.device | str | None = None,
        adapter: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
        if (criterion == "alpha") != (alpha is not None):
            verb = "needs" if alpha is None else "does not take"
            raise ValueError(f"criterion {criterion!r} {verb} alpha, that of the divergence, got {alpha!r}")
        if alpha is not None and not (is_number(alpha) and math.isfinite(alpha)):
            raise ValueError(f"alpha must be a number that is finite, got {alpha!r}")
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be an integer, 1 step or more, got {interval!r}")
        if not 0 <= stderrs < math.inf:
            raise ValueError(f"stderrs must be a number, 0 or more, got {stderrs!r}")
        if sampler is not None:
            if not isinstance(sampler, Sampler):
                raise TypeError(
                    "sampler must have what dmfast.sampling.Sampler lists (sample, log_prob, load, version), got a "
                    f"{type(sampler).__name__}"
                )
            sampler.load(_source(policy))
        self.policy, self.criterion, self.interval, self.sampler = policy, criterion, interval, sampler
        self.alpha, self.best_only, self.stderrs = alpha, best_only, stderrs
        self.running = RunningEstimates(decay)
        self._adapter: str | None = None  # the name of the policy's adapter, where q is a second adapter
        if adapter:
            self.snapshot, self._adapter = _as_adapter(policy, device)
        else:
            self.snapshot = _with_module(policy, frozen_copy(_module(policy), device))
        self.steps = 0
        self._stays = False
        self._checked = 0  # the step of the last check
        self.swaps = 0
        self.best = math.inf
        self.last_check: Estimate | None = None
        self._tell_version()

    @property
    def version(self) -> int:
        """The number of the current q, which starts at 0 and grows by 1 with each swap. A loaded state sets it, too."""
        return self.swaps

    def _tell_version(self) -> None:
        if self.sampler is not None:
            self.sampler.version = self.version
        if isinstance(self.snapshot, LanguageModel):
            self.snapshot.version = self.version

    def sample(self, *args: Any, **options: Any) -> Samples:
        """Draw sequences from q onto the policy's device, marked with the ``version`` of q.

        Args:
            args, options: the arguments of ``Sampler.sample``.
        """
        if self.sampler is None:
            drawn: Samples = cast(Any, self.snapshot).sample(*args, **options)
            drawn = replace(drawn, version=torch.full_like(drawn.context_id, self.version))
        else:  # the engine may still hold sequences that an earlier q drew, so it states their version itself
            drawn = self.sampler.sample(*args, **options)
        return drawn.to(next(_module(self.policy).parameters()).device)

    def request(self, coming: Sequence[Mapping[str, Any]]) -> None:
        """Tell a sampler that runs ahead from which prompts the next batches are drawn. It does nothing for others.

        Args:
            coming: as in ``AsyncSampler.request``.
        """
        if isinstance(self.sampler, AsyncSampler):
            self.sampler.request(coming)

    def update(self, *outputs: DMLossOutput, version: Tensor | None = None) -> None:
        """Take in one optimiser step: the ``dm_loss`` outputs of all of its microbatches.

        Args:
            outputs: the outputs for sequences that q drew.
            version: (N,), the version of the q that drew each sequence. The criterion uses only those of the current q.
                Default: the current q drew all of them.
        """
        self.running.update(*outputs, of_q=None if version is None else version == self.version)
        self.steps += 1

    def maybe_update(
        self, agree: Callable[[bool], bool] | None = None, *, fresh: Callable[[], Scores] | None = None
    ) -> bool:
        """Replace q by pi if a check is due and pi is nearer to p, and return whether q was replaced.

        A check is due every ``interval`` steps.

        Args:
            agree: a function that turns this rank's verdict into the verdict of all ranks, in distributed training.
            fresh: a function that draws sequences from q for this check and returns their ``Scores`` by the current pi,
                q and the target. log pi may be NaN where P = 0, except with ``js`` and ``alpha``. It is called when a
                check is due and needs samples. The verdict then rests only on these, not on the steps since the last
                swap.

        Raises:
            ValueError: ``fresh`` gave tensors of different lengths, or values that are not possible; q stays as it is.
            RuntimeError: the parameters of the policy differ from those at the start; q stays as it is.
        """
        if self._stays or self.steps % self.interval or self.steps == self._checked:
            return False
        check, divergence, take = None, math.inf, True
        if fresh is None or (self.criterion == "interval" and not self.best_only):
            samples = self.running.samples()
        else:
            samples = _as_samples(fresh())
        if self.criterion != "interval":
            check = nearer(self.criterion, *samples, alpha=self.alpha)
            take = check.value > (self.stderrs * check.stderr if self.stderrs else 0.0)  # q stays if NaN
        if take and self.best_only:
            name = "kl" if self.criterion == "interval" else self.criterion
            *scores, weight = samples
            divergence = getattr(estimate(*scores, sample_weight=weight, alpha=self.alpha), f"{name}_policy").value
            take = divergence < self.best
        if agree is not None:
            take = agree(take)
        if take:
            self.swap()
            self.best = min(self.best, divergence)
        self._checked, self.last_check = self.steps, check
        return take

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Keep q within the block, even if a check is due, for example after the engine has failed to take pi."""
        self._stays = True
        try:
            yield
        finally:
            self._stays = False

    def swap(self) -> None:
        """Replace q by pi, whatever the criterion says, and drop the samples of the old q.

        Raises:
            RuntimeError: the parameters of the policy differ from those at the start. After this, or after an error of
                the sampler's ``load``, q is as it was.
        """
        source, target = self._tensors()
        differs = difference(source, target)
        if differs is not None:
            raise RuntimeError(
                f"the policy's parameters are not those that OfflineProposal copied ({differs}); q was not replaced"
            )
        if self.sampler is not None:
            self.sampler.load(_source(self.policy))
        copy_into(target, source)
        self.running.clear()
        self.swaps += 1
        self._tell_version()

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors of pi and of q by the same names; with ``adapter`` only those of the adapters."""
        if self._adapter is None:
            return all_tensors(_module(self.policy)), all_tensors(_module(self.snapshot))
        view = cast(AdapterView, self.snapshot)
        view.check_there()
        return adapters.weights(view.model, self._adapter), adapters.weights(view.model, adapters.PROPOSAL)

    def _moving(self) -> dict[str, Tensor]:
        """Return the parameters and persistent buffers of q that training moves.

        Tensors that are frozen in the policy are left out, because pi and q share their values. So little remains for a
        policy with an adapter.
        """
        _, of_q = self._tensors()
        if self._adapter is not None:
            return of_q
        named = _module(self.policy).named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in named if not parameter.requires_grad}
        persistent = _module(self.snapshot).state_dict().keys()
        return without_aliases({k: v for k, v in of_q.items() if k in persistent and k not in frozen})

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters of q that training moves, the samples since the last swap and the counters.

        The state also holds the batches that a sampler has drawn ahead.
        """
        return {
            "model": {k: v.clone() for k, v in self._moving().items()},
            "running": self.running.state_dict(),
            "steps": self.steps,
            "checked": self._checked,
            "last_check": self.last_check and (self.last_check.value, self.last_check.stderr),
            "swaps": self.swaps,
            "best": self.best,
            "drawn_ahead": self.sampler.state_dict() if isinstance(self.sampler, AsyncSampler) else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned.

        A ``sampler`` loads the q of the state, whatever the policy is.

        Raises:
            RuntimeError: the parameters of q do not fit.
            ValueError: the batches that were drawn ahead do not have the form in which they are saved. After these, or
                after an error of the sampler's ``load``, nothing has changed.
        """
        mine, drawn = self._moving(), state.get("drawn_ahead", [])
        ahead = self.sampler if isinstance(self.sampler, AsyncSampler) else None
        tokenizer: Any = getattr(self.snapshot, "tokenizer", None)
        if ahead is not None:
            ahead.check_state_dict(drawn, tokenizer)
        elif drawn:
            warnings.warn(
                f"the state holds {len(drawn)} batches that were drawn ahead, and this run's sampler does not run "
                "ahead: they are drawn anew, from the newest q",
                stacklevel=3,
            )
        _, of_q = self._tensors()
        # earlier versions saved tied parameters under each of their names
        model = {name: value for name, value in state["model"].items() if name in mine or name not in of_q}
        if difference(model, mine) is not None:
            raise RuntimeError(
                "this state holds the parameters of another model, or of a proposal that was kept in another way (as a "
                "copy of the model, as a second adapter)"
            )
        running = RunningEstimates()
        running.load_state_dict(state["running"])
        steps, checked, swaps = (int(state[key]) for key in ("steps", "checked", "swaps"))
        best, last_check = float(state["best"]), state["last_check"] and Estimate(*state["last_check"])
        before = {} if self.sampler is None else {key: value.clone() for key, value in mine.items()}
        copy_into(mine, model)
        if self.sampler is not None:
            try:
                self.sampler.load(_source(self.snapshot))
            except BaseException:
                copy_into(mine, before)
                raise
        self.running, self.steps, self._checked, self.swaps = running, steps, checked, swaps
        self.best, self.last_check = best, last_check
        if ahead is not None:
            ahead.load_state_dict(drawn, tokenizer)
        self._tell_version()
