"""Run the ``Matcher`` under transformers' ``Trainer``, which brings data loader, checkpoints and logging.

These methods make an optimiser step, in the order in which they are defined below:

    get_batch_samples   contexts -> Matcher.draw, then cut into microbatches
    compute_loss        Matcher.loss through the wrapped model
    _finish_step        Matcher.commit
    evaluate            draws and measures fresh samples of pi, and writes some of them as a table (evaluating.py)
    _save_checkpoint    writes everything, whole or not at all (checkpointing.py)
"""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProcessorMixin,
    ProgressCallback,
    TrainerCallback,
)

from .. import sharding
from ..batch import Batch, Prompts
from ..estimators import PartitionFunctions
from ..kernels import warn_caller
from ..matcher import Matcher
from ..metrics import feature_names
from ..models import LanguageModel
from ..proposal import OfflineProposal
from ..sampling import EngineError
from ..settings import AnyObjective, check_target, check_trainable
from ..targets import EBM
from ..targets.rewards import AnyReward, as_reward, parts_of
from . import checkpoint, deepspeed, distributed_config, engines, fsdp
from . import samples as samples_table
from .callbacks import EpochOrder, Interrupt, Intervals, JITCheckpoint, LogLine, Progress, StepEnd
from .checks import (
    check_alike,
    check_environment,
    check_fit,
    check_space,
    refuse_arguments,
    refuse_stream,
    warn_of_generation_config,
    with_pad_token,
)
from .config import DMConfig
from .data import ContextLoader, Contexts, StepSampler, contexts_of, eval_contexts, listed
from .evaluating import EvaluatingTrainer
from .judge import judge_of
from .ranks import AccelerateRanks
from .saving import loaded, with_adapter
from .stream import Stream, StreamLoader, is_stream
from .versions import draws_in_random_order


class DMTrainer(EvaluatingTrainer):
    """Train ``model`` to match the target distribution p = P/Z (Korbak et al. 2022, arXiv:2206.00761, algorithm 1).

    Args:
        model: the policy pi, a causal language model of transformers, or a PEFT model around one; or ``tiny-bios``, a
            folder or a name on the hub, which is loaded in float32. Its dropout is set to 0, because a sequence and its
            score must come from one distribution.
        target: an ``EBM`` that is fitted, around a base of its own. The base must not move, so it can't be ``model``
            itself. For a PEFT model it may be ``LanguageModel(model, tokenizer).base()``; a, pi and q then share its
            backbone, and q is a second adapter.
        args: the ``DMConfig`` of the run.
        train_dataset: prompts, as ``dmfast.training.data.Contexts`` takes them, or an ``IterableDataset`` of them, as
            ``dmfast.training.stream.Stream`` takes it. None is the empty context. Rows with more columns than the
            prompt reach scorers as ``samples.rows``, one for each sequence.
        eval_dataset: prompts to evaluate on, or several sets of them by name, whose metrics are ``eval_<name>_...``.
            Default: those of ``train_dataset``, unless that is a stream.
        processing_class: the tokenizer, or a multimodal processor, which is saved with the model. Default: the base's
            tokenizer. What ends a sequence and ``chat_template_kwargs`` are the base's.
        objective: a name, an ``Objective``, or a function of ``Terms``, in place of ``args.objective``.
        reward: R(x) for ``reinforce`` and ``kl_control``: a callable on ``Samples`` that returns (N,), such as
            ``dmfast.Scorer``. It may also be several, by name or in a list; R(x) is then their sum, weighted by
            ``args.reward_weights``.
        peft_config: the configuration of an adapter to put around ``model``; then only the adapter is trained.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in ``transformers.Trainer``.

    Attributes:
        matcher: the ``Matcher`` that takes the steps.
        policy: the model as a ``LanguageModel``.
        proposal: the ``OfflineProposal``, or None on-policy.
        eval_samples: the ``Samples`` of the last evaluation.
        by_command: whether messages advise options of ``dmfast train``, and not arguments of this class.
        judge: the ``training.judge.Judge`` that tells right from wrong in evaluations, or None if nothing does.

    Raises:
        ValueError: the training is not possible. The base is the model itself, the tokenizer does not fit, the
            objective lacks its reward, the processes do not train the same thing, DataParallel is asked for, FSDP or
            DeepSpeed is asked for in a way that was not tried or that the launcher did not give, or the model was
            spread over processes in a way that was not tried.
        ImportError: a package of ``args.report_to`` or ``args.optim`` is missing.
        OSError: ``args.output_dir`` can't be written into, or its disk has no room for the model.
    """

    # the loss of compute_loss is already divided by the step's sequences, which this tells transformers; until 5.18
    # compute_loss_func does
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | str | Path,
        target: EBM,
        args: DMConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        objective: AnyObjective | None = None,
        reward: AnyReward | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
    ) -> None:
        args = DMConfig("dmfast_output") if args is None else args
        if not isinstance(args, DMConfig):
            raise TypeError(f"args must be a dmfast.DMConfig, got {type(args).__name__}")
        refuse_arguments(args)
        own = optimizers[0] is not None or optimizer_cls_and_kwargs is not None
        check_environment(args, own_optimizer=own, own_scheduler=optimizers[1] is not None)
        distributed_config.refuse_model(model, getattr(getattr(target, "base", None), "model", None), args, peft_config)
        self._rows: Contexts | Stream = (
            train_dataset if isinstance(train_dataset, Contexts)
            else Stream(train_dataset) if is_stream(train_dataset) else Contexts(train_dataset)
        )  # fmt: skip
        self._has_prompts = train_dataset is not None
        if isinstance(self._rows, Stream):
            refuse_stream(args, has_eval=eval_dataset is not None)
        self._eval_rows = eval_contexts(eval_dataset) if eval_dataset is not None else None
        if eval_dataset is None and isinstance(self._rows, Contexts):
            self._eval_rows = self._rows
        settings = args.settings(objective)
        if args.uniform_groups == "replace" and (isinstance(self._rows, Stream) or len(self._rows) < 2):
            raise ValueError(
                "uniform_groups='replace' takes other prompts of the data set, at random, and train_dataset "
                + ("is a stream, which is read in order" if isinstance(self._rows, Stream) else "has one prompt")
                + ": take uniform_groups='redraw', or a data set of several prompts that has a length"
            )
        if args.proposal_criterion == "alpha" and settings.own_alpha is None and not args.on_policy:
            raise ValueError(
                "proposal_criterion='alpha' compares the divergence that objective 'alpha' descends, got objective "
                f"{settings.name!r}; take kl, tvd or js"
            )
        model = loaded(model)
        check_target(target, model, settings, reward)
        if reward is None and args.reward_weights is not None:
            raise ValueError(f"reward_weights={args.reward_weights!r} is for several rewards, and there is no reward")
        of_run = None if reward is None else as_reward(reward, args.reward_weights)
        model = with_adapter(model, peft_config, args.seed)
        processing_class = with_pad_token(target.base.tokenizer if processing_class is None else processing_class)
        kind_of_policy, kind_of_proposal = deepspeed.kinds(args)
        self.policy = kind_of_policy(
            model, processing_class, eos_token_id=target.base.eos_token_ids,
            chat_template_kwargs=target.base.chat_template_kwargs, check_scores=args.check_scores,
            logits_dtype=target.base.logits_dtype,
        )  # fmt: skip
        check_trainable(self.policy)
        if args.should_save:
            check_space(Path(args.output_dir), model, checkpoints=args.save_strategy != "no")
        contexts = 2 if isinstance(self._rows, Stream) else len(self._rows)  # more than one
        check_fit(self.policy, target, args, contexts, settings, has_prompts=self._has_prompts)
        sets = listed(self._eval_rows)
        for rows in {id(each): each for each in (self._rows, *sets)}.values():
            rows.check(self.policy, args.max_new_tokens, args.max_prompt_length)
        if args.z_from_rows and isinstance(self._rows, Contexts):
            self._rows.check_pass_rates()
        self.judge = judge_of(
            target, list(parts_of(of_run).values()), threshold=args.eval_threshold, k=args.eval_pass_k,
        )  # fmt: skip
        if self.judge is not None:
            for each in sets:
                self.judge.check(args.eval_samples, len(each), each.argument)
        warn_of_generation_config(model)
        engine = engines.engine_of(args, self.policy, self._rows)
        self.target = target
        self.by_command = False
        self._interrupt = Interrupt()
        jit, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False  # handled only while train() runs
        only_model, self._is_spread = args.save_only_model, distributed_config.is_spread(model)
        self._changes, self.brings_optimizer = {}, own
        if self._is_spread:
            args.save_only_model = True  # transformers refuses to write such an optimiser, so dmfast writes it
        try:
            super().__init__(
                model=model,
                args=args,
                train_dataset=self._rows,
                eval_dataset=self._eval_rows,
                processing_class=processing_class,
                callbacks=[
                    EpochOrder(),
                    Intervals(),
                    StepEnd(self._before_optimizer, self._finish_step),
                    self._interrupt,
                    *(callbacks or []),
                ],
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
        finally:
            args.enable_jit_checkpoint, args.save_only_model = jit, only_model
        fsdp.refuse_plugin(self.accelerator, args)
        deepspeed.refuse_plugin(self.accelerator, args)
        self._ranks = AccelerateRanks(self.accelerator, distributed_config.processes_of(model))
        if engine is not None:
            engine.ranks = self._ranks
        check_alike(
            self._ranks.processes,
            self.policy,
            target,
            args,
            self._rows.digest,
            reward=of_run,
            weights=not fsdp.loads_on_rank_0(self.accelerator),
        )
        self.policy.gather_for_sampling = args.gather_for_sampling
        self.compute_loss_func = self.compute_loss
        for stock, ours in ((ProgressCallback, Progress), (PrinterCallback, LogLine)):
            for callback in [c for c in self.callback_handler.callbacks if type(c) is stock]:
                self.callback_handler.callbacks.remove(callback)
                self.add_callback(ours(target.binary_names))
        shared = target.base.model is model  # such a base is moved with the policy, and its parameters are the policy's
        deepspeed.refuse_model(self.accelerator, model, shared=shared)
        if self.is_deepspeed_enabled:
            deepspeed.load_models_whole()  # again, because the accelerator has made another config
            model.to(self.args.device)  # transformers leaves this to DeepSpeed, but q is copied before that
        if not shared:
            target.base.model.requires_grad_(False)
            if not (self.is_fsdp_enabled or distributed_config.is_spread(target.base.model)):
                target.base.model.to(self.args.device)
        self.proposal: OfflineProposal[LanguageModel] | None = None
        if not args.on_policy:
            self.proposal = kind_of_proposal(
                self.policy, args.proposal_criterion, args.proposal_interval, best_only=args.proposal_best_only,
                stderrs=args.proposal_stderrs, decay=args.proposal_decay, device=args.proposal_device,
                adapter=shared and args.proposal_device is None, sampler=engines.sampler_of(engine, args),
                alpha=settings.own_alpha if args.proposal_criterion == "alpha" else None,
            )  # fmt: skip
        if self._is_spread and self.proposal is not None and args.gather_for_sampling:
            sharding.keep_whole(self.proposal.snapshot.model)
        if self.is_fsdp_enabled:
            of_q = [] if shared or self.proposal is None else [self.proposal.snapshot.model]
            fsdp.shard(
                self.accelerator, [*([] if shared else [target.base.model]), *of_q, model],
                kept_whole=of_q if args.gather_for_sampling else [],
            )  # fmt: skip
        rows = self._rows
        self.matcher = Matcher(
            self.policy, target, self.proposal, reward=of_run, decay=args.proposal_decay, ranks=self._ranks,
            other_contexts=rows.some if isinstance(rows, Contexts) and args.uniform_groups == "replace" else None,
            check_contexts=self._check_contexts if isinstance(rows, Contexts) else None, **settings.options(),
        )  # fmt: skip
        self.matcher.check_length(args.max_new_tokens, "DMConfig.max_new_tokens", stacklevel=3)
        self.reward = self.matcher.reward
        self._metrics = []
        self._engine_error: EngineError | None = None  # the failure of a swap in this run
        self._jit: JITCheckpoint | None = None  # while train() runs
        self.get_train_dataloader()  # so that what it refuses is refused before train()

    # ---- the data

    @property
    def partitions(self) -> PartitionFunctions:
        """The Z of each context over all of its visits, by the context's row in ``train_dataset``.

        With ``partition="step"`` it has the contexts of the last step alone.
        """
        return self.matcher.running.partitions

    @property
    def feature_names(self) -> list[str]:
        """The names of the target's moments, then of its monitored features."""
        return feature_names(self.target)

    @property
    def samples_per_context(self) -> int:
        """The number n of sequences of each context in a step."""
        if self.args.samples_per_context is not None and self._has_prompts:
            return int(self.args.samples_per_context)
        if isinstance(self._rows, Stream) or len(self._rows) > 1:
            return 1
        return int(self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps)

    def get_train_dataloader(self) -> ContextLoader | StreamLoader:
        """Return microbatches of contexts."""
        args = self.args
        if self.matcher.settings.whole_contexts and args.per_device_train_batch_size % self.samples_per_context:
            raise ValueError(
                f"the objective needs all {self.samples_per_context} sequences of a context in one microbatch: "
                "per_device_train_batch_size must be a multiple of that (samples_per_context), got "
                f"{args.per_device_train_batch_size}"
            )
        if isinstance(self._rows, Stream):
            return StreamLoader(
                self._rows, self.samples_per_context, per_device=args.per_device_train_batch_size,
                accumulation=args.gradient_accumulation_steps, rank=self._ranks.rank, world=self._ranks.size,
                repeats=args.ppo_epochs,
            )  # fmt: skip
        sampler = StepSampler(
            len(self._rows), self.samples_per_context, per_device=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps, rank=self._ranks.rank, world=self._ranks.size,
            steps=None if self._has_prompts else math.ceil(args.max_steps / args.ppo_epochs), repeats=args.ppo_epochs,
            shuffle=draws_in_random_order(args),
            seed=args.seed if args.data_seed is None else args.data_seed,
        )  # fmt: skip
        self._step_sampler = sampler
        return ContextLoader(self._rows, sampler)

    # ---- the step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Draw and score all sequences of an optimiser step, then cut them into microbatches."""
        if 0 < self.state.max_steps <= self.state.global_step:  # transformers looks only after a step whether to end
            self.control.should_training_stop = True
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return [], None
        if self._random_state_of is not None:
            self._load_rng_state(self._random_state_of)
        kept = self.matcher.to_repeat
        try:
            with self.accelerator.autocast():
                batch = self._draw(batches) if kept is None else kept.again()
        except EngineError as error:  # on all ranks
            step = self.state.global_step
            if step and checkpoint.fault(Path(self._get_output_dir(None)) / f"checkpoint-{step}") is not None:
                self._save_checkpoint(self.model, trial=None)
            raise engines.ended(error, self.args, Path(self._get_output_dir(None)), step) from error
        parts = batch.split(self.args.per_device_train_batch_size)
        return [{"input_ids": part.samples.tokens, "part": part} for part in parts], None

    def _draw(self, batches: Sequence[Any]) -> Batch:
        args, n = self.args, self.samples_per_context
        contexts = contexts_of(batches, n)
        return self.matcher.draw(
            [each[1] for each in contexts], n, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
            batch_size=args.sampling_batch_size, context_id=[each[0] for each in contexts],
            rows=self._rows.whole(contexts), next_prompts=self._coming_prompts(),
        )  # fmt: skip

    def _coming_prompts(self) -> list[list[Any]]:
        """Return the prompts of the steps that an engine draws ahead."""
        rows, step = self._rows, self.state.global_step
        if isinstance(rows, Stream):
            return []
        coming = range(step + 1, min(step + 1 + self.args.sampler_ahead, self.state.max_steps))
        return [[rows[place][1] for place in self._step_sampler.contexts_of_step(each)] for each in coming]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the fused loss of one microbatch, divided by the sequences of the whole step."""
        out = self.matcher.loss(inputs["part"], model)
        return (out.loss, out) if return_outputs else out.loss

    def _before_optimizer(self) -> None:
        every = self.args.gradient_variance_steps
        if every and (self.state.global_step + 1) % every == 0:
            with self.accelerator.autocast():
                self.matcher.measure_gradient(self._ranks.sum)

    def _finish_step(self) -> None:
        asked = [self._interrupt.asked, self._jit is not None and self._jit.asked]
        agreed = self._ranks.processes.gather(torch.tensor([asked], device=self.args.device)).any(0)
        self._interrupt.agreed, terminate = agreed.tolist()
        with self.accelerator.autocast():
            try:
                metrics = self.matcher.commit()
            except EngineError as error:
                # the policy has moved: the step counts, q stays, and the run ends after it with a checkpoint
                self._engine_error, self._interrupt.agreed = error, True
                with cast("OfflineProposal[Any]", self.proposal).staying():
                    metrics = self.matcher.commit()
        if self._jit is not None:
            self._jit.agreed = terminate
        if isinstance(self._rows, Stream) and self.args.max_prompt_length is not None:
            metrics["n_too_long"] = float(self._rows.too_long)
        self._metrics = [metrics] if self.args.logging_strategy == "no" else [*self._metrics, metrics]

    def _check_contexts(self, seed: int) -> Prompts:
        """Draw some of the data set's contexts for a check of the proposal; each check gets others."""
        assert isinstance(self._rows, Contexts)
        return self._rows.some(seed, max(self.args.proposal_check_samples // self.samples_per_context, 1))

    # ---- the run, checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does. Ctrl-C ends training after the current step, with a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest one of the run.

        Raises:
            ValueError: the checkpoint is truncated; the message names the newest whole one.
            OSError: a checkpoint could not be written; the previous ones are as they were.
            EngineError: the engine that draws has failed, also when it was tried again. The run has ended with a
                checkpoint.
        """
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            raise ValueError(
                "a trainer under DeepSpeed trains once: transformers would go on with the engine, the optimiser and "
                "the learning rates of the first train(). Make another DMTrainer, and resume its run or start anew"
            )
        if resume_from_checkpoint:
            folder = checkpoint.to_resume(resume_from_checkpoint, Path(self.args.output_dir), command=self.by_command)
            nothing = self.nothing_left(folder)
            if nothing and not self.by_command and self.is_world_process_zero():  # the command has said so
                warn_caller(nothing)
            resume_from_checkpoint = str(folder)
        elif self.is_world_process_zero():
            checkpoint.warn_of_earlier_run(Path(self.args.output_dir), command=self.by_command)
        self._changes = {}
        self._metrics, self._model_step, self._engine_error = [], None, None
        self.matcher.forget()
        self._random_state_of = resume_from_checkpoint or None
        if not resume_from_checkpoint and self.args.log_samples and self.is_world_process_zero():
            samples_table.forget(Path(self.args.output_dir))
        self._jit = jit = self._install_jit()
        self._interrupt.install()
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            if self._engine_error is not None:
                folder = Path(self._get_output_dir(None))
                raise engines.ended(self._engine_error, self.args, folder, self.state.global_step)
            return result
        finally:
            self._interrupt.remove()
            self._jit = None
            if jit is not None:
                self.callback_handler.callbacks.remove(jit)
                signal.signal(signal.SIGTERM, jit.jit_manager._original_sigterm_handler)

    def nothing_left(self, folder: Path) -> str | None:
        """Return the message that a run from a checkpoint has no step left to train, or None if it has one."""
        args, step = self.args, checkpoint.step_of(folder)
        by_steps = args.max_steps > 0
        if by_steps:
            last = args.max_steps
        else:
            a_pass = math.ceil(len(self.get_train_dataloader()) / args.gradient_accumulation_steps)
            last = math.ceil(args.num_train_epochs * max(a_pass, 1))
        if step is None or step < last:
            return None
        name = "max_steps" if by_steps else "num_train_epochs"
        given = f"{getattr(args, name):g}"
        length = f"{name}={given}" if by_steps else f"{name}={given}, which is step {last}"
        what, how = "", ""
        if self.by_command:
            what, how = ", and only measures and saves the model", f" with --set train.{name}=N"
        return (
            f"{folder} is at step {step}, and this run ends at {length}: it trains nothing{what}. To go on, raise "
            f"{name} above {step if by_steps else given}{how}"
        )

    def _install_jit(self) -> JITCheckpoint | None:
        """Install transformers' checkpoint at SIGTERM for this run, if this is the main thread.

        The constructor of transformers' Trainer would install it for good, and in any thread.
        """
        if not self.args.enable_jit_checkpoint:
            return None
        if threading.current_thread() is not threading.main_thread():
            warnings.warn("enable_jit_checkpoint has no effect outside the main thread", stacklevel=3)
            return None
        jit = JITCheckpoint()
        jit.set_trainer(self)
        self.add_callback(jit)
        return jit
