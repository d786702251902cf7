"""Define ``DMConfig``, which is transformers' ``TrainingArguments`` with what distribution matching adds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments

from .. import presets
from ..diagnostics import nltk
from ..proposal import CRITERIA, NEED_ALL
from ..sampling import check_options
from ..settings import AnyObjective, Settings
from . import deepspeed, launcher
from .ranges import check_numbers


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def refuse_parallelism(args: TrainingArguments) -> None:
    """Refuse every parallelism but DDP, FSDP and DeepSpeed, from the arguments and from ``accelerate launch``.

    Raises:
        ValueError: another parallelism is asked for.
        ImportError: DeepSpeed is asked for and not installed.
    """
    asked = launcher.asked(args, "parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG")
    if asked is not None:
        raise ValueError(
            f"DMTrainer does not run under tensor, context or sequence parallelism yet, which {asked} asks for; use "
            "DDP, FSDP2 or DeepSpeed, or for tensor parallelism load the model with DistributedConfig(tp_size=...)"
        )
    deepspeed.refuse_absent(args)
    if "hybrid" in f"{args.fsdp} {args.fsdp_config}".lower():
        raise ValueError(
            f"hybrid sharding (HSDP), which fsdp={args.fsdp!r} with fsdp_config={args.fsdp_config!r} asks for, was not "
            "tried with DMTrainer: leave it out, so that all processes share one set of shards, or load the model with "
            "a DistributedConfig(dp_replicate_size=..., fsdp_size=...)"
        )


def refuse_absent_device(name: str, device: str | None) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: torch can't put a tensor there; the message names the argument.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"{name} must be a device that this machine has, such as 'cpu', got {device!r}: {error}"
        ) from error


@dataclass
class DMConfig(TrainingArguments):  # type: ignore[misc]
    """The arguments of ``DMTrainer``: transformers' own and those below.

    An optimiser step has B = ``per_device_train_batch_size`` * ``gradient_accumulation_steps`` * processes sequences,
    all drawn and scored before the first microbatch. Under tensor parallelism the processes that hold one model
    together count as one.

    Defaults that differ from transformers': a constant learning rate of 1.41e-5 with a warm-up of 10 steps (the paper's
    rate; small models want more), no gradient clipping (it would bias the estimate of the gradient by its size),
    ``logging_steps=1`` (a step takes seconds), ``remove_unused_columns=False``, ``report_to="none"``, and
    ``enable_jit_checkpoint=True`` (SIGTERM saves a checkpoint).

    Args:
        objective: a name of ``objectives.OBJECTIVES`` or of ``methods.METHODS``. ``DMTrainer(objective=...)`` takes
            functions, too.
        baseline: a number; ``mean``, the running mean of rho*r over earlier steps; ``leave_one_out`` or
            ``leave_one_out_context``. ``gdc++`` has its own.
        reward_weights: the weights of several rewards of ``DMTrainer(reward=[...])``, in their order. Default: 1 for
            each.
        beta: the KL coefficient of ``kl_control``. With ``beta_target_kl`` this is its value at the start.
        beta_target_kl: the wanted KL(pi||a), nats per sequence. ``dmfast.objectives.AdaptiveBeta`` then steers beta
            with ``beta_horizon`` (sequences) from the samples of each step. This works only on-policy, because the
            samples must be pi's own.
        ppo_epochs: optimiser steps taken on each batch of samples, for ``reinforce`` and ``kl_control`` on-policy.
            Above 1, returns, KL penalty and baseline stay as they were at the sampling policy, and the ratio is clipped
            at 1 -+ ``ppo_clip``. This is ``dmfast.objectives.PPOClip``: PPO on whole sequences, without a value head
            and without a ratio per token. ``max_steps`` counts every one of these steps. If a run is resumed in the
            middle of a batch, a run of one process goes on with the batch, and a run of several draws a new one.
        normalize: False multiplies A by Z, which is the paper's scale.
        alpha: the parameter of the objective ``alpha``. 0 descends KL(p||pi), which covers p, and 1 descends KL(pi||p).
        normalize_alpha: False leaves the factor 1/(1 - alpha) out of A, which keeps A of the same size as alpha comes
            near to 1.
        max_return: bounds (p/pi)^(1 - alpha) - 1 above, before that factor and the baseline.
        max_weight: bounds A to [-max_weight, max_weight].
        entropy_coefficient: c of the entropy bonus. It adds -c times the policy's entropy to the loss. The entropy is
            summed over the tokens of a sequence (nats), and its mean is over all sequences as they were drawn, without
            weights. That mean is logged as ``entropy``. It does not go with ``skip_zero_weight``.
        temperature: the temperature of policy, proposal and base, in sampling and in scoring.
        max_prompt_length: prompts of more tokens are left out and not cut, and a warning counts them. Default: all
            prompts are kept, and one that does not fit into the model's context is refused.
        max_new_tokens: the most tokens of a sequence, which ends there if there was no EOS.
        samples_per_context: n, sequences drawn from each prompt. Default: one, and with one prompt all sequences of a
            step. Without a data set all sequences of a step come from the one empty context, and a warning says that
            another value is ignored.
        sampling_batch_size: sequences at a time in sampling and in scoring by the base. Default: all of a step.
        check_scores: as in ``dmfast.LanguageModel``, for the policy.
        uniform_groups, max_redraws: what happens to prompts whose sequences all have the same reward, where an
            objective that compares the sequences of a prompt gives them the weight 0. ``keep``: they count in the mean.
            ``skip``: the mean is over the others. ``redraw``: they are drawn again, up to ``max_redraws`` times, and
            then skipped. ``replace``: the same with other prompts of the data set in their place, at random (DAPO's
            dynamic sampling), which a stream can't give. All but ``keep`` need ``on_policy``. ``n_uniform`` and
            ``n_redrawn`` are logged.
        skip_zero_weight: whether sequences whose weight is known to be 0 before the policy's forward (those with P = 0
            under ``dpg``, for instance) get no forward. Off-policy, ``js_policy`` is then logged as NaN.
        on_policy: whether to sample from the policy itself. No proposal is kept then.
        sampler: what draws from q: ``model``, the copy of the policy itself; ``vllm``, vLLM in this process
            (``dmfast.sampling.VLLMSampler``); or the address of a vLLM server, ``http://host:port``
            (``dmfast.sampling.HTTPSampler``). With an engine log q is the engine's own (docs/engines.md).
        sampler_options: the further arguments of that class, as a mapping or as JSON of one.
        sampler_ahead: the number of coming steps for which the engine draws while this step is trained
            (``dmfast.sampling.AsyncSampler``; docs/scale.md). 0 draws nothing ahead.
        sampler_max_lag: the most swaps of q between the draw of a batch and its use. Default: no bound.
        proposal_criterion, proposal_interval, proposal_stderrs, proposal_best_only, proposal_decay: as in
            ``dmfast.OfflineProposal``. The criterion ``alpha`` has the alpha of the objective ``alpha``.
        proposal_check_samples: fresh sequences that are drawn from q for each check of the proposal, and scored by q, a
            and pi as they are at that time, as in the paper's code. The verdict rests on them alone, and
            ``seconds_check`` is logged. They come from ``proposal_check_samples / samples_per_context`` contexts, which
            are others at each check. Z of these contexts takes them in for the check, and not beyond it. With 0 the
            check uses the training steps' own sequences since the last swap, at no cost.
        proposal_device: the device of q, such as "cpu". This leaves the policy's device more memory and makes sampling
            as slow as that device is. Default: the policy's device. If the target's base is a view of the policy
            (``LanguageModel.base``), q is a second adapter in the policy.
        partition: ``running`` estimates log Z of a context from all its visits, and ``step`` from the samples of the
            step alone. For a target that only filters the base (``EBM.is_filter``) Z is read as min(Z, 1).
        z_floor: the value that stands for Z of a prompt of which no sequence with P > 0 was seen yet, above 0 and at
            most 1. With None the weights of such a prompt are 0. Only a target that filters the base may have it.
        z_from_rows: whether Z of each prompt starts from the columns ``pass_rate`` and ``pass_rate_n`` of its row,
            which ``EBM.fit_z`` makes, as if these n completions of the base had been seen in the run. This needs a
            target that filters the base, and ``partition="running"``.
        refit_ess, refit_samples: while the effective sample size of the target's fit is below ``refit_ess``, lambda is
            fitted again from the last ``refit_samples`` sequences of the steps. Each is weighted by a/q with the q that
            it was drawn from. The new lambda is taken if its effective sample size is larger (``EBM.refit``), and Z
            then starts anew. With ``refit_ess=0`` lambda is never fitted again.
        eval_samples: sequences of the policy at an evaluation.
        eval_diversity: the number of these sequences, the same ones at every evaluation, on which Distinct-1/2/3 and
            Self-BLEU-5 of words are measured (``dmfast.diagnostics.diversity``; needs nltk). 0 measures neither.
        eval_pass_k: the values of k in ``eval_pass@k`` and related measures. They need a ``Verifier`` in the target, or
            a binary reward, that tells right from wrong (``dmfast.verified``). Default: 1, 4, 16, ... up to the samples
            of a prompt, which are ``eval_samples`` over the number of prompts.
        eval_threshold: an answer is right if the verifier gives it this value or more.
        log_samples: the number of sequences of an evaluation that are written to ``samples.jsonl`` in ``output_dir``,
            with log pi, log a and features (a push to the hub takes the file along). They are also sent as a table to
            the TensorBoard, W&B and trackio loggers of ``report_to``. 0 writes none.
        gather_for_sampling: under FSDP, whether the model is made whole on every process while it is sampled from.
            False gathers each of its layers in each forward, which needs less memory, more time and
            ``check_scores=False``.
        gradient_variance_steps: optimiser steps between measurements of the variance of the gradient over the sequences
            of a step. It is exact and takes one backward for each sequence
            (``dmfast.diagnostics.gradient_variance``). 0 never measures it.
        patience_zero: steps in a row with P(x) = 0 on every sequence, after which a warning says what to do.

    Raises:
        ValueError: an objective, criterion or baseline is unknown, a number is out of range, or a parallelism that is
            not supported is asked for.
        TypeError: ``objective`` is not a name.
        ImportError: ``eval_diversity`` is set and nltk is not installed.
    """

    learning_rate: float = _field(1.41e-5, "The initial learning rate (the paper's).")
    lr_scheduler_type: SchedulerType | str = _field("constant_with_warmup", "The scheduler.")  # noqa: RUF009
    warmup_steps: float = _field(10, "Steps of linear warm-up, or their share of all steps if below 1.")
    max_grad_norm: float = _field(0.0, "Maximum gradient norm; 0: no clipping.")
    logging_steps: float = _field(1, "Steps between log lines.")
    remove_unused_columns: bool = _field(False, "No effect: the model only sees the column 'prompt'.")
    report_to: None | str | list[str] = _field("none", "Loggers, such as tensorboard.")  # noqa: RUF009, RUF036
    enable_jit_checkpoint: bool = _field(True, "SIGTERM saves a checkpoint.")

    objective: str = _field("gdc++", "The objective, one of dmfast.objectives.OBJECTIVES or dmfast.methods.METHODS.")
    baseline: float | str | None = _field(None, "None, a number, mean, leave_one_out or leave_one_out_context.")
    reward_weights: list[float] | None = _field(None, "The weights of several rewards.")  # noqa: RUF009
    beta: float | None = _field(None, "The KL coefficient of kl_control.")
    beta_target_kl: float | None = _field(None, "The wanted KL(pi||a) in nats; None keeps beta fixed.")
    beta_horizon: float = _field(10_000, "Beta may change by about e^0.2 in this many sequences.")
    ppo_epochs: int = _field(1, "Optimiser steps on each batch of samples.")
    ppo_clip: float = _field(0.2, "The ratio is clipped to 1 -/+ this if a batch gets more than one step.")
    normalize: bool = _field(True, "False multiplies A by Z.")
    alpha: float | None = _field(None, "The alpha of the objective alpha.")
    normalize_alpha: bool = _field(True, "False leaves the factor 1/(1 - alpha) out of A.")
    max_return: float | None = _field(None, "Bounds (p/pi)^(1 - alpha) - 1 above.")
    max_weight: float | None = _field(None, "Bounds A to [-max_weight, max_weight].")
    entropy_coefficient: float = _field(0.0, "The factor of the policy's entropy in the loss; 0: no bonus.")
    temperature: float = _field(1.0, "The temperature of policy, proposal and base.")
    max_prompt_length: int | None = _field(None, "Prompts of more tokens are left out.")
    max_new_tokens: int = _field(64, "The most tokens of a sequence.")
    samples_per_context: int | None = _field(None, "Sequences drawn from each prompt.")
    sampling_batch_size: int | None = _field(None, "Sequences at a time in sampling and scoring.")
    check_scores: bool = _field(True, "Check once that what the policy draws is what it scores.")
    uniform_groups: str = _field("keep", "Prompts whose sequences have one reward: keep, skip, redraw or replace.")
    max_redraws: int = _field(4, "With redraw or replace, the most times that such a prompt is drawn again.")
    skip_zero_weight: bool = _field(False, "No policy forward for sequences known to have weight 0.")
    on_policy: bool = _field(False, "Sample from the policy itself.")
    sampler: str = _field("model", "What draws from q: model, vllm, or the http:// address of a vLLM server.")
    sampler_options: dict[str, Any] | str | None = _field(None, "Arguments of the sampler, a mapping or its JSON.")  # noqa: RUF009
    sampler_ahead: int = _field(0, "Steps whose sequences an engine draws ahead; 0: none.")
    sampler_max_lag: int | None = _field(None, "The most swaps of q between a draw ahead and its use.")
    proposal_criterion: str = _field("kl", "When q becomes pi: kl, tvd, js, alpha or interval.")
    proposal_interval: int = _field(10, "Optimiser steps between checks of the proposal.")
    proposal_stderrs: float = _field(0.0, "The number of standard errors by which pi must be nearer than q.")
    proposal_best_only: bool = _field(False, "Swap only if pi is nearer than at every earlier swap.")
    proposal_decay: float = _field(0.8, "Weight of a step's samples relative to the next step's.")
    proposal_check_samples: int = _field(0, "Fresh sequences of q for each check; 0: those of the training steps.")
    proposal_device: str | None = _field(None, "The device of q; None: the policy's device.")
    partition: str = _field("running", "Z is that of all steps (running) or of one step (step).")
    z_floor: float | None = _field(None, "The Z of a prompt none of whose sequences was right; None: weight 0.")
    z_from_rows: bool = _field(False, "Start Z of each prompt from the columns that EBM.fit_z makes.")
    refit_ess: float = _field(0.0, "Lambda is fitted again below this effective sample size; 0: never.")
    refit_samples: int = _field(2048, "Sequences of a proposal from which lambda is fitted again.")
    eval_samples: int = _field(512, "Sequences of the policy at an evaluation.")
    eval_diversity: int = _field(0, "Sequences of an evaluation whose diversity is measured; 0: none.")
    eval_pass_k: list[int] | None = _field(None, "The k of pass@k in evaluations; None: 1, 4, 16, ...")  # noqa: RUF009
    eval_threshold: float = _field(0.5, "The value of a verifier from which on an answer is right.")
    log_samples: int = _field(0, "Sequences of an evaluation that are logged as a table; 0: none.")
    gather_for_sampling: bool = _field(True, "Under FSDP, whether the model is whole while it is sampled from.")
    gradient_variance_steps: int = _field(0, "Steps between measurements of the gradient's variance; 0: never.")
    patience_zero: int = _field(5, "Steps with P = 0 on all sequences before a warning.")

    @classmethod
    def preset(cls, name: str, **arguments: Any) -> DMConfig:
        """Return the arguments of a published run by its name.

        Args:
            name: one of ``dmfast.presets.PRESETS``: ``alpha_dpg`` (arXiv:2512.05962), which also takes ``alpha``.
            arguments: arguments of ``DMConfig``. They take the place of those of the preset.

        Raises:
            ValueError: there is no such preset, or as ``DMConfig``.

        Examples:
            >>> args = DMConfig.preset("alpha_dpg", output_dir="out", alpha=0.5)
            >>> args.max_return, args.samples_per_context, args.on_policy
            (10.0, 4, True)
        """
        found = presets.named(name)
        return cls(**{"samples_per_context": found.samples_per_context, **found.options, **arguments})

    def __post_init__(self) -> None:
        refuse_parallelism(self)  # before transformers asks for deepspeed to be installed
        check_numbers(self)
        refuse_absent_device("proposal_device", self.proposal_device)
        if self.eval_diversity and not 2 <= self.eval_diversity <= self.eval_samples:
            raise ValueError(
                "eval_diversity compares sequences of an evaluation: it must be 0, or from 2 to eval_samples="
                f"{self.eval_samples}, got {self.eval_diversity!r}"
            )
        self._check_pass_k()
        if self.eval_diversity:
            nltk()  # a missing package is an error now, and not only at the first evaluation
        if self.proposal_criterion not in CRITERIA:
            raise ValueError(
                f"proposal_criterion must be one of {', '.join(CRITERIA)}, got {self.proposal_criterion!r}"
            )
        if self.on_policy and (self.proposal_check_samples or self.proposal_device is not None):
            raise ValueError(
                "proposal_check_samples and proposal_device need a proposal, and with on_policy=True there is "
                f"none; got {self.proposal_check_samples!r} and {self.proposal_device!r}"
            )
        if self.skip_zero_weight and self.proposal_criterion in NEED_ALL and not self.proposal_check_samples:
            raise ValueError(
                "skip_zero_weight=True leaves log pi unknown where P = 0, and "
                f"proposal_criterion={self.proposal_criterion!r} needs it there; use kl or tvd, or fresh samples "
                "(proposal_check_samples)"
            )
        if isinstance(self.baseline, str):
            with contextlib.suppress(ValueError):
                self.baseline = float(self.baseline)  # a command line gives numbers as strings
        if not isinstance(self.objective, str):
            raise TypeError(
                "objective of DMConfig must be a name, since a config is written as JSON and read from a command line, "
                f"got {self.objective!r}; pass an Objective or a function of dmfast.Terms to the trainer, "
                "DMTrainer(..., objective=...)"
            )
        self.settings()
        self._check_schedule()
        super().__post_init__()
        if self.deepspeed_plugin is not None:
            deepspeed.load_models_whole()
        self._check_sampler()

    def _check_schedule(self) -> None:
        """Refuse a scheduler that does not exist, and arguments of a scheduler that are not a mapping.

        Raises:
            ValueError: the message names the argument.
        """
        kinds = [each.value for each in SchedulerType]
        if getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type) not in kinds:
            raise ValueError(f"lr_scheduler_type must be one of {', '.join(kinds)}, got {self.lr_scheduler_type!r}")
        given = self.lr_scheduler_kwargs
        # a command line gives the JSON of a mapping, which transformers reads
        if given is not None and not isinstance(given, Mapping) and not str(given).startswith("{"):
            raise ValueError(f"lr_scheduler_kwargs must be a mapping, or JSON of one, got {given!r}")

    def _check_sampler(self) -> None:
        """Read ``sampler_options`` and refuse what does not go with an engine.

        Raises:
            ValueError: the options can't be read, or an argument does not go with the sampler.
        """
        if isinstance(self.sampler_options, str):
            try:
                self.sampler_options = json.loads(self.sampler_options)
            except ValueError as error:
                raise ValueError(f"sampler_options must be JSON of a mapping, got {self.sampler_options!r}") from error
        check_options(self.sampler, self.sampler_options)
        if self.sampler_max_lag is not None and not self.sampler_ahead:
            raise ValueError(
                f"sampler_max_lag={self.sampler_max_lag!r} bounds what is drawn ahead, and sampler_ahead is 0: set both"
            )
        refused = {
            "sampler='model', which draws in this process: take an engine": self.sampler == "model",
            "sampler='vllm', which draws in this process: take a server": self.sampler == "vllm",
            "several processes, which agree on each draw": self.world_size > 1,
            "ignore_data_skip=True, after which the prompts of a resumed run are not those of its steps":
                self.ignore_data_skip,
        }  # fmt: skip
        for what, asked in refused.items():
            if self.sampler_ahead and asked:
                raise ValueError(f"sampler_ahead={self.sampler_ahead!r} does not go with {what}")
        if self.sampler == "model":
            return
        if self.on_policy:
            raise ValueError(
                f"on_policy=True sets the ratio of pi and q to 1, but the sequences that sampler={self.sampler!r} "
                "draws have the engine's log-probabilities, which differ by its rounding; leave on_policy out: with "
                "proposal_criterion='interval' and proposal_interval=1 the engine gets pi after every step"
            )
        if self.sampler == "vllm" and self.world_size > 1:
            raise ValueError(
                "sampler='vllm' does not run in several processes, because their process group and vLLM's own would "
                "collide: start a server (dmfast serve-proposal), which all of them draw from"
            )

    def _check_pass_k(self) -> None:
        if not 0 < self.eval_threshold <= 1:
            raise ValueError(f"eval_threshold must be above 0 and at most 1, got {self.eval_threshold!r}")
        if self.eval_pass_k is None:
            return
        given = self.eval_pass_k
        several = isinstance(given, (list, tuple)) and len(given) > 0
        if not several or any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in given):
            raise ValueError(f"eval_pass_k must hold one or more positive integers, such as [1, 4, 16], got {given!r}")
        self.eval_pass_k = sorted(set(given))

    def settings(self, objective: AnyObjective | None = None) -> Settings:
        """Return the settings of a ``Matcher``.

        Args:
            objective: takes the place of the config's objective.

        Raises:
            ValueError: as ``Settings``.
        """
        named = {each.name: getattr(self, each.name) for each in fields(Settings) if hasattr(self, each.name)}
        named |= {"check_samples": self.proposal_check_samples}
        return Settings(**(named if objective is None else named | {"objective": objective}))
