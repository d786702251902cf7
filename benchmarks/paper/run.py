"""Run one task with one method and one seed, and write the results as JSON.

    python benchmarks/paper/run.py women gdc++ --seed 0 --out run.json

All methods of a seed draw with the same random numbers, in training and in the evaluations. The exception is KL
control, which trains twice on a batch and shares only the numbers of the evaluations.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import truth
from transformers import TrainerCallback

from dmfast import diagnostics
from dmfast.metrics import logged_features
from dmfast.samples import Samples
from dmfast.targets import Feature, Moment
from dmfast.training import DMTrainer, recipe, report

SAMPLES, BATCH, MICROBATCH, EVALUATIONS, DIVERSITY = 20_480, 256, 64, 5, 200

# each method changes these settings of the recipe; the reward methods have those of the paper's code and of TRL, which
# it uses, but take two epochs of a batch in the place of four, which cost as many forwards
METHODS: dict[str, dict[str, Any]] = {
    "reinforce": {"objective": "reinforce", "on_policy": True},
    "reinforce_p": {"objective": "reinforce_p", "on_policy": True},
    # this is Ziegler et al. 2019 in the sequence-level form of dmfast.objectives.PPOClip, with one ratio per sequence
    # and no value head
    "kl_control": {
        "objective": "kl_control", "on_policy": True, "baseline": "mean", "beta": 0.2, "beta_target_kl": 6.0,
        "beta_horizon": 10_000, "ppo_epochs": 2, "ppo_clip": 0.2,
    },
    "gdc": {"objective": "dpg"},
    "gdc++": {"objective": "gdc++"},
    # these go beyond the paper
    "js": {"objective": "js"},
    "tv": {"objective": "tv"},
    "gdc_mean": {"objective": "dpg", "baseline": "mean"},
    "gdc_loo": {"objective": "dpg", "on_policy": True, "baseline": "leave_one_out"},
    "gdc++_on_policy": {"objective": "gdc++", "on_policy": True},
    "gdc++_clip": {"objective": "gdc++", "max_weight": 10.0},
    "gdc++_fresh": {"objective": "gdc++", "proposal_check_samples": 2048},
}  # fmt: skip
REWARD_METHODS = ("reinforce", "kl_control")
_KEPT = ("kl_policy", "kl_proposal", "log_z", "ess", "weight_mean", "weight_std", "weight_abs", "swapped", "beta",
         "clip_fraction", "kl_policy_base", "gradient_variance", "gradient_norm", "reward", "baseline")  # fmt: skip


def reward_of(read: dict[str, Any]) -> Any:
    """Return the reward of a task for a reward method: the mean of the features that its constraints name.

    A reward cannot ask for a half, so the feature of a moment is wanted as much as possible. The four topics rarely
    occur together, so their mean is a quarter of "any topic".
    """
    constraints = [recipe.constraint(each) for each in read["constraints"]]
    features: list[Feature] = [each.feature if isinstance(each, Moment) else each for each in constraints]

    def reward(samples: Samples) -> torch.Tensor:
        return torch.stack([feature(samples) for feature in features]).mean(0)

    return reward


def settings(
    method: str, batch: int, learning_rate: float | None, samples: int, evaluations: int = EVALUATIONS
) -> dict[str, Any]:
    """Return what method and batch size change in a recipe's ``train``.

    Warm-up, evaluations and checks of q are counted in sequences, and so is the number of samples behind a check.
    Microbatches hold sequences of about one length, which saves padding and changes no gradient.
    """
    epochs = METHODS[method].get("ppo_epochs", 1)
    steps = samples // batch
    changed = {
        "per_device_train_batch_size": min(batch, MICROBATCH),
        "gradient_accumulation_steps": math.ceil(batch / MICROBATCH),
        "max_steps": steps * epochs, "warmup_steps": epochs * 10 * BATCH // batch,
        "proposal_interval": 10 * BATCH // batch, "proposal_decay": 0.8 ** (batch / BATCH),
        "eval_steps": epochs * max(1, steps // evaluations),
    }  # fmt: skip
    return changed | METHODS[method] | ({} if learning_rate is None else {"learning_rate": learning_rate})


def prepare(task: str, method: str, changed: dict[str, Any], targets: Path | None = None) -> DMTrainer:
    """Return the trainer of a task's recipe, with ``changed`` applied to its ``train``."""
    read = recipe.read(truth.HERE / "tasks" / f"{task}.yaml", {f"train.{key}": x for key, x in changed.items()})
    state = truth.known(task, targets or truth.RESULTS / "targets")["target"]
    reward = reward_of(read) if method in REWARD_METHODS else None
    return recipe.prepare(read, fitted=state, reward=reward, say=lambda line: None)


class _Evaluations(TrainerCallback):  # type: ignore[misc]
    """Add to each evaluation what the paper shows beside E[phi] and KL(pi||a)."""

    def __init__(self, known: truth.Truth, batch: int, epochs: int) -> None:
        self.known, self.per_step, self.found = known, batch / epochs, list[dict[str, Any]]()
        self.trainer: Any = None
        self.log_prob = torch.empty(0)  # log pi of the exact samples of p at the last evaluation

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Evaluate after the trainer, on the same samples."""
        texts = self.trainer.eval_samples.text[:DIVERSITY]
        with torch.no_grad():
            self.log_prob = self.trainer.policy.log_prob(self.known.samples, batch_size=512)
        exact = self.known.kl(self.log_prob)
        self.found.append(
            {"step": state.global_step, "samples": round(state.global_step * self.per_step)}
            | {key.removeprefix("eval_"): value for key, value in metrics.items()}
            | {"kl_exact": exact.value, "kl_exact_stderr": exact.stderr}
            | {"distinct_1": diagnostics.distinct_n(texts, 1), "self_bleu_5": diagnostics.self_bleu(texts, 5)}
        )


def run(
    task: str, method: str, seed: int, *, learning_rate: float | None = None, batch: int = BATCH,
    samples: int = SAMPLES, evaluations: int = EVALUATIONS, eval_samples: int = 2048, gradient_variance: bool = False,
    targets: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the content of the JSON. ``method`` may be "base", the model before training."""
    start = time.perf_counter()
    base = method == "base"
    changed = settings("gdc++" if base else method, batch, learning_rate, samples, evaluations) | {"seed": seed}
    changed |= {"eval_samples": eval_samples, "logging_steps": 1, "disable_tqdm": True, "sampling_batch_size": 256}
    if gradient_variance:
        changed["gradient_variance_steps"] = max(1, changed["max_steps"] // 10)
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare(task, method, changed | {"output_dir": folder}, targets)
        known = truth.read(task, trainer.policy, targets or truth.RESULTS / "targets")
        evaluated = _Evaluations(known, batch, changed.get("ppo_epochs", 1))
        evaluated.trainer = trainer
        trainer.add_callback(evaluated)
        torch.manual_seed(seed)
        if base:
            trainer.evaluate()
        else:
            trainer.train()
    steps = [h for h in trainer.state.log_history if "weight_std" in h]
    features = {f"phi/{name}" for name in logged_features(steps[0] if steps else ())}
    columns = [key for key in (steps[0] if steps else ()) if key in _KEPT or key in features]
    optional = [key for key in _KEPT if key not in columns and any(key in h for h in steps)]
    finite = all(bool(p.isfinite().all()) for p in trainer.policy.model.parameters())
    return {
        "task": task, "method": method, "seed": seed, "batch": batch, "samples": samples, "settings": changed,
        "machine": report.machine(), "evaluations": evaluated.found, "log_z": vars(known.log_z),
        "history": {key: [_short(h.get(key)) for h in steps] for key in ["step", *columns, *optional]},
        # all runs of a task share these samples, so that differences between runs have an error of their own
        "log_prob": [round(value, 3) for value in evaluated.log_prob.tolist()],
        "swaps": trainer.proposal.swaps if trainer.proposal and not base else 0,
        "finite": finite and all(math.isfinite(e["kl_exact"]) for e in evaluated.found),
        "sample_texts": trainer.eval_samples.text[:8] if trainer.eval_samples is not None else [],
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _short(value: float | None) -> float | None:
    """Return five digits of a number, to keep the file small, or None where there is none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=truth.TASKS)
    parser.add_argument("method", choices=["base", *METHODS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--eval-samples", type=int, default=2048)
    parser.add_argument("--gradient-variance", action="store_true", help="ten times a run")
    parser.add_argument("--targets", type=Path, help="where truth.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    args = vars(parser.parse_args())
    out = args.pop("out")
    result = run(args.pop("task"), args.pop("method"), args.pop("seed"), **args)
    out.parent.mkdir(parents=True, exist_ok=True)
    report.write(result, out.parent, out.name + ".part")
    (out.parent / (out.name + ".part")).rename(out)  # the file is either complete or absent


if __name__ == "__main__":
    main()
