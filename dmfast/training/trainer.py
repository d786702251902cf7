"""``DMTrainer``: transformers' ``Trainer`` with the sampling, scoring and loss of distribution matching.

An optimiser step, in the order in which the methods stand below:

    get_batch_samples   contexts -> x ~ q -> log P(x), Z; then cut into microbatches
    compute_loss        log pi(x) through the wrapped model, the fused loss
    _finish_step        estimates, baseline, q <- pi if pi is nearer to p
    evaluate            fresh samples of pi; some of them as a table
    _save_checkpoint    all of it, whole or not at all

What a step adds to Z and to the running values is held back until ``optimizer.step()`` is done, so that a checkpoint
taken within a step, or an error in one, finds everything as the step before left it. What a GPU's kernels find (NaN
among the logits, a weight beyond fp32's range) is raised there too, where the host waits for it: a sequence with such a
fault has moved no parameter.
"""

from __future__ import annotations

import copy
import hashlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
)
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import GENERATION_CONFIG_NAME

from .. import adapters
from ..diagnostics import gradient_variance, weight_statistics
from ..estimators import (
    PartitionFunction,
    PartitionFunctions,
    RunningEstimates,
    effective_sample_size,
    estimate_moments,
)
from ..kernels.result import DMLossOutput
from ..models import AdapterView, LanguageModel
from ..objectives import (
    TARGET_OBJECTIVES,
    AdaptiveBeta,
    Objective,
    PPOClip,
    Terms,
    leave_one_out_baseline,
    plain_baseline,
    weigh,
)
from ..proposal import OfflineProposal, Scores
from ..samples import Samples
from ..targets import EBM, Reward, Scorer
from ..targets.constraints import as_feature
from . import checkpoint
from . import samples as samples_table
from .callbacks import Interrupt, JITCheckpoint, LogLine, Progress, StepEnd
from .card import model_card
from .config import DMConfig, refuse_parallelism
from .data import ContextLoader, Contexts, StepSampler, contexts_of
from .evaluation import examine

# of a model's generation_config: what would change the distribution that is sampled from
_SAMPLER_OPTIONS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "sequence_bias", "num_beams",
)  # fmt: skip


@dataclass
class _Running:
    """What is carried from step to step and committed at the end of each."""

    partitions: PartitionFunctions
    scale: PartitionFunction  # the running mean of P, whose log is c of reinforce_p
    returns: tuple[float, int]  # sum and number of rho*r, for baseline="mean"
    zero_steps: int  # steps in a row without a sequence of P > 0
    steps: int  # taken by this trainer, over all of its calls of train()
    lambda_: list[float]  # that P is meant with
    beta: AdaptiveBeta | None  # None: fixed


@dataclass(frozen=True, eq=False)
class _Step:
    """One optimiser step on this rank: N sequences, scored."""

    samples: Samples
    context: Tensor  # (N,) row of the data set
    features: Tensor  # (N, F + M): moments, then what is monitored
    inputs: dict[str, Tensor]  # (N,) fp64 each: log_target, log_z, and what else the objective needs
    forwarded: Tensor  # (N,) bool: gets a policy forward
    seconds: dict[str, float]
    pending: _Running  # with this step's samples
    objective: Objective
    advantage: Tensor | None = None  # (N,) r - baseline at the sampling policy, where the batch serves several steps
    epoch: int = 0  # steps that it has served before
    log_base: Tensor | None = None  # (N,) NaN where b = 0
    counts: dict[str, float] = field(default_factory=dict)  # what the scorers did for it on this rank
    gradient: dict[str, float] = field(default_factory=dict)  # its norm and variance, where they were asked for

    @property
    def loss_inputs(self) -> dict[str, Tensor]:
        """The inputs as the loss takes them."""
        if self.advantage is None:
            return self.inputs
        kept = {name: self.inputs[name] for name in ("log_target", "log_proposal", "log_z")}
        return kept | {"reward": self.advantage}

    def ordered(self, order: Tensor) -> _Step:
        """With the sequences in another order."""
        return replace(
            self, samples=self.samples[order], context=self.context[order], features=self.features[order],
            inputs={name: value[order] for name, value in self.inputs.items()}, forwarded=self.forwarded[order],
            advantage=None if self.advantage is None else self.advantage[order],
            log_base=None if self.log_base is None else self.log_base[order],
        )  # fmt: skip


class DMTrainer(Trainer):  # type: ignore[misc]
    """Makes ``model`` equal to the target distribution p = P/Z (Korbak et al. 2022, arXiv:2206.00761, algorithm 1).

    Args:
        model: the policy pi, a causal language model of transformers, or a PEFT model around one. Its dropout is set
            to 0, since a sequence and its score must come from one distribution.
        target: an ``EBM`` that is fitted, around a base of its own (not ``model`` itself: the base must not move), or
            around ``LanguageModel(model, tokenizer).base()`` for a PEFT model: a, pi and q then share its backbone, and
            q is a second adapter.
        args: ``DMConfig``.
        train_dataset: prompts, as ``dmfast.training.data.Contexts`` takes them; None: the empty context.
        eval_dataset: prompts to evaluate on. Default: those of ``train_dataset``.
        processing_class: the tokenizer. Default: the base's.
        reward: R(x) for ``reinforce`` and ``kl_control``: a callable on ``Samples`` that gives (N,), such as
            ``dmfast.Scorer``.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in ``transformers.Trainer``.

    Attributes:
        policy: the model as a ``LanguageModel``. proposal: the ``OfflineProposal``, None on-policy.
        eval_samples: the ``Samples`` of the last evaluation.

    Raises:
        ValueError: what can't be trained: a base that is the model itself, a tokenizer that does not fit, an objective
            without its reward, FSDP, DeepSpeed, DataParallel.
    """

    control: TrainerControl
    # what compute_loss returns is divided by the step's sequences already
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        target: EBM,
        args: DMConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward: Callable[[Samples], Tensor] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
    ) -> None:
        args = DMConfig("dmfast_output") if args is None else args
        if not isinstance(args, DMConfig):
            raise TypeError(f"args must be a dmfast.DMConfig, got {type(args).__name__}")
        _refuse_arguments(args)
        if (
            getattr(model, "is_distributed_loading_by_transformers", False)
            or (getattr(model, "tp_size", None) or 1) > 1
        ):
            raise ValueError(
                "DMTrainer does not run under tensor parallelism yet, and the model was sharded as it was loaded; load "
                "it without tp_plan and distributed_config"
            )
        base = target.base
        if isinstance(base, AdapterView) and base.model is model:
            adapters.check(model)
        elif not {p.data_ptr() for p in base.model.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters()):
            raise ValueError(
                "target.base shares parameters with the model that is to be trained, so the target would move with it "
                "(an adapter put into a model changes that model too); give the EBM a copy from before, "
                "LanguageModel(copy.deepcopy(model), tokenizer), or for a PEFT model the view without its adapter, "
                "LanguageModel(model, tokenizer).base()"
            )
        if not target.fitted:
            raise ValueError(f"{target} is not fitted, so its lambda is not known: call target.fit(...) first")
        fitted_with = None if target.report is None else target.report.max_new_tokens
        if fitted_with not in (None, args.max_new_tokens):
            warnings.warn(
                f"lambda was fitted on samples of up to {fitted_with} new tokens, and DMConfig.max_new_tokens is "
                f"{args.max_new_tokens}: the moments of longer or shorter sequences are others; fit with the same",
                stacklevel=2,
            )
        needs = args.make_objective().needs
        if "reward" in needs and reward is None:
            raise ValueError(f"objective {args.objective!r} needs reward=, a callable on Samples that gives R(x)")
        tokenizer = base.tokenizer if processing_class is None else processing_class
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
            warnings.warn(f"the tokenizer has no pad token; padding with EOS, {tokenizer.eos_token!r}", stacklevel=2)
        self.policy = LanguageModel(model, tokenizer, eos_token_id=base.eos_token_ids)
        if len(tokenizer) > self.policy.vocab_size or self.policy.vocab_size != base.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {self.policy.vocab_size} embeddings and the "
                f"base {base.vocab_size}: they don't belong together"
            )
        _warn_of_generation_config(model)
        self.target, self.reward = target, None if reward is None else as_feature(reward, "reward")
        self._scorers = target.scorers
        rewards = self.reward.fn if isinstance(self.reward, Reward) else self.reward
        if isinstance(rewards, Scorer) and all(rewards is not scorer for scorer in self._scorers.values()):
            self._scorers["reward" if rewards.name in self._scorers else rewards.name] = rewards
        self._contexts = Contexts(train_dataset)
        self._has_prompts = train_dataset is not None
        self._eval_contexts = self._contexts if eval_dataset is None else Contexts(eval_dataset)
        if not self._has_prompts and args.max_steps <= 0:
            raise ValueError("without a train_dataset there are no epochs to count: set max_steps in DMConfig")
        if len(self._contexts) > 1 and (args.samples_per_context or 1) < 2 and args.objective in TARGET_OBJECTIVES:
            warnings.warn(
                "with one sample per context (DMConfig.samples_per_context) a context's first visit estimates its Z "
                "from that sample alone, which makes the weight of the sample p/q = 1 whatever it is; draw more",
                stacklevel=2,
            )
        self._interrupt = Interrupt()
        jit, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False  # handled from train() to its end only
        try:
            super().__init__(
                model=model,
                args=args,
                train_dataset=self._contexts,
                eval_dataset=self._eval_contexts,
                processing_class=tokenizer,
                callbacks=[StepEnd(self._before_optimizer, self._finish_step), self._interrupt, *(callbacks or [])],
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
        finally:
            args.enable_jit_checkpoint = jit
        for stock, ours in ((ProgressCallback, Progress), (PrinterCallback, LogLine)):
            for callback in [c for c in self.callback_handler.callbacks if type(c) is stock]:
                self.callback_handler.callbacks.remove(callback)
                self.add_callback(ours)
        shared = base.model is model  # then it is on the device, and the policy's to train
        if not shared:
            base.model.to(self.args.device).requires_grad_(False)
        self.proposal: OfflineProposal[LanguageModel] | None = None
        if not args.on_policy:
            self.proposal = OfflineProposal(
                self.policy, args.proposal_criterion, args.proposal_interval, best_only=args.proposal_best_only,
                stderrs=args.proposal_stderrs, decay=args.proposal_decay, device=args.proposal_device,
                adapter=shared and args.proposal_device is None,
            )  # fmt: skip
        self._estimates = RunningEstimates(args.proposal_decay) if self.proposal is None else self.proposal.running
        beta = None
        if args.beta_target_kl is not None:
            beta = AdaptiveBeta(cast(float, args.beta), args.beta_target_kl, args.beta_horizon)
        self._running = _Running(
            PartitionFunctions(), PartitionFunction(), (0.0, 0), 0, 0, target.lambda_.tolist(), beta
        )
        self._batch: _Step | None = None  # one that serves more steps
        self._pool: list[dict[str, Tensor]] = []  # scored sequences, to fit lambda again
        self._q_is_base: bool | None = None  # not known before the first step
        self._step: _Step | None = None
        self._outputs: list[DMLossOutput] = []
        self._metrics: list[dict[str, float]] = []
        self._started = 0.0
        self._staging: str | None = None
        self._wrapped: LanguageModel | None = None
        self._push_later = False
        self._jit: JITCheckpoint | None = None  # while train() runs
        self._random_state_of: str | None = None  # the checkpoint to go on from, until its random state is there
        self._model_step: int | None = None  # where it is not the last one
        self.eval_samples: Samples | None = None
        for contexts in {id(c): c for c in (self._contexts, self._eval_contexts)}.values():
            self.policy.check_prompts([prompt for _, prompt in contexts], args.max_new_tokens)
        self.get_train_dataloader()  # refuses now what it would refuse in train()

    # ---- the data

    @property
    def partitions(self) -> PartitionFunctions:
        """The Z of each context, by its row in ``train_dataset``, over all of its visits; with ``partition="step"`` of
        the contexts of the last step alone.
        """
        return self._running.partitions

    @property
    def samples_per_context(self) -> int:
        """n: sequences of each context in a step."""
        if self.args.samples_per_context is not None and self._has_prompts:
            return int(self.args.samples_per_context)
        if len(self._contexts) > 1:
            return 1
        return int(self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps)

    def get_train_dataloader(self) -> ContextLoader:
        """Microbatches of contexts."""
        args = self.args
        sampler = StepSampler(
            len(self._contexts), self.samples_per_context, per_device=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps, rank=args.process_index, world=args.world_size,
            steps=None if self._has_prompts else math.ceil(args.max_steps / args.ppo_epochs), repeats=args.ppo_epochs,
            shuffle=args.train_sampling_strategy == "random",
            seed=args.seed if args.data_seed is None else args.data_seed,
        )  # fmt: skip
        return ContextLoader(self._contexts, sampler)

    # ---- the step: samples, log P, Z

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Draws and scores all sequences of an optimiser step, fixes Z, then cuts them into microbatches."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return [], None
        if self._random_state_of is not None:
            self._load_rng_state(self._random_state_of)
        with self.accelerator.autocast():
            self._step = step = self._again() or self._draw(contexts_of(batches, self.samples_per_context))
        self._outputs, self._started = [], time.perf_counter()
        microbatches, start = [], 0
        for batch in batches:
            part = slice(start, start + len(batch))
            start += len(batch)
            samples = step.samples[part].trimmed()
            inputs = {name: value[part] for name, value in step.loss_inputs.items()}
            microbatches.append(
                {"input_ids": samples.tokens, "samples": samples, "loss_inputs": inputs, "kept": step.forwarded[part]}
            )
        return microbatches, None

    def _seed(self, what: str) -> int:
        """One per step, so that a resumed run draws what an unbroken one does; and not that of anything else."""
        return int.from_bytes(hashlib.blake2b(f"{self.args.seed} {what}".encode(), digest_size=7).digest(), "big")

    def _again(self) -> _Step | None:
        """The batch of the step before, where it serves this one, too. It has added to Z and all else already."""
        batch = self._batch
        if batch is None or self._running.lambda_ != self.target.lambda_.tolist():
            return None
        return replace(
            batch, epoch=batch.epoch + 1, forwarded=torch.ones_like(batch.forwarded),
            seconds=dict.fromkeys(("sampling", "scoring", "policy"), 0.0), counts=dict.fromkeys(batch.counts, 0.0),
            gradient={}, pending=replace(self._running, steps=self._running.steps + 1),
        )  # fmt: skip

    @torch.no_grad()
    def _draw(self, contexts: Sequence[tuple[int, Any]]) -> _Step:
        args, start = self.args, time.perf_counter()
        if self._running.lambda_ != self.target.lambda_.tolist():
            self._forget_target()
        model = self.policy if self.proposal is None else self.proposal
        n = self.samples_per_context
        x = model.sample(
            [prompt for _, prompt in contexts], n, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
            seed=self._seed(f"step {self._running.steps}"), batch_size=args.sampling_batch_size,
            first_row=args.process_index * len(contexts) * n,
        )  # fmt: skip
        rows = torch.tensor([row for row, _ in contexts], device=x.tokens.device)
        context = rows[x.context_id]
        sampled = time.perf_counter()

        needs_base = "log_base" in args.make_objective().needs
        log_base = x.log_prob if self._proposal_is_base(x) else None
        if log_base is None and needs_base:
            log_base = self._log_base(x)
        done = self._scorer_counts()
        scores = self.target.score(x, log_base, batch_size=args.sampling_batch_size)
        inputs = {"log_target": scores.log_target, "log_proposal": x.log_prob}
        if needs_base:
            inputs["log_base"] = cast(Tensor, log_base)
        if self.reward is not None:
            inputs["reward"] = self.reward(x)
        counts = {name: value - done[name] for name, value in self._scorer_counts().items()}
        pending = self._with_step(context, scores.log_target, x.log_prob)
        inputs["log_z"] = pending.partitions.log_z(context)
        total, count = self._running.returns
        log_scale = pending.scale.log_z
        objective = args.make_objective(
            total / count if count else 0.0, log_scale if math.isfinite(log_scale) else 0.0,
            self._running.beta and self._running.beta.value,
        )  # fmt: skip
        if pending.beta is not None:
            log_ratio = self._gather(x.log_prob - inputs["log_base"])
            pending.beta.update(float(log_ratio.mean()), len(log_ratio))
        if isinstance(objective.baseline, str):  # of the whole step, however it is cut
            inputs["baseline"] = self._leave_one_out(objective, context, inputs)
        features = torch.cat([scores.features, scores.monitored], 1)
        seconds = {"sampling": sampled - start, "scoring": time.perf_counter() - sampled}
        advantage = self._advantage(objective, inputs) if args.ppo_epochs > 1 else None
        step = _Step(
            x, context, features, inputs, self._forwarded(objective, inputs), seconds, pending, objective, advantage,
            log_base=scores.log_base, counts=counts,
        )  # fmt: skip
        # sequences of about one length go together: less padding in a microbatch, little if prompts are of one length
        return (
            step.ordered(x.attention_mask.sum(1).argsort(stable=True)) if args.gradient_accumulation_steps > 1 else step
        )

    def _forwarded(self, objective: Objective, inputs: dict[str, Tensor]) -> Tensor:
        """(N,) bool: not known to have weight 0."""
        terms = self._terms_of(objective, inputs)
        if not self.args.skip_zero_weight or not terms.weight_known:
            return torch.ones_like(inputs["log_target"], dtype=torch.bool)
        # A does not depend on log pi where it is known, so anything will do
        return weigh(terms) != 0

    def _terms_of(self, objective: Objective, inputs: dict[str, Tensor]) -> Terms:
        """With log q in the place of log pi."""
        values, log_q = dict(inputs), inputs["log_proposal"]
        baseline: Any = values.pop("baseline", None)
        if baseline is None:
            baseline = plain_baseline(objective, len(log_q), log_q.device)
        return Terms.of(objective, self.args.on_policy, math.inf, **values, baseline=baseline, log_prob=log_q)

    def _advantage(self, objective: Objective, inputs: dict[str, Tensor]) -> Tensor:
        """(N,) r - baseline at the sampling policy, which is A there, since rho = 1."""
        return weigh(self._terms_of(objective, inputs))

    def _leave_one_out(self, objective: Objective, context: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """(N,) fp64: the baseline of this rank's sequences, over those of all ranks."""
        terms = Terms.of(objective, self.args.on_policy, math.inf, **{k: self._gather(v) for k, v in inputs.items()})
        contexts = self._gather(context)
        whole = leave_one_out_baseline(terms, contexts, len(contexts), contexts.device)
        first = self.args.process_index * len(context)
        return whole[first : first + len(context)]

    def _forget_target(self) -> None:
        """After another lambda: P is another, so Z and all that was estimated under the old one is void."""
        self._running = _Running(PartitionFunctions(), PartitionFunction(), (0.0, 0), 0, self._running.steps,
                                 self.target.lambda_.tolist(), self._running.beta)  # fmt: skip
        self._estimates.clear()

    def _scorer_counts(self) -> dict[str, float]:
        """``ScorerCounts`` of all scorers, flat, with the names that they are logged by."""
        return {
            f"scorer/{name}/{what}": value
            for name, scorer in self._scorers.items() for what, value in vars(scorer.counts).items()
        }  # fmt: skip

    def _log_base(self, x: Samples) -> Tensor:
        return self.target.base.log_prob(x, batch_size=self.args.sampling_batch_size)

    def _proposal_is_base(self, x: Samples) -> bool:
        """Whether q still is a, so that log a(x) = log q(x): found out once, by whether both score alike to a bit."""
        if self.proposal is None or self.proposal.swaps:
            return False
        if self._q_is_base is None:
            some, q = x[: min(len(x), 8)], self.proposal.snapshot
            self._q_is_base = torch.equal(q.log_prob(some.to(q.device)).to(x.log_prob), self.target.base.log_prob(some))
        return self._q_is_base

    def _with_step(self, context: Tensor, log_target: Tensor, log_proposal: Tensor) -> _Running:
        """The running values with the samples of all ranks."""
        context, log_target, log_proposal = (self._gather(v) for v in (context, log_target, log_proposal))
        scale = copy.copy(self._running.scale)
        scale.update(log_target, torch.zeros_like(log_target))
        nothing = bool((log_target == -math.inf).all())
        return replace(
            self._running,
            partitions=self._partitions.updated(context, log_target, log_proposal),
            scale=scale,
            zero_steps=self._running.zero_steps + 1 if nothing else 0,
            steps=self._running.steps + 1,
            beta=copy.copy(self._running.beta),
        )

    @property
    def _partitions(self) -> PartitionFunctions:
        """What a step's samples are added to."""
        return PartitionFunctions() if self.args.partition == "step" else self._running.partitions

    def _gather(self, values: Tensor) -> Tensor:
        """(N, ...) of all ranks, in their order."""
        return cast(Tensor, self.accelerator.gather(values.contiguous())) if self.args.world_size > 1 else values

    def _sum(self, value: Tensor) -> Tensor:
        """Over all ranks."""
        return cast(Tensor, self.accelerator.reduce(value, "sum")) if self.args.world_size > 1 else value

    # ---- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The fused loss of one microbatch, divided by the sequences of the whole step."""
        assert self._step is not None
        objective: Objective | PPOClip = self._step.objective
        values, on_policy = dict(inputs["loss_inputs"]), self.args.on_policy and self._step.epoch == 0
        if self._step.advantage is not None:
            objective = Objective("reinforce") if on_policy else PPOClip(self.args.ppo_clip)
        elif "baseline" in values:
            objective = replace(self._step.objective, baseline=values.pop("baseline"))
        kept: Tensor = inputs["kept"].clone()
        if len(kept) and not bool(kept.any()):
            kept[0] = True  # one forward, for the hooks of whatever is around the model
        everything = bool(kept.all())
        out = self._policy_around(model).loss(
            inputs["samples"] if everything else inputs["samples"][kept],
            objective=objective,
            on_policy=on_policy,
            max_weight=self.args.max_weight,
            num_sequences=len(self._step.samples),  # DDP averages over ranks
            **(values if everything else {name: value[kept] for name, value in values.items()}),
        )
        if not everything:
            out = out.spread(kept, Terms.of(objective, on_policy, math.inf, **values))
        self._outputs.append(out)
        return (out.loss, out) if return_outputs else out.loss

    def _policy_around(self, model: nn.Module) -> LanguageModel:
        """The policy with the module that transformers made of it: DDP, torch.compile."""
        if model is self.policy.model:
            return self.policy
        if self._wrapped is None or self._wrapped.model is not model:
            self._wrapped = self.policy.around(model)
        return self._wrapped

    # ---- the end of a step

    def _before_optimizer(self) -> None:
        assert self._step is not None
        self._step.seconds["policy"] = time.perf_counter() - self._started
        every = self.args.gradient_variance_steps
        if every and (self.state.global_step + 1) % every == 0:
            self._measure_gradients(self._step)

    def _measure_gradients(self, step: _Step) -> None:
        """While the policy still is as the step has found it."""
        start = time.perf_counter()
        for out in self._outputs:
            out.check()
        weight = torch.cat([out.weight for out in self._outputs])
        with self.accelerator.autocast():
            found = gradient_variance(self.policy, step.samples, weight, reduce=self._sum)
        step.gradient.update(gradient_variance=found.variance, gradient_norm=found.norm)
        step.seconds["gradient_variance"] = time.perf_counter() - start

    @torch.no_grad()
    def _finish_step(self) -> None:
        """Commits what the step adds: Z, the mean return, the estimates; then asks whether q <- pi."""
        step, outputs = self._step, self._outputs
        assert step is not None
        for out in outputs:  # here, since the host waits for the device below anyway
            out.check()
        asked = [self._interrupt.asked, self._jit is not None and self._jit.asked]
        self._interrupt.agreed, terminate = self._gather(torch.tensor([asked], device=self.args.device)).any(0).tolist()
        if self._jit is not None:
            self._jit.agreed = terminate
        out = DMLossOutput.join(outputs, self._gather)
        self._running = step.pending
        self._batch = step if step.epoch + 1 < self.args.ppo_epochs else None
        if self.args.baseline == "mean" and step.epoch == 0:
            terms = Terms.of(
                replace(step.objective, baseline=None, normalize=True), self.args.on_policy, math.inf,
                log_proposal=out.log_proposal,
                log_target=out.log_target, log_z=out.log_z,
                log_prob=out.log_prob if bool(out.scored.all()) else out.log_proposal,  # known weights: any will do
                **{name: self._gather(step.inputs[name]) for name in ("reward", "log_base") if name in step.inputs},
            )  # fmt: skip
            returns, (total, count) = weigh(terms), self._running.returns
            self._running.returns = (total + float(returns.sum()), count + len(returns))
        if self.proposal is None:
            self._estimates.update(out)
        else:
            self.proposal.update(out)  # into the same estimates
        now = self._estimates.estimates()
        start = time.perf_counter()
        fresh = self._fresh if self.args.proposal_check_samples else None
        swapped = self.proposal is not None and self.proposal.maybe_update(self._verdict_of_rank_0, fresh=fresh)
        if fresh is not None:
            step.seconds["check"] = time.perf_counter() - start
        self._warn_of_zero(len(out.log_prob))
        if self.args.logging_strategy == "no":
            self._metrics = []
        self._metrics.append(self._metrics_of(step, out, now.as_dict(), swapped))
        if step.epoch == 0:
            self._refit(step)
        self._step, self._outputs = None, []

    def _fresh(self) -> Scores:
        """Sequences of q for a check of the proposal alone, scored by q, a and pi; those of all ranks.

        They change nothing that a step has: neither its random numbers nor Z.
        """
        args, proposal = self.args, cast("OfflineProposal[LanguageModel]", self.proposal)
        some = min(len(self._contexts), max(args.proposal_check_samples // self.samples_per_context, 1))
        mine = math.ceil(args.proposal_check_samples / (some * args.world_size))  # of each context, on this rank
        seed = self._seed(f"check {self._running.steps}")
        rows = torch.randperm(len(self._contexts), generator=torch.Generator().manual_seed(seed))[:some]
        with self.accelerator.autocast():
            x = proposal.sample(
                [self._contexts[row][1] for row in rows.tolist()], mine, max_new_tokens=args.max_new_tokens,
                temperature=args.temperature, seed=seed, batch_size=args.sampling_batch_size,
                first_row=args.process_index * mine * some,
            )  # fmt: skip
            log_base = x.log_prob if self._proposal_is_base(x) else None
            log_target = self.target.score(x, log_base, batch_size=args.sampling_batch_size).log_target
            # where P = 0, kl and tvd don't need log pi
            scored = (log_target > -math.inf) | (args.proposal_criterion == "js")
            log_prob = torch.full_like(log_target, math.nan)
            log_prob[scored] = self.policy.log_prob(x[scored], batch_size=args.sampling_batch_size).to(log_prob)
        context = rows.to(x.context_id.device)[x.context_id]
        context, log_prob, log_proposal, log_target = (
            self._gather(each) for each in (context, log_prob, x.log_prob, log_target)
        )
        log_z = self._partitions.updated(context, log_target, log_proposal).log_z(context)
        return log_prob, log_proposal, log_target, log_z

    def _refit(self, step: _Step) -> None:
        """lambda anew, where its fit rests on few samples and enough of the proposals' have been seen."""
        args, report = self.args, self.target.report
        if report is None or report.ess >= args.refit_ess or not self.target.moment_names:
            return
        width = len(self.target.moment_names)
        log_target, log_q, log_base, features, context = (
            self._gather(x) for x in (step.inputs["log_target"], step.inputs["log_proposal"],
                                      cast(Tensor, step.log_base), step.features[:, :width], step.context)
        )  # fmt: skip
        lambda_ = self.target.lambda_.to(features)
        log_b = torch.where(log_target == -math.inf, -math.inf, log_target - log_base - features @ lambda_)
        self._pool.append({"features": features, "log_b": log_b, "log_ratio": log_base - log_q, "context_id": context})
        if sum(len(each["context_id"]) for each in self._pool) < args.refit_samples:
            return
        whole = {name: torch.cat([each[name] for each in self._pool]) for name in self._pool[0]}
        self._pool = []
        try:
            self.target.refit(**whole)
        except ValueError as error:
            warnings.warn(f"lambda could not be fitted again and stays as it is: {error}", stacklevel=2)
        if self.target.report is not report:
            self._forget_target()

    def _verdict_of_rank_0(self, mine: bool) -> bool:
        if self.args.world_size == 1:
            return mine
        verdict = torch.tensor([mine], device=self.args.device)
        return bool(self._gather(verdict)[0])

    def _metrics_of(
        self, step: _Step, out: DMLossOutput, estimates: dict[str, float], swapped: bool
    ) -> dict[str, float]:
        seen = step.pending.partitions.log_z(step.context)
        finite = seen[seen.isfinite()]
        log_z = float(finite.mean()) if len(finite) else -math.inf
        features = self._gather(step.features)
        metrics = {f"phi/{name}": float(v) for name, v in zip(self.feature_names, features.mean(0), strict=True)}
        # log_z and ess among the estimates are those of the window since the last swap
        window = {k: v for k, v in estimates.items() if not k.startswith(("log_z", "ess"))}
        assert out.log_target is not None and out.log_proposal is not None and out.log_z is not None
        log_u = torch.where(out.log_z == -math.inf, -math.inf, out.log_target - out.log_proposal - out.log_z)
        metrics |= window | {
            "log_z": log_z,
            "z": math.exp(log_z) if log_z < 700 else math.inf,
            "ess": effective_sample_size(log_u).value,
            "swaps": float(self.proposal.swaps) if self.proposal else 0.0,
            "swapped": float(swapped),
            **weight_statistics(out.weight),
            "n_clipped": float(out.n_clipped),
            "n_empty": float((out.log_z == -math.inf).sum()),
            "length": float(self._gather(step.samples.score_mask.sum(1)).double().mean()),
        }
        if self.proposal is not None and self.proposal.last_check is not None:
            check = self.proposal.last_check
            metrics |= {"proposal_check": check.value, "proposal_check_stderr": check.stderr}
        if len(self._running.partitions) == 1 and self.args.partition == "running":
            metrics["log_z_stderr"] = self._running.partitions[int(step.context[0])].stderr
        if self.args.baseline == "mean":
            total, count = self._running.returns
            metrics["baseline"] = total / max(count, 1)
        if "reward" in step.inputs:
            metrics["reward"] = float(self._gather(step.inputs["reward"]).mean())
        if self.args.on_policy and "log_base" in step.inputs:
            log_ratio = self._gather(step.inputs["log_proposal"] - step.inputs["log_base"])
            (kl,) = estimate_moments(log_ratio[:, None], torch.zeros_like(log_ratio))
            metrics |= {"kl_policy_base": kl.value, "kl_policy_base_stderr": kl.stderr}
        if self.args.refit_ess and self.target.report is not None:
            named = zip(self.target.moment_names, self.target.lambda_.tolist(), strict=True)
            metrics |= {f"lambda/{name}": value for name, value in named} | {"fit_ess": self.target.report.ess}
        if step.objective.beta is not None:
            metrics["beta"] = step.objective.beta
        if step.advantage is not None and out.log_ratio is not None:
            clipped = PPOClip(self.args.ppo_clip).clipped(out.log_ratio, self._gather(step.advantage))
            metrics["clip_fraction"] = float(clipped.double().mean())
        if self.args.objective == "reinforce_p":
            metrics["log_scale"] = step.objective.log_scale or 0.0
        seconds = {f"seconds_{what}": value for what, value in step.seconds.items()}
        return metrics | step.gradient | step.counts | seconds

    @property
    def feature_names(self) -> list[str]:
        """The target's moments, then what it monitors."""
        return [*self.target.moment_names, *self.target.monitor_names]

    def _warn_of_zero(self, batch: int) -> None:
        steps = self._running.zero_steps
        if steps and steps % self.args.patience_zero == 0:
            n = steps * batch
            warnings.warn(
                f"P(x) = 0 for all {n} sequences of the last {steps} steps, so nothing was learned from them. The "
                f"constraints hold in fewer than {3 / n:.2g} of the proposal's sequences (with 95% confidence). Draw "
                "more sequences a step, prompt the base towards the constraint, or start from a weaker one "
                "(Scorer with b > 0 everywhere, or Moment with a value between 0 and 1)",
                stacklevel=2,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' log with the metrics of the steps since the last one: means of what varies, else the last."""
        if "loss" in logs and self._metrics:
            means = ("phi/", "scorer/", "weight_", "seconds_", "length", "ess", "reward", "clip_fraction")
            sums = ("n_clipped", "n_empty", "swapped")
            for key in {key: None for metrics in self._metrics for key in metrics}:
                values = [m[key] for m in self._metrics if key in m]
                # what is done in some steps only takes no time in the others
                mean = sum(values) / (len(self._metrics) if key.startswith("seconds_") else len(values))
                logs[key] = sum(values) if key in sums else mean if key.startswith(means) else values[-1]
            self._metrics = []
        super().log(logs, start_time)

    # ---- evaluation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """E_pi[phi], KL(pi||a) and KL(p||pi) with standard errors, on ``args.eval_samples`` fresh sequences of pi.

        The same random numbers at every evaluation, so that two differ by what the policy has learned.

        Args:
            eval_dataset: prompts in place of the trainer's. ignore_keys: has no meaning here.
            metric_key_prefix: of the names of the metrics.

        Returns:
            ``eval_phi/<feature>``, ``eval_kl_policy_base`` (KL(pi||a), nats) and ``eval_kl_policy`` (KL(p||pi), nats,
            by importance weights), each with ``_stderr``; ``eval_length`` (tokens), ``eval_finished`` (share that ended
            in EOS), ``eval_runtime`` (seconds). With ``args.eval_diversity``: ``eval_distinct_1`` to
            ``eval_distinct_3``, with ``_stderr``, and ``eval_self_bleu_5``.
        """
        start, args = time.perf_counter(), self.args
        contexts = self._eval_contexts if eval_dataset is None else Contexts(eval_dataset)
        some = min(len(contexts), args.eval_samples)
        per_context = math.ceil(args.eval_samples / some)
        mine = math.ceil(per_context / args.world_size)  # of each context, on this rank
        prompts = [contexts[i][1] for i in range(some)]
        with self.accelerator.autocast():
            found = examine(
                self.policy, self.target, prompts, mine, max_new_tokens=args.max_new_tokens,
                temperature=args.temperature, seed=self._seed("evaluation"),
                batch_size=args.sampling_batch_size or args.per_device_train_batch_size,
                texts=args.eval_diversity, first_row=args.process_index * mine * some, gather=self._gather,
                gather_texts=gather_object if args.world_size > 1 else lambda texts: texts,
            )  # fmt: skip
        self.eval_samples, metrics = found.samples, {}
        for name, estimate in found.estimates.items():
            metrics[f"{metric_key_prefix}_{name}"] = estimate.value
            if name not in ("length", "finished", "self_bleu_5"):
                metrics[f"{metric_key_prefix}_{name}_stderr"] = estimate.stderr
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        if args.log_samples and self.is_world_process_zero():
            has_prompts = eval_dataset is not None or self._eval_contexts is not self._contexts or self._has_prompts
            rows = samples_table.rows(found, prompts if has_prompts else None, args.log_samples,
                                      step=self.state.global_step, name=metric_key_prefix)  # fmt: skip
            samples_table.write(Path(args.output_dir), rows, self.state.global_step)
            samples_table.send(self.callback_handler.callbacks, rows, self.state.global_step,
                               f"{metric_key_prefix}/samples")  # fmt: skip
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Has no meaning here: a distribution has no labels to predict. Use ``evaluate`` or ``policy.sample``."""
        raise NotImplementedError("DMTrainer has nothing to predict; use evaluate(), or trainer.policy.sample(...)")

    # ---- the run, checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``train``. Ctrl-C ends it after the current step, with a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True: the newest of the run.

        Raises:
            ValueError: the checkpoint is truncated; the message names the newest whole one.
            OSError: a checkpoint could not be written; the previous ones are as they were.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = str(checkpoint.to_resume(resume_from_checkpoint, Path(self.args.output_dir)))
        self._metrics, self._model_step, self._batch = [], None, None
        self._random_state_of = resume_from_checkpoint or None
        if not resume_from_checkpoint and self.args.log_samples and self.is_world_process_zero():
            samples_table.forget(Path(self.args.output_dir))
        self._jit = jit = self._install_jit()
        self._interrupt.install()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._interrupt.remove()
            self._jit = None
            if jit is not None:
                self.callback_handler.callbacks.remove(jit)
                signal.signal(signal.SIGTERM, jit.jit_manager._original_sigterm_handler)

    def _install_jit(self) -> JITCheckpoint | None:
        """transformers' checkpoint at SIGTERM, which its constructor would install for good, and in any thread."""
        if not self.args.enable_jit_checkpoint:
            return None
        if threading.current_thread() is not threading.main_thread():
            warnings.warn("enable_jit_checkpoint has no effect outside the main thread", stacklevel=3)
            return None
        jit = JITCheckpoint()
        jit.set_trainer(self)
        self.add_callback(jit)
        return jit

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._model_step = self.state.best_global_step

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or cast(str, super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        writes = bool(self.args.should_save)
        with checkpoint.staged(run_dir, name, writes, self.accelerator.wait_for_everyone) as staging:
            self._staging = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            best = self.state.best_global_step
            if best:
                folder = run_dir / f"checkpoint-{best}"
                self.state.best_model_checkpoint = str(folder) if folder.is_dir() or folder.name == name else None
            if writes:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
                if not self.args.save_only_model:
                    checkpoint.save_state(self.state_dict(), staging / name)
        if self._push_later:
            self._push_later = False
            if writes and self.args.hub_strategy != "end":
                self._write_card(Path(self.args.output_dir))  # which transformers fills with the model and pushes
            super()._push_from_checkpoint(str(run_dir / name))
        if writes:
            rotate_checkpoints(
                output_dir=str(run_dir), save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True,
            )  # fmt: skip

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._push_later = True  # it is not in its place yet

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # once: transformers loads it after get_batch_samples, where a scorer may have drawn from it
        if self._random_state_of is not None:
            self._random_state_of = None
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # ours first: it refuses what does not fit before anything has changed
        self.load_state_dict(checkpoint.load_state(Path(resume_from_checkpoint), self.args.device))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def state_dict(self) -> dict[str, Any]:
        """What dmfast adds to a checkpoint: proposal, Z, lambda, estimators, running values."""
        running = self._running
        return {
            "target": self.target.state_dict(),
            "proposal": None if self.proposal is None else self.proposal.state_dict(),
            "estimates": self._estimates.state_dict() if self.proposal is None else None,
            "partitions": running.partitions.state_dict(),
            "scale": running.scale.state_dict(),
            "returns": running.returns,
            "zero_steps": running.zero_steps,
            "steps": running.steps,
            "contexts": self._contexts.digest,
            "q_is_base": self._q_is_base,
            "beta": None if running.beta is None else running.beta.state_dict(),
            "pool": self._pool,
            "batch": None if self._batch is None or self.args.world_size > 1 else _batch_state(self._batch),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken.

        Raises:
            ValueError: it is that of an on-policy run, or of an offline one, and this is not; of another target.
            RuntimeError: of another model. Nothing has changed then.
        """
        if (state["proposal"] is None) != (self.proposal is None):
            raise ValueError("of the checkpoint and this run one is on-policy and one is not; set on_policy alike")
        copy.copy(self.target).load_state_dict(state["target"])  # raises where it does not fit
        if self.proposal is not None:
            self.proposal.load_state_dict(state["proposal"])
            self._estimates = self.proposal.running
        else:
            self._estimates.load_state_dict(state["estimates"])
        self._estimates.decay = self.args.proposal_decay
        self.target.load_state_dict(state["target"])
        partitions, scale = PartitionFunctions(), PartitionFunction()
        if state["contexts"] == self._contexts.digest:
            partitions.load_state_dict(state["partitions"])
        else:
            warnings.warn("the checkpoint is of a run on other prompts: Z of each context starts anew", stacklevel=2)
        scale.load_state_dict(state["scale"])
        total, count = state["returns"]
        beta = copy.copy(self._running.beta)
        if beta is not None and state["beta"] is not None:
            beta.load_state_dict(state["beta"])
        self._running = _Running(partitions, scale, (total, count), int(state["zero_steps"]), int(state["steps"]),
                                 self.target.lambda_.tolist(), beta)  # fmt: skip
        self._batch = None if state["batch"] is None else self._batch_of(state["batch"])
        self._pool = list(state["pool"])
        self._q_is_base = state["q_is_base"]

    def _batch_of(self, state: dict[str, Any]) -> _Step:
        """The inverse of ``_batch_state``."""
        samples = Samples(**state["samples"], tokenizer=self.policy.tokenizer)
        return _Step(
            samples, state["context"], state["features"], state["inputs"], torch.ones_like(samples.score_mask[:, 0]),
            dict.fromkeys(("sampling", "scoring", "policy"), 0.0), self._running,
            self.args.make_objective(beta=state["beta"]), state["advantage"], int(state["epoch"]),
        )  # fmt: skip

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        config = model.generation_config if isinstance(model, PreTrainedModel) else None
        if config is not None:
            # transformers refuses to save some that it loads, such as a temperature without do_sample
            model.generation_config = GenerationConfig()
        try:
            with _without_proposal(model):
                super()._save(output_dir, state_dict)
        finally:
            if config is not None:
                model.generation_config = config
        if self.args.should_save:
            if config is not None:
                ends, config = self.policy.eos_token_ids, copy.deepcopy(config)
                config.eos_token_id = ends[0] if len(ends) == 1 else ends  # generate() is to end where training did
                config.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
            self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        (folder / "README.md").write_text(model_card(self), encoding="utf-8")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the card of ``save_model`` into ``args.output_dir``."""
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir))


@contextmanager
def _without_proposal(model: Any) -> Iterator[None]:
    """A PEFT model's save_pretrained saves all adapters but that of q."""
    names = list(getattr(model, "peft_config", None) or ())
    if adapters.PROPOSAL not in names:
        yield
        return
    names.remove(adapters.PROPOSAL)
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=names)
    try:
        yield
    finally:
        del model.save_pretrained


def _batch_state(step: _Step) -> dict[str, Any]:
    """Of a batch that serves more steps."""
    samples = {f.name: getattr(step.samples, f.name) for f in fields(step.samples) if f.name != "tokenizer"}
    return {"samples": samples, "context": step.context, "features": step.features, "inputs": step.inputs,
            "advantage": step.advantage, "epoch": step.epoch, "beta": step.objective.beta}  # fmt: skip


def _refuse_arguments(args: DMConfig) -> None:
    """What transformers offers and distribution matching can't honour."""
    refuse_parallelism(args)
    if args.n_gpu > 1:
        raise ValueError(
            f"DMTrainer does not run under DataParallel ({args.n_gpu} GPUs in one process); start one process per "
            "GPU with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    refused = {
        "auto_find_batch_size": args.auto_find_batch_size,
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "neftune_noise_alpha": args.neftune_noise_alpha is not None,
    }
    why = {
        "auto_find_batch_size": "set per_device_train_batch_size by hand",
        "label_smoothing_factor": "there are no labels to smooth",
        "neftune_noise_alpha": "noise in the policy would make log pi(x) another than that of the model",
    }
    for name, found in refused.items():
        if found:
            raise ValueError(f"DMTrainer refuses {name}={getattr(args, name)!r}: {why[name]}")
    picks = args.load_best_model_at_end or args.save_strategy == "best"
    if picks and args.metric_for_best_model in (None, "loss", "eval_loss"):
        raise ValueError(
            "load_best_model_at_end and save_strategy='best' need metric_for_best_model, one of what evaluate() gives: "
            f"kl_policy, kl_policy_base, phi/<feature>; got {args.metric_for_best_model!r}. An evaluation has no loss"
        )


def _warn_of_generation_config(model: nn.Module) -> None:
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    found = {k: v for k, v in config.to_diff_dict().items() if k in _SAMPLER_OPTIONS and v is not None}
    if found:
        warnings.warn(
            f"the model's generation_config sets {found}, which is ignored: sequences are drawn from the model's own "
            "distribution at DMConfig.temperature, the only one whose log-probabilities are known",
            stacklevel=3,
        )
