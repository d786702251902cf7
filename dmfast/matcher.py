"""Provide ``Matcher``, the step of distribution matching that all training loops share (arXiv:2206.00761, algorithm 1).

    draw     draws x ~ q, then computes log P(x), Z, rewards and the baseline of the whole step, each once
    loss     computes log pi(x) of a part of the step and the fused loss, divided by the step's sequences
    commit   updates Z and the running estimates after the optimiser's step, and sets q <- pi if pi is nearer to p

What a step adds to Z and to the running values is held back until ``commit``. So an error within a step, or a
checkpoint that is taken in one, finds everything as the step before left it. ``commit`` also raises what a GPU's
kernels find (NaN among the logits, a weight beyond fp32's range), because the host waits for the GPU there. A sequence
with such a fault has moved no parameter.
"""

from __future__ import annotations

import copy
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import sharding, step_terms, tensor_parallel
from .batch import Batch, Microbatch, Prompts, SamplingOptions
from .diagnostics import gradient_variance
from .estimators import Estimate, Estimates, PartitionFunction, PartitionFunctions, RunningEstimates
from .kernels import warn_caller
from .kernels.result import DMLossOutput
from .metrics import step_metrics
from .models import LanguageModel
from .objectives import (
    Objective,
    OfStep,
    PPOClip,
    Terms,
    plain_baseline,
    weigh,
)
from .proposal import NEED_ALL, OfflineProposal, Scores
from .ranks import OneProcess, Ranks, share
from .refit import Refit
from .rollout import Rollout, Rollouts
from .running import Running
from .samples import Prompt, Samples
from .seeds import seed_for
from .settings import AnyObjective, Settings, check_proposal, check_target, check_trainable
from .targets import EBM, pass_rates
from .targets.rewards import AnyReward, Weights, as_reward
from .unseen import Seen, unknown, unseen, z_gap

#: The options of ``LanguageModel.loss`` that ``Matcher.loss`` gives itself.
_OF_THE_BATCH = frozenset({
    "objective", "on_policy", "max_weight", "num_sequences", "temperature", "softcap", "cu_seqlens", "log_target",
    "log_proposal", "log_z", "reward", "log_base", "entropy_coefficient", "context_id", "num_tokens",
})  # fmt: skip
_FORMAT = 2  # the format of state_dict; format 1 is what DMTrainer wrote before there was a Matcher


class Matcher:
    """The steps that move ``policy`` towards the target distribution p = P/Z, one optimiser step at a time.

    The loop around it is yours:

        matcher = dmfast.Matcher(policy, target, dmfast.OfflineProposal(policy, interval=5))
        for _ in range(steps):
            batch = matcher.draw(prompts, n=192, max_new_tokens=48)
            for part in batch.split(64):
                matcher.loss(part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics = matcher.commit()

    Args:
        policy: pi, the model that is trained.
        target: an ``EBM`` that is fitted, around a base that does not move with the policy.
        proposal: q, an ``OfflineProposal`` of the policy. With None the policy itself draws (on-policy).
        objective: a name of ``objectives.OBJECTIVES`` or ``methods.METHODS``, an ``Objective``, or a function of
            ``Terms`` that returns the (B,) weights A. What depends on other sequences and not on log pi, such as the
            mean reward of a prompt, is fixed when a step is drawn, over all ranks (``Terms.at_draw``). A function with
            the attribute ``whole_contexts = True`` gets all sequences of a context in one call; they may not lie on
            several ranks. A function with ``weight_known = True`` forms A without log pi, once, when the step is drawn.
        reward: R(x) for ``reinforce`` and ``kl_control``: a callable on ``Samples`` that returns (N,), such as
            ``dmfast.Scorer``. If it is also a feature of the target, it runs once. It may also be several, by name or
            in a list, whose weighted sum is R(x). The mean and standard deviation of each are then logged as
            ``rewards/<name>/mean`` and ``rewards/<name>/std``.
        reward_weights: the weights of several rewards, in their order or by name. Default: 1 for each.
        baseline: a number; ``mean``, the running mean of rho*r over earlier steps; ``leave_one_out`` or
            ``leave_one_out_context``, over all sequences of the step. ``gdc++`` has its own.
        normalize: False multiplies A by Z, which is the paper's scale.
        beta: the KL coefficient of ``kl_control``. With ``beta_target_kl`` this is its value at the start.
        beta_target_kl: the wanted KL(pi||a), nats per sequence. ``AdaptiveBeta`` then steers beta with ``beta_horizon``
            (sequences). This works only on-policy.
        alpha, normalize_alpha, max_return: parameters of the objective ``alpha``, as in ``dmfast.Objective``.
        max_weight: bounds A to [-max_weight, max_weight].
        entropy_coefficient: c of the entropy bonus. It adds -c times the policy's entropy to the loss (``dm_loss``).
            The entropy is summed over the tokens of a sequence, and its mean over sequences is logged as ``entropy``.
        on_policy: whether rho is exactly 1, because pi itself draws. Default: True if there is no proposal. False
            without a proposal forms rho from the log-probabilities that the sampler gave.
        partition: ``running`` estimates log Z of a context from all its visits, and ``step`` from the samples of the
            step alone. For a target that only filters the base (``EBM.is_filter``) Z is read as min(Z, 1).
        z_floor: the value that stands for Z of a context of which no sequence with P > 0 was seen yet, above 0 and at
            most 1. With None the weights of such a context are 0. Only a target that filters the base may have it.
        z_from_rows: whether Z of a context starts from the columns ``pass_rate`` and ``pass_rate_n`` of its row, which
            ``EBM.fit_z`` makes, as if these n samples of the base had been seen. This needs a target that filters the
            base.
        uniform_groups: what happens to prompts whose sequences all have the same reward (without a reward: the same
            b(x)), where an objective that compares the sequences of a prompt gives all of them the weight 0. ``keep``:
            they count in the mean. ``skip``: the mean is over the others. ``redraw``: they are drawn again, up to
            ``max_redraws`` times, and then skipped. ``replace``: the same with other prompts in their place, which
            ``other_contexts`` gives. What was drawn before still counts in Z and in the estimates of divergences. With
            ``partition="step"`` only the first draw of each prompt counts in Z, because a redraw that depends on the
            first would bias it. This works only on-policy. ``n_uniform`` and ``n_redrawn`` are logged.
        other_contexts: a function ``other_contexts(seed, n, taken)`` for ``uniform_groups="replace"``. It gives up to n
            prompts whose ``context_id`` is not in the set ``taken``, the same ones on all ranks.
        skip_zero_weight: whether sequences whose weight is known to be 0 before the policy's forward get no forward.
        ppo_epochs: optimiser steps on each batch (``Batch.again``), for ``reinforce`` and ``kl_control`` on-policy.
            Above 1, returns, KL penalty and baseline stay as they were at the sampling policy, and the ratio is clipped
            at 1 -+ ``ppo_clip`` (``PPOClip``).
        check_samples: the number of fresh sequences of q for each check of the proposal, whose verdict rests on them
            alone. With 0 it rests on the sequences of the steps since the last swap.
        check_contexts: gives the contexts of a check from its seed, the same on all ranks. Default: those of the step.
        refit_ess, refit_samples: while the effective sample size of the target's fit is below ``refit_ess``, lambda is
            fitted again from the last ``refit_samples`` sequences of the steps (``EBM.refit``). With ``refit_ess=0``
            lambda is never fitted again.
        decay: the weight of a step's samples in the estimates relative to the next step's. It is used only if there is
            no proposal, because a proposal has its own.
        patience_zero: steps in a row with P(x) = 0 on every sequence, after which a warning says what to do.
        seed: the seed that gives the seed of each draw, together with the number of the step.
        ranks: the processes that take a step together. Default: this one.

    Attributes:
        running: what is carried from step to step, as of the last commit: ``partitions``, ``steps``, ...
        batch: the batch that was drawn and is not yet committed, or None.

    Raises:
        ValueError: an option is out of range, or options do not go together; the policy has no parameter that requires
            a gradient; the base is the policy itself; the target is not fitted; the objective lacks its reward; or the
            proposal is of another policy.
        TypeError: the policy, target, proposal or objective has another type.
    """

    def __init__(
        self,
        policy: LanguageModel,
        target: EBM,
        proposal: OfflineProposal[Any] | None = None,
        objective: AnyObjective = "gdc++",
        *,
        reward: AnyReward | None = None,
        reward_weights: Weights | None = None,
        baseline: float | str | None = None,
        normalize: bool = True,
        beta: float | None = None,
        beta_target_kl: float | None = None,
        beta_horizon: float = 10_000,
        alpha: float | None = None,
        normalize_alpha: bool = True,
        max_return: float | None = None,
        max_weight: float | None = None,
        entropy_coefficient: float = 0.0,
        on_policy: bool | None = None,
        partition: str = "running",
        z_floor: float | None = None,
        z_from_rows: bool = False,
        uniform_groups: str = "keep",
        max_redraws: int = 4,
        other_contexts: Callable[[int, int, set[int]], Prompts] | None = None,
        skip_zero_weight: bool = False,
        ppo_epochs: int = 1,
        ppo_clip: float = 0.2,
        check_samples: int = 0,
        check_contexts: Callable[[int], Prompts] | None = None,
        refit_ess: float = 0.0,
        refit_samples: int = 2048,
        decay: float = 0.8,
        patience_zero: int = 5,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.settings = Settings(
            objective, baseline, normalize, beta, beta_target_kl, beta_horizon, alpha, normalize_alpha, max_return,
            max_weight, entropy_coefficient, proposal is None if on_policy is None else on_policy, partition,
            z_floor, z_from_rows, uniform_groups, max_redraws, skip_zero_weight, ppo_epochs, ppo_clip, check_samples,
            refit_ess, refit_samples, patience_zero, seed,
        )  # fmt: skip
        if not isinstance(policy, LanguageModel):
            raise TypeError(
                f"policy must be a LanguageModel, got a {type(policy).__name__}; write LanguageModel(model, tokenizer)"
            )
        check_trainable(policy)
        check_target(target, policy.model, self.settings, reward)
        check_proposal(proposal, policy, self.settings)
        self.policy, self.target, self.proposal = policy, target, proposal
        if reward is None and reward_weights is not None:
            raise ValueError(f"reward_weights={reward_weights!r} is for several rewards, and there is no reward")
        self.reward = None if reward is None else as_reward(reward, reward_weights)
        self.ranks: Ranks = OneProcess() if ranks is None else ranks
        if (other_contexts is None) == (self.settings.uniform_groups == "replace"):
            raise ValueError(
                "other_contexts gives the prompts that uniform_groups='replace' puts in the place of others: pass both "
                f"or neither, got other_contexts={other_contexts!r} and "
                f"uniform_groups={self.settings.uniform_groups!r}"
            )
        self.check_contexts = check_contexts
        self._rollouts = Rollouts(policy, target, proposal, self.reward, self.settings, self.ranks, other_contexts)
        self._estimates = RunningEstimates(decay)  # used only without a proposal, which has its own
        self.running = Running.start(target.lambda_.tolist(), self.settings.steered)
        self.batch: Batch | None = None
        self._passed: list[tuple[Microbatch, DMLossOutput]] = []  # the parts of the batch that went through the loss
        self._has_passed = torch.zeros(0, dtype=torch.bool)  # (N,) whether each sequence of the batch is in them
        self._to_repeat: Batch | None = None
        self._refit = Refit(target, refit_ess, refit_samples)
        self._unseen_in_check: dict[str, float] = {}
        self._z_gap: float | None = None  # what keeps q from becoming pi after this step
        self._compared_z = False
        self._weighs_tokens = False  # whether a loss of the batch got a weight for each token
        self._seen = Seen(target.wanted, decay)  # what the window since the last swap has shown
        self._seen_for_z = Seen(target.wanted, 1.0)  # what all sequences that Z rests on have shown
        self._wrapped: LanguageModel | None = None
        self._since = 0.0  # the time when the batch was ready
        self._warned_of: set[tuple[int, int]] = set()  # pairs of the lengths of the fit and of a draw
        self._drawn_with: dict[str, Any] | None = None  # the options that shape the sequences that Z rests on

    @property
    def estimates(self) -> RunningEstimates:
        """The estimates of the window since the last swap. If there is a proposal, they are its own."""
        return self._estimates if self.proposal is None else self.proposal.running

    @property
    def _alpha(self) -> float | None:
        """The alpha whose divergence is logged: the objective's, or else that of the proposal's criterion."""
        own = self.settings.own_alpha
        return self.proposal.alpha if own is None and self.proposal is not None else own

    # ---- draw: samples, log P, Z

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[Prompt] | None = None,
        n: int = 1,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int | None = None,
        batch_size: int | None = None,
        context_id: Sequence[int] | Tensor | None = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
        next_prompts: Sequence[Sequence[Prompt] | None] = (),
    ) -> Batch:
        """Draw the sequences of a step from q and score them. A batch that was not committed is discarded.

        Nothing changes until ``commit``, so that another call of ``draw`` gives the same sequences.

        Args:
            prompts: this rank's share of the step's prompts, equally many on each rank. None is the one empty prompt.
            n: sequences of each prompt.
            max_new_tokens, temperature: as in ``LanguageModel.sample``. They should be those that lambda was fitted
                with.
            seed: the seed of the draw. Default: it follows from the matcher's seed and the number of the step.
            batch_size: sequences at a time in sampling and in scoring by the base. Default: all.
            context_id: for each prompt an integer that identifies its context over the whole run, because Z is kept for
                each context. Default: a digest of the prompt's tokens.
            rows: for each prompt the row of its data set, which scorers see as ``samples.rows``.
            next_prompts: the ``prompts`` of the steps after this one, in their order. All are drawn with the same
                options. A sampler that runs ahead (``sampling.AsyncSampler``) draws the first of them while this step
                is trained. Any other sampler draws each step when its turn comes.

        Returns:
            A ``Batch`` of n * len(prompts) sequences.

        Raises:
            ValueError: as ``LanguageModel.sample`` and ``EBM.score``. Also if max_new_tokens or temperature differs
                from the earlier steps', whose Z a running partition keeps; if the numbers of ids or rows and of prompts
                differ; if the ranks draw different numbers, or a sharded policy has more processes than ``ranks``; if a
                leave-one-out baseline is not finite (the message names the sequence whose return is the cause); if
                next_prompts comes with a seed or without a proposal; or if the prompts of a step are not those that
                next_prompts announced for it.
            TypeError: a context_id is not an integer of 64 bits.
            RuntimeError: a scorer raised.
        """
        if seed is not None and len(next_prompts):
            raise ValueError(
                f"next_prompts are drawn with seeds that the matcher gives, and seed={seed!r} is for this step alone: "
                "leave one of them out"
            )
        if self.proposal is None and len(next_prompts):
            raise ValueError(
                "next_prompts is for a proposal's sampler that runs ahead, and here the policy itself draws"
            )
        self.discard()
        self.check_length(max_new_tokens)
        contexts, how = Prompts(prompts, context_id, rows), SamplingOptions(max_new_tokens, temperature, batch_size)
        self._check_ranks(len(contexts), n, max_new_tokens)
        lambda_ = self.target.lambda_.tolist()
        anew = self.running.lambda_ != lambda_
        running = Running.start(lambda_, self.running.beta, self.running.steps) if anew else self.running
        if not anew and self.settings.partition == "running":
            self._refuse_other_length(how)
        if self.proposal is not None and seed is None:
            self.proposal.request([
                self._rollouts.arguments(Prompts(each), n, how, self._seed(f"step {running.steps + k}"))
                for k, each in enumerate([prompts, *next_prompts])
            ])  # fmt: skip
        if self.settings.z_from_rows:
            pass_rates.read(contexts.rows)  # so that an error comes before the first sample
        seed = self._seed(f"step {running.steps}") if seed is None else seed
        rollout = self._rollouts.step(contexts, n, how, seed)
        for each in rollout.draws:
            running = self._started(running, each.samples)
        # every draw counts in Z, even if its sequences are replaced
        pending = running.after(*rollout.for_partition(self.settings.partition, self.ranks), self.settings.partition)
        return self._opened(replace(self._batch(rollout, running, pending), drawn=(contexts, how), anew=anew))

    def _batch(self, rollout: Rollout, running: Running, pending: Running) -> Batch:
        """Return the batch of what a step has drawn, with all that its loss gets besides log pi.

        Args:
            rollout: what the step has drawn.
            running, pending: the running values without and with this step.
        """
        settings, ranks = self.settings, self.ranks
        x, inputs, uniform = rollout.scored.samples, dict(rollout.scored.inputs), rollout.uniform
        inputs["log_z"] = self._log_z(pending.partitions, x.context_id)
        log_scale = pending.scale.log_z
        objective = settings.objective_of(
            running.mean_return, log_scale if math.isfinite(log_scale) else 0.0, running.beta
        )
        if pending.beta is not None:
            log_ratio = ranks.gather(x.log_prob - inputs["log_base"])
            pending.beta.update(float(log_ratio.mean()), len(log_ratio))
        if isinstance(objective, Objective) and isinstance(objective.baseline, str):
            inputs["baseline"] = step_terms.leave_one_out(settings, ranks, objective, x.context_id, inputs)
        whole, advantage = None, None
        stays, n_sequences = torch.ones(len(x), dtype=torch.bool, device=x.tokens.device), float(len(x))
        if uniform is not None and settings.uniform_groups != "keep":
            left = float(ranks.gather(~uniform).sum()) / ranks.size
            if left:  # with none left all weights are 0, and all sequences stay
                stays, n_sequences = ~uniform, left
        if not isinstance(objective, Objective):
            whole = step_terms.terms_of_step(settings, ranks, objective, x, inputs, stays, n_sequences)
        if settings.weight_known:
            advantage = share(weigh(cast(Terms, whole)), ranks)
        elif settings.ppo_epochs > 1:
            advantage = weigh(step_terms.terms_at_proposal(settings, objective, inputs))
        first = None
        if len(rollout.draws) > 1:
            of_first = rollout.draws[0]
            log_z = self._log_z(pending.partitions, of_first.samples.context_id)
            first = (of_first.samples.log_prob, of_first.inputs["log_target"], log_z)
        return Batch(
            x, inputs, rollout.scored.features, rollout.scored.log_base,
            step_terms.to_forward(settings, objective, inputs, advantage) & stays.cpu(), objective, pending,
            advantage=advantage, first=first, whole_contexts=settings.whole_contexts, whole=whole,
            n_sequences=n_sequences, counts=rollout.counts, rewards=rollout.scored.rewards, _again=self._again,
            seconds=rollout.seconds,
        )  # fmt: skip

    def _started(self, running: Running, x: Samples) -> Running:
        """Return the running values with Z of contexts that were not seen yet from the pass rates of their rows."""
        if not self.settings.z_from_rows:
            return running
        context_id, found = (self.ranks.gather(each.to(x.tokens.device))
                             for each in (x.context_id, pass_rates.read(x.rows)))  # fmt: skip
        return running.started(context_id, *found.unbind(1))

    def _log_z(self, partitions: PartitionFunctions, context_id: Tensor) -> Tensor:
        """Return log Z of each sequence's context. It is at most 0 if the target filters the base."""
        floor = self.settings.z_floor
        return partitions.log_z(
            context_id, most=0.0 if self.target.is_filter else math.inf,
            unknown=-math.inf if floor is None else math.log(floor),
        )  # fmt: skip

    def check_length(self, max_new_tokens: int, name: str = "max_new_tokens", stacklevel: int = 4) -> None:
        """Warn once if sequences may get another length than those that lambda was fitted on. ``draw`` calls this.

        Args:
            max_new_tokens: the most new tokens of the sequences.
            name: the name that the warning gives to it.
            stacklevel: as in ``warnings.warn``.
        """
        fitted_with = None if self.target.report is None else self.target.report.max_new_tokens
        if fitted_with in (None, max_new_tokens) or (fitted_with, max_new_tokens) in self._warned_of:
            return
        self._warned_of.add((fitted_with, max_new_tokens))
        warnings.warn(
            f"lambda was fitted on samples of up to {fitted_with} new tokens, and {name} is {max_new_tokens}: the "
            "moments of longer or shorter sequences differ; fit lambda with the same length",
            stacklevel=stacklevel,
        )

    def _refuse_other_length(self, how: SamplingOptions) -> None:
        """Refuse sequences of another length or temperature than those that Z of the earlier steps rests on."""
        now = _shape_of(how)
        changed = {} if self._drawn_with is None else {k: v for k, v in self._drawn_with.items() if v != now[k]}
        if changed:
            said = " and ".join(
                f"{name} was {value} in the earlier steps and is {now[name]}" for name, value in changed.items()
            )
            raise ValueError(
                f"{said}: Z and the estimates so far are of the other distribution. Draw as before, or go on with a "
                "new Matcher and a new OfflineProposal, whose Z starts anew"
            )

    def _check_ranks(self, prompts: int, n: int, max_new_tokens: int) -> None:
        """Check that the processes of a step know of each other, and that their shares of it are equally large.

        Raises:
            ValueError: a sharded policy has more processes than ``ranks`` says, or the ranks draw different numbers.
        """
        model, size = self.policy.model, self.ranks.size
        shares = sharding.shares_of_a_step(model)
        if shares > size:
            cut = f", {model.tp_size}" if tensor_parallel.is_cut(model) else ""
            raise ValueError(
                f"{shares} processes train the sharded {sharding.class_of(model).__name__} together, and the matcher's "
                f"ranks say {size}, so that each of them would draw the same sequences and estimate Z alone: write "
                f"Matcher(..., ranks=dmfast.training.ranks.AccelerateRanks(accelerator{cut})), and draw each one's "
                "share of the prompts"
            )
        if size == 1:
            return
        mine = {"prompts": prompts, "n": n, "max_new_tokens": max_new_tokens}
        numbers = [float(x) if isinstance(x, Real) else -1.0 for x in mine.values()]  # ``sample`` refuses anything else
        found = self.ranks.gather(torch.tensor([numbers], dtype=torch.float64, device=self.policy.device))
        if not bool((found == found[:1]).all()):
            columns = zip(mine, found.T.tolist(), strict=True)
            differ = [f"{name}: {', '.join(f'{x:g}' for x in each)}" for name, each in columns if len(set(each)) > 1]
            raise ValueError(
                f"the {size} ranks draw different numbers in this step, by rank {' and '.join(differ)}. Z and the loss "
                "count equally many sequences of each rank: give each rank equally many prompts, and the same n and "
                "max_new_tokens"
            )

    def _opened(self, batch: Batch) -> Batch:
        self.batch, self._has_passed = batch, torch.zeros(len(batch), dtype=torch.bool)
        self._weighs_tokens = False
        self._since = time.perf_counter()
        return batch

    def _seed(self, what: str) -> int:
        """Return the seed of one use in one step, so that a resumed run draws what an unbroken one does."""
        return seed_for(self.settings.seed, what)

    # ---- several optimiser steps on a batch

    @property
    def to_repeat(self) -> Batch | None:
        """The batch committed last, if it serves more optimiser steps. ``load_state_dict`` restores it, too."""
        same = self.running.lambda_ == self.target.lambda_.tolist()
        return self._to_repeat if same else None

    def _again(self, batch: Batch) -> Batch:
        if batch is not self.to_repeat:
            raise RuntimeError(
                f"this batch serves no further step: it is not the one that was committed last, lambda has changed, or "
                f"it has served ppo_epochs={self.settings.ppo_epochs} steps; call draw"
            )
        self.discard()
        return self._opened(replace(
            batch, epoch=batch.epoch + 1, forwarded=torch.ones_like(batch.forwarded), anew=False, gradient={},
            seconds=dict.fromkeys(("sampling", "scoring"), 0.0), counts=dict.fromkeys(batch.counts, 0.0),
            pending=replace(self.running, steps=self.running.steps + 1),
        ))  # fmt: skip

    def discard(self) -> None:
        """Drop the batch that is not committed. The next draw gives the same sequences again."""
        self.batch, self._passed = None, []

    # ---- loss

    def loss(self, part: Microbatch | Batch, model: nn.Module | None = None, **options: Any) -> DMLossOutput:
        """Return the fused loss of a part of the batch, divided by the sequences of the whole step.

        Call backward on it and add no division of your own. ``accelerator.backward`` divides by the accelerator's
        ``gradient_accumulation_steps`` once more, so multiply before it:
        ``accelerator.backward(out.loss * accelerator.gradient_accumulation_steps)``.

        Args:
            part: one of ``batch.split(size)``, or the batch itself.
            model: the module that computes the policy if it is not ``policy.model``, but a wrapper by DDP or FSDP, or
                a compiled module. Several ranks need it, because nothing else reduces the gradients.
            options: further options of ``LanguageModel.loss``, such as ``chunk_bytes``, or ``token_weight`` for the
                tokens of ``part.samples``.

        Returns:
            ``DMLossOutput`` of the part's sequences; ``loss`` carries the gradient of the model's parameters.

        Raises:
            TypeError: ``part`` is neither a part nor a batch, or an option is given that the matcher sets itself.
            ValueError: there are several ranks and no model; DDP averages over more processes than ``ranks`` says; or
                as ``dm_loss``.
            RuntimeError: the part is of a batch that is not the last one drawn, or its sequences have passed already.
        """
        if not isinstance(part, (Microbatch, Batch)):
            raise TypeError(f"part must be one of batch.split(size), or the batch itself, got a {type(part).__name__}")
        own = sorted(_OF_THE_BATCH & options.keys())
        if own:
            raise TypeError(
                f"the matcher and its batch set {' and '.join(own)} of the loss, so it can't be given here: "
                "temperature is draw's, and the objective and its options are those of Matcher(...)"
            )
        part = part.split()[0] if isinstance(part, Batch) else part
        batch, places = part.batch, part.places
        if batch is not self.batch:
            raise RuntimeError("this part is of a batch that is committed or discarded; split the one drawn last")
        if self.ranks.size > 1 and model is None:
            raise ValueError(
                f"{self.ranks.size} ranks take this step together, and without model= the gradients would not be "
                "reduced over them: pass the module that DDP or FSDP made of policy.model"
            )
        if isinstance(model, DistributedDataParallel) and model.process_group.size() > self.ranks.size:
            raise ValueError(
                f"DDP averages the gradients of {model.process_group.size()} processes, and the matcher's ranks say "
                f"{self.ranks.size}, so that each process would draw the same sequences and estimate Z alone: write "
                "Matcher(..., ranks=dmfast.training.ranks.AccelerateRanks(accelerator)), and draw each one's share of "
                "the prompts"
            )
        if bool(self._has_passed[places].any()):
            raise RuntimeError("sequences of this part have passed the loss already, and would count twice")
        values, on_policy = part.inputs, self.settings.on_policy and batch.epoch == 0
        kept = batch.forwarded[places].clone()
        if len(kept) and not bool(kept.any()):
            kept[0] = True  # at least one sequence, so that the hooks of a wrapper see a forward
        objective: Any = batch.objective
        of_step: dict[str, Any] = {}
        baseline: Any = values.pop("baseline", None)
        if batch.advantage is not None:
            objective = Objective("reinforce") if on_policy else PPOClip(self.settings.ppo_clip)
        elif baseline is not None:
            objective = replace(objective, baseline=baseline[kept])
        elif batch.whole is not None:
            objective = OfStep(objective, batch.whole, places[kept] + self.ranks.rank * len(batch))
            of_step = {"context_id": batch.samples.context_id[places[kept]], "num_tokens": batch.whole.n_tokens}
        everything = bool(kept.all())
        token_weight = options.get("token_weight")
        self._weighs_tokens = self._weighs_tokens or token_weight is not None
        if not everything and isinstance(token_weight, Tensor) and len(token_weight) == len(kept):
            options["token_weight"] = token_weight[kept]
        with _placed_in_batch(places[kept]):
            out = self._around(model).loss(
                part.samples if everything else part.samples[kept],
                objective=objective,
                on_policy=on_policy,
                max_weight=self.settings.max_weight,
                entropy_coefficient=self.settings.entropy_coefficient,
                num_sequences=batch.n_sequences or len(batch),  # DDP averages over ranks
                **of_step,
                **(values if everything else {name: value[kept] for name, value in values.items()}),
                **options,
            )
        if not everything:
            if baseline is None:
                baseline = plain_baseline(objective, len(places), out.weight.device)
            terms = Terms.of(objective, on_policy, math.inf, **values, baseline=baseline)
            out = out.spread(kept.to(out.weight.device), terms)
        self._passed.append((part, out))
        self._has_passed[places] = True
        return out

    def _around(self, model: nn.Module | None) -> LanguageModel:
        """Return the policy around the module that DDP, FSDP or a compiler made of it."""
        if model is None or model is self.policy.model:
            return self.policy
        if self._wrapped is None or self._wrapped.model is not model:
            self._wrapped = self.policy.around(model)
        return self._wrapped

    def _order(self) -> Tensor:
        """Return (N,) int64, the place of each sequence of the batch among those that have passed the loss.

        Raises:
            RuntimeError: there is no batch, or not all of it has passed.
        """
        if self.batch is None:
            raise RuntimeError("there is no batch: call draw, and loss on all parts of what it returns")
        missing = int((~self._has_passed).sum())
        if missing:
            raise RuntimeError(
                f"{missing} of the batch's {len(self.batch)} sequences have not passed the loss: call it on every part "
                "of batch.split(size), then optimizer.step(), then commit"
            )
        return torch.cat([part.places for part, _ in self._passed]).argsort()

    def _check(self) -> None:
        """Raise the errors that a device has recorded in the loss."""
        for part, out in self._passed:
            with _placed_in_batch(part.places[out.scored.cpu()]):
                out.check()

    def measure_gradient(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Measure norm and variance of the step's gradient, for the metrics. Call it before ``optimizer.step()``.

        Args:
            reduce: sums a tensor over ranks. Default: the sum of what ``ranks.gather`` gives.

        Raises:
            RuntimeError: not all of the batch has passed the loss.
            ValueError: the policy is sharded or cut among processes; ``loss`` got a token_weight; or as
                ``gradient_variance``.
        """
        if self._weighs_tokens:
            raise ValueError(
                "measure_gradient weighs each sequence as a whole, and loss got token_weight: what it measured would "
                "be another gradient; leave one of them out"
            )
        model = self.policy.model
        if sharding.is_sharded(model) or sharding.is_cut_by_zero(model) or tensor_parallel.is_cut(model):
            raise ValueError(
                "measure_gradient differentiates each sequence alone and reads whole gradients, so it does not run on "
                "a policy that is sharded or cut among processes; measure in one process"
            )
        start, order = time.perf_counter(), self._order()
        batch = cast(Batch, self.batch)
        self._check()
        weight = torch.cat([out.weight for _, out in self._passed])[order]
        # gradient_variance takes the mean over all sequences of the batch
        weight = weight * (len(batch) / (batch.n_sequences or len(batch)))
        found = gradient_variance(
            self.policy, batch.samples, weight, entropy_coefficient=self.settings.entropy_coefficient,
            reduce=reduce or (lambda x: self.ranks.gather(x[None]).sum(0)),
        )  # fmt: skip
        batch.gradient.update(gradient_variance=found.variance, gradient_norm=found.norm)
        batch.seconds["gradient_variance"] = time.perf_counter() - start

    # ---- commit

    @torch.no_grad()
    def commit(self) -> dict[str, float]:
        """Update Z, the mean return and the estimates after ``optimizer.step()``, then check whether q becomes pi.

        A step that a gradient scaler skipped is committed like any other, because its samples are still q's.

        Returns:
            The metrics of the step: ``kl_policy`` (KL(p||pi), nats) and other estimates with their ``_stderr``,
            ``log_z``, ``ess``, ``phi/<feature>``, ``swapped``, ``seconds_sampling`` and more.
            docs/guide/reading-a-run.md says what each is.

        Raises:
            RuntimeError: there is no batch, or a sequence of it has not passed ``loss``.
            ValueError: a device has recorded an error in the loss. Nothing has changed then: Z, estimates and proposal
                are as they were, and the batch is still there.
        """
        order, lag = self._order(), 0.0
        batch, settings, gather = cast(Batch, self.batch), self.settings, self.ranks.gather
        self._check()  # it costs nothing here, because the host waits for the device below anyway
        batch.seconds["policy"] = time.perf_counter() - self._since - batch.seconds.get("gradient_variance", 0.0)
        # DMLossOutput.join puts the parts together, and these in the batch's order
        out = DMLossOutput.join([out for _, out in self._passed], lambda values: gather(values[order]))
        running = batch.pending
        if settings.baseline == "mean" and batch.epoch == 0:
            total, count = running.returns
            returns = self._returns(batch, out)
            running = replace(running, returns=(total + float(returns.sum()), count + len(returns)))
        with self._undone_on_error():
            if batch.anew:
                self.estimates.clear()
                self._seen.clear()
            if batch.anew or settings.partition == "step":
                self._seen_for_z.clear()
            for seen in (self._seen, self._seen_for_z):
                seen.update(gather(batch.features))
            missing = self._seen.unseen()
            if self.proposal is None and batch.first is not None:
                log_q, log_target, log_z = (gather(each) for each in batch.first)
                self.estimates.take(log_q, log_q, log_target, log_z)  # on-policy log q is log pi
            elif self.proposal is None:
                self.estimates.update(out)
            else:
                version = gather(batch.samples.version)
                lag = float((self.proposal.version - version).double().mean())
                self.proposal.update(out, version=version)  # this updates the same estimates
            now = self._estimates_with(out)
            now = unknown(now) if missing else now
            swapped = self._maybe_swap(running, missing)
        self.running, self.batch, self._passed = running, None, []
        if batch.drawn is not None:
            self._drawn_with = _shape_of(batch.drawn[1])
        self._to_repeat = batch if batch.epoch + 1 < settings.ppo_epochs else None
        self._warn_of_zero(len(out.log_prob))
        metrics = step_metrics(
            batch, out, now, settings=settings, running=running, target=self.target, proposal=self.proposal,
            swapped=swapped, ranks=self.ranks, lag=lag, missing=missing, z_is_known=not self._seen_for_z.unseen(),
            log_z_gap=self._z_gap,
        )  # fmt: skip
        if swapped:
            self._seen.clear()
        if not missing:
            self._compare_z()
        if batch.epoch == 0 and self._refit.take(batch, self.ranks):
            # lambda has changed P, so Z and everything that was estimated under the old P is void
            self.running = Running.start(self.target.lambda_.tolist(), self.running.beta, self.running.steps)
            self.estimates.clear()
            self._seen.clear()
            self._seen_for_z.clear()
            self._drawn_with = None
        return metrics

    def _estimates_with(self, out: DMLossOutput) -> Estimates:
        """Return the estimates of the window, or of the step alone if only earlier q's drew since the last swap."""
        window = self.estimates
        if not len(window):
            window = RunningEstimates()
            window.update(out)
        return window.estimates(self._alpha)

    def _returns(self, batch: Batch, out: DMLossOutput) -> Tensor:
        """Return rho*r of the step's sequences on all ranks."""
        assert isinstance(batch.objective, Objective)
        inputs = {n: self.ranks.gather(batch.inputs[n]) for n in ("reward", "log_base") if n in batch.inputs}
        return weigh(Terms.of(
            replace(batch.objective, baseline=None, normalize=True), self.settings.on_policy, math.inf,
            log_proposal=out.log_proposal, log_target=out.log_target, log_z=out.log_z,
            # with sequences that were not scored the weights are known, and do not depend on log pi
            log_prob=out.log_prob if bool(out.scored.all()) else out.log_proposal,
            **inputs,
        ))  # fmt: skip

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Restore the estimates and the proposal's counter if the block ends in an error."""
        estimates, steps = self.estimates.state_dict(), 0 if self.proposal is None else self.proposal.steps
        seen, seen_for_z = self._seen.state_dict(), self._seen_for_z.state_dict()
        try:
            yield
        except BaseException:
            self.estimates.load_state_dict(estimates)
            self._seen.load_state_dict(seen)
            self._seen_for_z.load_state_dict(seen_for_z)
            if self.proposal is not None:
                self.proposal.steps = steps
            raise

    def _maybe_swap(self, running: Running, missing: Mapping[str, float]) -> bool:
        """Replace q by pi if a check is due and pi is nearer, and return whether it was replaced.

        Where the verdict rests on weights P/q, q stays while Z of the steps is far from the fit's (``z_gap``).

        Args:
            running: the running values, with this step.
            missing: the moments whose feature the window's sequences do not show. Without them no divergence is known.
        """
        self._z_gap = None
        if self.proposal is None:
            return False
        if not self.settings.check_samples:
            if self.proposal.criterion != "interval" or self.proposal.best_only:
                self._z_gap = self._gap_of(running)
                if missing or self._z_gap is not None:
                    return False
            return self.proposal.maybe_update(self.ranks.agree)
        start, batch = time.perf_counter(), cast(Batch, self.batch)
        self._unseen_in_check = {}
        swapped = self.proposal.maybe_update(
            lambda take: self.ranks.agree(take and not self._unseen_in_check and self._z_gap is None),
            fresh=lambda: self._fresh(running, *cast(Any, batch.drawn)),
        )
        batch.seconds["check"] = time.perf_counter() - start
        return swapped

    def _fresh(self, running: Running, contexts: Prompts, how: SamplingOptions) -> Scores:
        """Return the scores of fresh sequences of q under q, a and pi, of all ranks, for a check of the proposal.

        They change neither a step's random numbers nor its Z. ``_unseen_in_check`` notes the moments whose features
        they do not show, and ``_z_gap`` how far Z with them is from the fit's.
        """
        seed, gather = self._seed(f"check {running.steps}"), self.ranks.gather
        if self.check_contexts is not None:
            contexts = self.check_contexts(seed)
        n = math.ceil(self.settings.check_samples / (len(contexts) * self.ranks.size))
        x = self._rollouts.sample(contexts, n, how, seed)
        scores = self._rollouts.score(x, how.batch_size, needs_base=False)[0]
        log_target = scores.log_target
        self._unseen_in_check = unseen(gather(scores.features), self.target.wanted)
        # kl and tvd don't need log pi where P = 0
        scored = (log_target > -math.inf) | (cast("OfflineProposal[Any]", self.proposal).criterion in NEED_ALL)
        log_prob = torch.full_like(log_target, math.nan)
        log_prob[scored] = self.policy.log_prob(x[scored], batch_size=how.batch_size).to(log_prob)
        context, log_prob, log_q, log_target = (
            gather(each) for each in (x.context_id, log_prob, x.log_prob, log_target)
        )
        partitions = self._started(running, x).partitions_before(self.settings.partition)
        partitions = partitions.updated(context, log_target, log_q)
        found = self._comparable(partitions)
        self._z_gap = None if found is None else z_gap(*found)
        return log_prob, log_q, log_target, self._log_z(partitions, context)

    def _comparable(self, partitions: PartitionFunctions) -> tuple[PartitionFunction, Estimate] | None:
        """Return Z of the steps and log Z of the fit of lambda if both are of a single context."""
        report = self.target.report
        if report is None or report.contexts != 1 or len(partitions) != 1:
            return None
        return partitions.values()[0], report.log_z

    def _gap_of(self, running: Running) -> float | None:
        """Return ``z_gap`` of the running Z, or with ``partition="step"`` of the steps since the last swap."""
        found = self._comparable(running.partitions)
        if found is None:
            return None
        steps, fit = found
        if self.settings.partition == "step":
            steps = PartitionFunction()
            _, log_q, log_target, *_ = self.estimates.samples()
            steps.update(log_target, log_q)
        return z_gap(steps, fit)

    def _compare_z(self) -> None:
        """Warn once if Z of the steps is far from what the fit of lambda found, for a single context."""
        both = self._comparable(self.running.partitions)
        if both is None or self._compared_z:
            return
        found, fit = both
        # a warning is given once in a run, so it needs more errors than a swap that is only put off
        if z_gap(found, fit, errors=5.0, trusted=0.0) is not None and found.n >= 100:
            self._compared_z = True
            warn_caller(
                f"log Z is {found.log_z:.3f} ± {found.stderr:.2g} after {found.n:,} sequences of the steps, and the "
                f"fit of lambda found {fit}: the proposal does not show a part of p, or the fit saw another "
                "distribution (prompts, max_new_tokens, temperature). Divergences from p are wrong by about as much, "
                "and a proposal whose criterion is a divergence stays as it is while both Z differ so much"
            )

    def _warn_of_zero(self, batch: int) -> None:
        steps = self.running.zero_steps
        if steps and steps % self.settings.patience_zero == 0:
            n = steps * batch
            warnings.warn(
                f"P(x) = 0 for all {n} sequences of the last {steps} steps, so nothing was learned from them. The "
                f"constraints hold in fewer than {3 / n:.2g} of the proposal's sequences (with 95% confidence). Draw "
                "more sequences a step, prompt the base towards the constraint, or start from a weaker one "
                "(Scorer with b > 0 everywhere, or Moment with a value between 0 and 1)",
                stacklevel=3,
            )

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps need, as of the last commit: lambda, proposal, Z, estimates, running values.

        If one process trains alone, a batch that serves more steps is part of it. Several processes draw a new batch.
        """
        batch = None if self.ranks.size > 1 or self.to_repeat is None else self.to_repeat.state_dict()
        return {
            "format": _FORMAT,
            "target": self.target.state_dict(),
            "proposal": None if self.proposal is None else self.proposal.state_dict(),
            "estimates": self.estimates.state_dict() if self.proposal is None else None,
            "running": self.running.state_dict(),
            "q_is_base": self._rollouts.q_is_base,
            "pool": self._refit.state_dict(),
            "seen": self._seen.state_dict(),
            "seen_for_z": self._seen_for_z.state_dict(),
            "batch": batch,
            "objective": self.settings.name,
            "drawn_with": self._drawn_with,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. A batch that is not committed is discarded.

        If the state is of another objective, a warning says so: the mean return and a batch that serves more steps
        start anew. Another warning says that the state's lambda takes the place of the target's, if they differ and
        lambda is not fitted again on the way (``refit_ess``).

        Raises:
            ValueError: the state has another format or lacks a part, or it is of another target, or of an on-policy run
                and this one is not (or the reverse).
            RuntimeError: the state is of another model. Nothing has changed in any of these cases.
        """
        found = state.get("format")
        if found != _FORMAT:
            raise ValueError(f"the state has the format {found!r}, and this version of dmfast reads {_FORMAT}")
        needed = ("target", "proposal", "running", "q_is_base", "pool", "batch")
        missing = [key for key in needed if key not in state]
        if missing:
            raise ValueError(f"the state has no {', '.join(missing)}; pass what Matcher.state_dict returned")
        if (state["proposal"] is None) != (self.proposal is None):
            raise ValueError("of the checkpoint and this run, one is on-policy and one is not; set on_policy as it was")
        if self.proposal is None and state.get("estimates") is None:
            raise ValueError("the state has no estimates, and without a proposal nothing else holds them")
        name, of_state = self.settings.name, state.get("objective")  # an older state has no name
        another = of_state is not None and of_state != name
        if another:
            state = {**state, "batch": None, "running": {**state["running"], "returns": (0.0, 0)}}
        # copies load the state first, so that everything that may raise comes before the first change
        running = self.running.loaded(state["running"])
        batch = None if state["batch"] is None else self._loaded_batch(state["batch"], running)
        q_is_base, decay = state["q_is_base"], self.estimates.decay
        copy.copy(self.target).load_state_dict(state["target"])
        copy.copy(self._refit).load_state_dict(state["pool"])
        if self.proposal is not None:
            self.proposal.load_state_dict(state["proposal"])  # this changes all or nothing
        else:
            self.estimates.load_state_dict(state["estimates"])  # so does this
        self.estimates.decay = decay
        given = self.target.lambda_.tolist()
        self.target.load_state_dict(state["target"])
        self._refit.load_state_dict(state["pool"])
        self._seen.load_state_dict(state.get("seen"))  # an older state has none
        self._seen_for_z.load_state_dict(state.get("seen_for_z"))
        if "seen_for_z" not in state and running.steps:
            self._seen_for_z.assume_all()
        self.discard()
        self.running, self._to_repeat, self._rollouts.q_is_base = running, batch, q_is_base
        self._drawn_with = state.get("drawn_with")
        if not self.settings.refit_ess and self.target.lambda_.tolist() != given:
            warn_caller(
                f"the checkpoint's lambda of {', '.join(map(repr, self.target.moment_names))} is kept, "
                f"{self.target.lambda_.tolist()}, and not what this run's target was given, {given}: Z, estimates and "
                "the policy so far are of the former"
            )
        if another:
            warn_caller(
                f"the run goes on with another objective than its checkpoint: objective was {of_state!r} and is "
                f"{name!r}, which holds from here on, and the running mean of the returns and a batch that serves more "
                "steps start anew"
            )

    def _loaded_batch(self, state: dict[str, Any], running: Running) -> Batch:
        """Return the batch of a state that ``Batch.state_dict`` returned."""
        samples = Samples(**state["samples"], tokenizer=self.policy.tokenizer)
        objective = self.settings.objective_of(0.0, 0.0, None)
        if state["beta"] is not None:
            objective = replace(cast(Objective, objective), beta=state["beta"])
        return Batch(
            samples, state["inputs"], state["features"], state["log_base"], torch.ones(len(samples), dtype=torch.bool),
            objective, running, advantage=state["advantage"], epoch=int(state["epoch"]),
            rewards=state.get("rewards", {}), _again=self._again,
        )  # fmt: skip

    def forget(self) -> None:
        """Make the next draw a new batch, even if the last one serves more steps or batches were drawn ahead."""
        self.discard()
        self._to_repeat = None
        if self.proposal is not None:
            self.proposal.request([])


def _shape_of(how: SamplingOptions) -> dict[str, Any]:
    """Return the options of a draw that its sequences, and so Z, depend on."""
    return {"max_new_tokens": how.max_new_tokens, "temperature": how.temperature}


@contextmanager
def _placed_in_batch(places: Tensor) -> Iterator[None]:
    """Add the places in the batch to an error that names sequences by their places in a call of the loss.

    Args:
        places: (n,) int64, the place in the batch of each sequence of the call.
    """
    try:
        yield
    except ValueError as error:
        named = [i for i in sorted({int(i) for i in re.findall(r"\bsequence (\d+)", str(error))}) if i < len(places)]
        if not named:
            raise
        of_batch = ", ".join(f"sequence {i} here is sequence {int(places[i])} of the batch" for i in named)
        raise ValueError(f"{error} ({of_batch})") from error
