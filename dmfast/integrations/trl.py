"""Put dmfast's loss into trl's ``GRPOTrainer``: trl draws the completions and runs the loop, dmfast weighs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from ..batch import Prompts
from ..estimators import PartitionFunctions
from ..kernels.checks import make_objective
from ..models import LanguageModel
from ..objectives import Group, Objective, OfStep, Terms, leave_one_out_baseline
from ..samples import Samples
from ..settings import check_apart
from ..targets import EBM
from ..training.checkpointing import TiedParameters
from . import trl_settings


class DMGRPOTrainer(TiedParameters, GRPOTrainer):  # type: ignore[misc]
    """Train with trl's ``GRPOTrainer`` on ``loss = -(1/B) sum_i A_i log pi(x_i)``, made from hidden states.

    Settings that shape trl's own loss (``loss_type``, ``epsilon``, ``importance_sampling_level``, ``scale_rewards``)
    are not read. log q is vLLM's own if vLLM drew, and otherwise the policy's at the time of drawing. The trainer takes
    only text, and runs in one process or under DDP.

    Args:
        model, reward_funcs, args, kwargs: as for ``GRPOTrainer``. R is the weighted sum of any reward functions.
        objective, max_weight: as in ``dm_loss``. ``kl_control`` takes the reference model that trl keeps for ``beta``.
        target: the target of ``gdc++`` and its relatives, with its lambda. A checkpoint holds the running Z of prompts.

    Raises:
        ValueError: this loss can't use a setting; the objective lacks its inputs; the target has no lambda, or its base
            moves with the model; the run has FSDP, DeepSpeed or an auxiliary loss of experts. While the trainer runs:
            the data has images; a completion has no reward; a checkpoint is of another target, temperature or length.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, *,
        objective: str | Objective | Callable[[Terms], Tensor] = "gdc++", target: EBM | None = None,
        max_weight: float | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.objective, self.target, self.max_weight = make_objective(objective), target, max_weight
        self.partitions, self._wholes, self._has_reward = PartitionFunctions(), dict[str, Terms](), bool(reward_funcs)
        args = GRPOConfig("dmfast_output") if args is None else args
        trl_settings.check(args, self.objective, target is not None, self._has_reward)
        if target is not None and not target.fitted:
            raise ValueError("the target's lambda is not known yet: call target.fit() first")
        super().__init__(model, reward_funcs or (trl_settings.no_reward if target else None), args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.aux_loss_enabled:
            raise ValueError("DMGRPOTrainer runs in one process or under DDP, without an auxiliary loss of experts")
        self.policy = LanguageModel(self.model, self.processing_class)
        if target is not None:
            check_apart(target, self.model)
            target.base.model.to(self.accelerator.device)

    @property
    def _on_policy(self) -> bool:
        return trl_settings.draws_from_policy(self.args) or not (self.model.training or self.use_vllm)

    def _samples(self, d: dict[str, Any], log_q: Tensor | None) -> Samples:
        tokens = torch.cat([d["prompt_ids"], d["completion_ids"]], 1)
        attended = torch.cat([d["prompt_mask"], d["completion_mask"]], 1)
        scored = torch.cat([torch.zeros_like(d["prompt_mask"]).bool(), d["dm_mask"]], 1)
        place = torch.arange(len(tokens), device=tokens.device)
        return Samples(tokens, attended, scored, d["prompt_ids"].shape[1], place.double() if log_q is None else log_q,
                       place, self.temperature, self.policy.tokenizer, self.policy.pad_token_id,
                       eos_token_ids=tuple(self.policy.eos_token_ids))  # fmt: skip

    def _calculate_rewards(self, *args: Any) -> Tensor:
        of_functions: Tensor = super()._calculate_rewards(*args)  # of all processes
        if bool((unscored := of_functions.isnan().all(1)).any()):
            raise ValueError(f"no reward function scores completion {int(unscored.nonzero()[0])}: its R is unknown")
        self._rewards = (of_functions * self.reward_weights.to(of_functions)).nansum(1).double()
        return of_functions

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Add what the loss needs of each sequence, which trl shuffles and cuts along with the rest."""
        d: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if "pixel_values" in d:
            raise ValueError("DMGRPOTrainer takes text only, and the prompts have images")
        mode, n, gather = "train" if self.model.training else "eval", len(inputs), self.accelerator.gather
        place = torch.arange(n, device=d["prompt_ids"].device) + self.accelerator.process_index * n
        mask = d["dm_mask"] = (d["completion_mask"] * d.get("tool_mask", 1)).bool()
        columns = {"reward": self._rewards[place]} if self._has_reward else {}
        old, drawn = d.get("old_per_token_logps"), d.get("sampling_per_token_logps")
        if drawn is not None and old is not None:
            old = torch.where(drawn.isnan(), old, drawn)  # vLLM has none for some tokens
        of_tokens = {"log_proposal": drawn if old is None else old, "log_base": d.get("ref_per_token_logps")}
        columns |= {name: torch.where(mask, x.double(), 0.0).sum(1) for name, x in of_tokens.items() if x is not None}
        by_name = isinstance(getattr(self.objective, "baseline", None), str)
        if "log_proposal" not in columns and (self.target or by_name):
            columns["log_proposal"] = self.policy.log_prob(self._samples(d, None))
        if self.target is not None:
            samples = replace(self._samples(d, columns["log_proposal"]), rows=inputs)
            scores, context = self.target.score(samples), Prompts().of(samples).context_id
            now = self.partitions.updated(gather(context), gather(scores.log_target), gather(samples.log_prob))
            self.partitions = now if mode == "train" else self.partitions
            columns |= {"log_target": scores.log_target, "log_z": now.log_z(context), "log_base": scores.log_base}
            for name, value in zip(self.target.moment_names, gather(scores.features).mean(0).tolist(), strict=True):
                self._metrics[mode][f"phi/{name}"].append(value)
        lengths, of_all = gather(mask.sum(1).double()), {name: gather(column) for name, column in columns.items()}
        generations = self.num_generations if mode == "train" else self.num_generations_eval
        group = torch.arange(len(lengths), device=place.device) // generations
        whole = Terms.of(self.objective, self._on_policy, float("inf"), **of_all)
        self._wholes[mode] = whole.with_group(Group(lengths, lengths.sum(), float(len(lengths)), group))
        if by_name:
            columns["baseline"] = leave_one_out_baseline(whole, group, len(group), place.device)[place]
        return d | {f"dm_{name}": column for name, column in columns.items()} | {"dm_place": place}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return this process' share of the mean over all sequences of the optimiser step."""
        mode, objective = "train" if self.model.training else "eval", self.objective
        own = {name[3:]: value for name, value in inputs.items() if name.startswith("dm_")}
        mask, place, baseline = own.pop("mask"), own.pop("place"), own.pop("baseline", None)
        if not isinstance(objective, Objective):
            objective = OfStep(objective, self._wholes[mode], place)
        objective = objective if baseline is None else replace(objective, baseline=baseline)
        parts = self.current_gradient_accumulation_steps if mode == "train" else 1
        of_drawn = parts / self.args.steps_per_generation if mode == "train" else 1.0
        tokens = float(inputs["num_items_in_batch"].clamp(min=1)) / self.accelerator.num_processes * of_drawn
        policy = self.policy if model is self.policy.model else self.policy.around(model)
        out = policy.loss(
            self._samples(inputs, own.get("log_proposal")), **own, objective=objective, on_policy=self._on_policy,
            max_weight=self.max_weight, num_sequences=len(place) * parts, num_tokens=tokens, return_entropy=True,
        )  # fmt: skip
        assert out.entropy is not None
        now = torch.stack([out.entropy.sum() / mask.sum().clamp(min=1), out.weight.abs().mean()])
        for name, value in zip(("entropy", "weight_abs"), self.accelerator.reduce(now, "mean").tolist(), strict=True):
            self._metrics[mode][name].append(value)
        return out.loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.target is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            trl_settings.save(self, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.target is not None:
            trl_settings.load(self, Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
