"""Evaluate the policy in a run, and log what the steps and the evaluations found."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl

from ..estimators import Estimate
from ..metrics import merged
from ..models import LanguageModel
from ..samples import Samples
from ..seeds import seed_for
from ..targets import EBM
from . import samples as samples_table
from .checkpointing import CheckpointingTrainer
from .data import Contexts, eval_contexts, listed
from .evaluation import evaluate, examine
from .judge import Judge, is_over_prompts
from .ranks import AccelerateRanks
from .verdict import constrained, ideal, verdict


class EvaluatingTrainer(CheckpointingTrainer):
    """The part of ``DMTrainer`` that measures the policy and logs.

    Attributes:
        target, judge, eval_samples: as in ``DMTrainer``.
    """

    target: EBM
    judge: Judge | None
    eval_samples: Samples | None = None
    control: TrainerControl
    _eval_rows: Contexts | dict[str, Contexts] | None
    _has_prompts: bool
    _ranks: AccelerateRanks
    _metrics: list[dict[str, float]]  # of the steps since the last log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, with the metrics of the steps since the last log."""
        if "loss" in logs and self._metrics:
            logs |= merged(self._metrics)
            self._metrics = []
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return E_pi[phi], KL(pi||a) and KL(p||pi) with standard errors, from ``args.eval_samples`` sequences of pi.

        Every evaluation uses the same random numbers, so that two evaluations differ only by what the policy has
        learned.

        Args:
            eval_dataset: prompts in place of the trainer's, several sets of them by name, or the name of one of the
                trainer's sets.
            ignore_keys: is not used.
            metric_key_prefix: the prefix of the names of the metrics.

        Returns:
            ``eval_phi/<feature>``, ``eval_kl_policy_base`` (KL(pi||a), nats) and ``eval_kl_policy`` (KL(p||pi), nats,
            by importance weights), each with ``_stderr``; ``eval_length`` (tokens), ``eval_finished`` (share that ended
            in EOS), ``eval_runtime`` (seconds). With ``args.eval_diversity``: ``eval_distinct_1`` to
            ``eval_distinct_3``, with ``_stderr``, and ``eval_self_bleu_5``. If a verifier tells right from wrong:
            ``eval_pass@k``, ``eval_coverage``, ``eval_distinct@k``, ``eval_truncated`` and, with its ``answer``,
            ``eval_maj@k``. If there are several prompts, their ``_stderr`` is over prompts, and so is that of
            ``eval_length``. With several sets each has these as ``eval_<name>_...``.
        """
        has_prompts = eval_dataset is not None or self._eval_rows is not self._rows or self._has_prompts
        rows = self._rows_of(eval_dataset)
        if not isinstance(rows, dict):
            return self._evaluate_on(rows, metric_key_prefix, has_prompts)
        found: dict[str, float] = {}
        for name, each in rows.items():
            found |= self._evaluate_on(each, f"{metric_key_prefix}_{name}", has_prompts)
        return found

    def verdict(self, eval_dataset: Any = None) -> str:
        """Say whether the policy matches its target and by which criterion, as ``dmfast train`` does at its end.

        It draws ``args.eval_samples`` new sequences from the base and as many from the policy. Each feature of a
        constraint must have come nine tenths of the way from the base to p, and KL(pi||a) must be within a quarter of
        KL(p||a), each give or take two standard errors. On prompts other than those of the training, p has its own
        values. With several processes, call it on all of them; each draws all sequences.

        Args:
            eval_dataset: as in ``evaluate``. With several sets there is a line for each.

        Raises:
            ValueError: as ``evaluate``.
        """
        rows = self._rows_of(eval_dataset)
        if not isinstance(rows, dict):
            return self._verdict_on(rows)
        return "\n".join(f"{name}: {self._verdict_on(each)}" for name, each in rows.items())

    def _rows_of(self, eval_dataset: Any) -> Contexts | dict[str, Contexts]:
        """Return what to evaluate on: the trainer's own prompts, one of its sets, or what was given."""
        if isinstance(eval_dataset, str) and isinstance(self._eval_rows, dict):
            if eval_dataset not in self._eval_rows:
                raise ValueError(f"eval_dataset has the sets {', '.join(self._eval_rows)}, and no {eval_dataset!r}")
            return self._eval_rows[eval_dataset]
        if eval_dataset is None:
            if self._eval_rows is None:
                raise ValueError(
                    "train_dataset is a stream, which an evaluation does not read: give DMTrainer an eval_dataset, or "
                    "evaluate one (for instance list(stream.take(128)))"
                )
            return self._eval_rows
        rows = eval_contexts(eval_dataset)
        for each in listed(rows):
            each.check(self.policy, self.args.max_new_tokens, self.args.max_prompt_length)
        return rows

    @torch.no_grad()
    def _verdict_on(self, rows: Contexts) -> str:
        args, target = self.args, self.target
        some = list(itertools.islice(rows, args.eval_samples))

        def measured(model: LanguageModel, whose: str) -> tuple[Samples, dict[str, Estimate]]:
            with self.accelerator.autocast():
                return evaluate(
                    model, target, [prompt for _, prompt in some], math.ceil(args.eval_samples / len(some)),
                    max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed,
                    batch_size=args.sampling_batch_size, rows=rows.whole(some),
                    whose=whose if self.is_world_process_zero() else None,
                )  # fmt: skip

        x, before = measured(target.base, "the base")
        _, after = measured(self.policy, "the policy")
        return verdict(before, after, ideal(target, x, fitted=rows is self._rows), constrained(target))

    @torch.no_grad()
    def _evaluate_on(self, rows: Contexts, prefix: str, has_prompts: bool) -> dict[str, float]:
        start, args = time.perf_counter(), self.args
        if self.judge is not None:
            self.judge.check(args.eval_samples, len(rows), rows.argument)
        some = range(min(len(rows), args.eval_samples))
        mine = math.ceil(math.ceil(args.eval_samples / len(some)) / self._ranks.size)  # of each context, on this rank
        indices, prompts = zip(*(rows[i] for i in some), strict=True)
        with self.accelerator.autocast():
            found = examine(
                self.policy, self.target, prompts, mine, max_new_tokens=args.max_new_tokens,
                temperature=args.temperature, seed=seed_for(args.seed, "evaluation"),
                batch_size=args.sampling_batch_size or args.per_device_train_batch_size,
                texts=args.eval_diversity, first_row=self._ranks.rank * mine * len(some), rows=rows.rows_of(indices),
                judge=self.judge, gather=self._ranks.gather, gather_texts=self._ranks.gather_texts,
            )  # fmt: skip
        self.eval_samples, metrics = found.samples, {}
        for name, estimate in found.estimates.items():
            metrics[f"{prefix}_{name}"] = estimate.value
            over_prompts = self.judge is not None and is_over_prompts(name)
            if math.isfinite(estimate.stderr) if over_prompts else name not in ("length", "finished", "self_bleu_5"):
                metrics[f"{prefix}_{name}_stderr"] = estimate.stderr
        metrics |= {f"{prefix}_unseen/{name}": value for name, value in found.missing.items()}
        metrics[f"{prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        if args.log_samples and self.is_world_process_zero():
            samples_table.publish(
                found, prompts if has_prompts else None, args.log_samples, Path(args.output_dir),
                self.callback_handler.callbacks, step=self.state.global_step, name=prefix,
            )  # fmt: skip
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error, because a distribution has no labels to predict. Use ``evaluate`` or ``policy.sample``."""
        raise NotImplementedError("DMTrainer has nothing to predict; use evaluate(), or trainer.policy.sample(...)")
