"""Exact samples of a task's target p, and KL(p||pi) from them: the way with little variance.

    python benchmarks/paper/truth.py TASK...        # writes results/paper/targets/TASK.json and .npz, once

The paper estimates KL(p||pi) with importance weights from samples of another model (q or pi), which are few where p is
far from it. But p itself can be drawn from: its features are 0 or 1, so that P(x)/a(x) = b(x) exp(lambda phi(x)) has
a known bound M, and a sample of a that is accepted with probability P/(M a) is a sample of p, whatever policy is
measured. Drawn once, they give for every policy

    KL(p||pi) = mean over x ~ p of [log P(x) - log pi(x)] - log Z,      Z = M * the share that was accepted,

on the same samples, so that two policies are compared in pairs, where even the error of log Z drops out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import dmfast
from dmfast.estimators import Estimate, estimate_moments
from dmfast.models import LanguageModel, Samples
from dmfast.targets import EBM
from dmfast.training import recipe

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "paper"
TASKS = tuple(sorted(path.stem for path in (HERE / "tasks").glob("*.yaml")))
SAMPLES = 2048


@dataclass(frozen=True)
class Truth:
    """What is known of a target.

    Attributes:
        samples: of p. log_target: (N,) fp64, log P of them. log_z: with the error of the share that was accepted.
        target_state: of the ``EBM``, with its lambda.
    """

    samples: Samples
    log_target: torch.Tensor
    log_z: Estimate
    target_state: dict[str, object]

    def kl(self, log_prob: torch.Tensor) -> Estimate:
        """KL(p||pi) in nats from log pi of the samples, (N,) fp64."""
        terms = self.log_target - log_prob.detach()
        stderr = float(terms.std()) / math.sqrt(len(terms))
        return Estimate(float(terms.mean()) - self.log_z.value, math.hypot(stderr, self.log_z.stderr))


def log_bound(target: EBM) -> float:
    """log M, the largest b(x) exp(lambda phi(x)) that binary features allow."""
    return float(target.lambda_.clamp(min=0).sum())


def draw(
    target: EBM, n: int, *, max_new_tokens: int, seed: int, batch_size: int = 512
) -> tuple[Samples, int, Estimate]:
    """n exact samples of p, how many of the base that took, and log Z."""
    bound = log_bound(target)
    x, drawn = dmfast.quasi_rejection_sample(
        target, target.base, n, log_beta=bound, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size
    )
    return x, drawn, Estimate(bound + math.log(n / drawn), math.sqrt((1 - n / drawn) / n))


def write(task: str, folder: Path, n: int) -> None:
    """Fits lambda and draws."""
    read = recipe.read(HERE / "tasks" / f"{task}.yaml")
    trainer = recipe.prepare(read, say=lambda line: print(line, flush=True))
    target, args = trainer.target, trainer.args
    x, drawn, log_z = draw(target, n, max_new_tokens=args.max_new_tokens, seed=2**32 + read["fit"]["seed"])
    log_base = target.base.log_prob(x, batch_size=512)
    scores = target.score(x, log_base)
    of_base = target.base.sample(n=10_240, max_new_tokens=args.max_new_tokens, seed=2**33, batch_size=512)
    found = target.score(of_base, of_base.log_prob)
    columns = torch.cat([found.features, found.monitored], 1)
    names = [*target.moment_names, *target.monitor_names]
    rates = dict(zip(names, estimate_moments(columns, torch.zeros(len(of_base), dtype=torch.float64)), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / f"{task}.npz", tokens=x.tokens.numpy().astype(np.uint16), length=x.attention_mask.sum(1).numpy(),
        log_base=log_base.numpy(), log_target=scores.log_target.numpy(),
    )  # fmt: skip
    kl_base = Truth(x, scores.log_target, log_z, {}).kl(log_base)
    result = {
        "task": task, "samples": n, "drawn": drawn, "log_z": vars(log_z), "kl_target_base": vars(kl_base),
        "base_rates": {name: vars(rate) for name, rate in rates.items()}, "target": target.state_dict(),
        "torch": torch.__version__,
    }  # fmt: skip
    (folder / f"{task}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{task}: {n} of {drawn} accepted, log Z {log_z}, base rates "
          + ", ".join(f"{name} {rate}" for name, rate in rates.items()), flush=True)  # fmt: skip


def read(task: str, model: LanguageModel, folder: Path = RESULTS / "targets") -> Truth:
    """What ``write`` has written, for a model with the tokenizer of tiny-bios.

    Raises:
        FileNotFoundError: nothing was written.
    """
    path = folder / f"{task}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: python benchmarks/paper/truth.py {task} writes it")
    result, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    tokens = torch.from_numpy(arrays["tokens"].astype(np.int64))
    position = torch.arange(tokens.shape[1])
    attention = (position < torch.from_numpy(arrays["length"])[:, None]).long()
    samples = Samples(
        tokens=tokens, attention_mask=attention, score_mask=(attention == 1) & (position > 0), prompt_len=1,
        log_prob=torch.from_numpy(arrays["log_base"]), context_id=torch.zeros(len(tokens), dtype=torch.int64),
        temperature=1.0, tokenizer=model.tokenizer, pad_token_id=model.pad_token_id,
    )  # fmt: skip
    return Truth(samples, torch.from_numpy(arrays["log_target"]), Estimate(**result["log_z"]), result["target"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", nargs="*", default=TASKS, help="default: all")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--out", type=Path, default=RESULTS / "targets")
    args = parser.parse_args()
    for task in args.task:
        if task not in TASKS:
            sys.exit(f"no task {task!r}; there are {', '.join(TASKS)}")
        if not (args.out / f"{task}.json").exists():
            write(task, args.out, args.samples)


if __name__ == "__main__":
    main()
