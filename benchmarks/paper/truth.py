"""Draw exact samples of a task's target p, and estimate KL(p||pi) from them, where no policy can hide.

    python benchmarks/paper/truth.py TASK...        # writes results/paper/targets/TASK.json and .npz, once

The paper estimates KL(p||pi) with importance weights from samples of another model (q or pi), which are few where p is
far from it. But p itself can be drawn from. Its features are 0 or 1, so that P(x)/a(x) = b(x) exp(lambda phi(x)) has a
known bound M. A sample of a that is accepted with probability P/(M a) is a sample of p, whatever policy is measured.
Drawn once, these samples give for every policy

    KL(p||pi) = mean over x ~ p of [log P(x) - log pi(x)] - log Z,      Z = M * the share that was accepted,

on the same samples. So two policies are compared in pairs, where even the error of log Z drops out. In KL(p||pi) itself
it does not. So Z is measured again as the mean of P/a over many more samples of a, the same ones for all tasks, which
give E_a[phi], E_p[phi] and KL(p||a), too.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmfast.estimators import Estimate, estimate, estimate_log_z, estimate_moments
from dmfast.models import LanguageModel
from dmfast.rejection import quasi_rejection_sample
from dmfast.samples import Samples
from dmfast.targets import EBM
from dmfast.training import recipe

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "paper"
TASKS = tuple(sorted(path.stem for path in (HERE / "tasks").glob("*.yaml")))
SAMPLES = 2048
# this many samples of a are drawn, or fewer where a network reads each of them
BASE_SAMPLES, OF_A_CLASSIFIER = 2**19, 2**16


@dataclass(frozen=True)
class Truth:
    """Hold what is known of a target.

    Attributes:
        samples: samples of p.
        log_target: (N,) fp64, log P of the samples.
        log_z: log Z from the share that was accepted and, if there, the samples of a.
        target_state: the state of the ``EBM``, with its lambda.
    """

    samples: Samples
    log_target: torch.Tensor
    log_z: Estimate
    target_state: dict[str, object]

    def kl(self, log_prob: torch.Tensor) -> Estimate:
        """Return KL(p||pi) in nats from log pi of the samples, (N,) fp64."""
        terms = self.log_target - log_prob.detach()
        stderr = float(terms.std()) / math.sqrt(len(terms))
        return Estimate(float(terms.mean()) - self.log_z.value, math.hypot(stderr, self.log_z.stderr))


def log_bound(target: EBM) -> float:
    """Return log M, the largest b(x) exp(lambda phi(x)) that binary features allow."""
    return float(target.lambda_.clamp(min=0).sum())


def draw(
    target: EBM, n: int, *, max_new_tokens: int, seed: int, batch_size: int = 512
) -> tuple[Samples, int, Estimate]:
    """Return n exact samples of p, how many samples of the base they took, and log Z."""
    bound = log_bound(target)
    x, drawn = quasi_rejection_sample(
        target, target.base, n, log_beta=bound, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size
    )
    return x, drawn, Estimate(bound + math.log(n / drawn), math.sqrt((1 - n / drawn) / n))


def of_recipe(task: str, fitted: dict[str, Any] | None = None) -> tuple[EBM, dict[str, Any]]:
    """Return a task's target and its recipe. The target is fitted if its state is not given."""
    with tempfile.TemporaryDirectory() as folder:  # a trainer makes this folder
        read = recipe.read(HERE / "tasks" / f"{task}.yaml", {"train.output_dir": folder})
        return recipe.prepare(read, fitted=fitted, say=lambda line: print(line, flush=True)).target, read


def write(task: str, folder: Path, n: int) -> None:
    """Fit lambda and draw the samples.

    The committed samples were drawn when ``fit`` and ``quasi_rejection_sample`` used the seed itself. They now derive
    their own seed from it, so that another run draws other samples of the same distributions.
    """
    target, read = of_recipe(task)
    length = read["train"]["max_new_tokens"]
    x, drawn, log_z = draw(target, n, max_new_tokens=length, seed=2**32 + read["fit"]["seed"])
    log_base = target.base.log_prob(x, batch_size=512)
    scores = target.score(x, log_base)
    of_base = target.base.sample(n=10_240, max_new_tokens=length, seed=2**33, batch_size=512)
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


def both(first: Estimate, second: Estimate) -> Estimate:
    """Return the mean of two independent estimates that has the smallest error."""
    weights = first.stderr**-2, second.stderr**-2
    mean = (weights[0] * first.value + weights[1] * second.value) / sum(weights)
    return Estimate(mean, sum(weights) ** -0.5)


def measure(tasks: Mapping[str, int], folder: Path, chunk: int = 2**14) -> None:
    """Add ``base`` to what ``write`` has written.

    It holds Z, KL(p||a), E_a[phi] and E_p[phi] of each target, from as many samples of a as ``tasks`` says. All targets
    share these samples.
    """
    targets, found = dict[str, EBM](), dict[str, list[tuple[torch.Tensor, torch.Tensor]]]()
    for task in tasks:
        targets[task], read = of_recipe(task, known(task, folder)["target"])
        found[task], length = [], read["train"]["max_new_tokens"]
    model = next(iter(targets.values())).base
    for start in range(0, max(tasks.values()), chunk):
        x = model.sample(n=chunk, max_new_tokens=length, seed=2**34 + start, batch_size=512)
        for task, target in targets.items():
            if start < tasks[task]:
                scores = target.score(x, x.log_prob)
                columns = torch.cat([scores.features, scores.monitored], 1)
                found[task].append((scores.log_target - x.log_prob, columns))
        print(f"{start + chunk:,} samples of a", flush=True)
    for task, target in targets.items():
        log_weight, columns = (torch.cat(parts) for parts in zip(*found[task], strict=True))
        names = [*target.moment_names, *target.monitor_names]
        log_z, nothing = estimate_log_z(log_weight), torch.zeros_like(log_weight)
        kl = estimate(nothing, nothing, log_weight, log_z.value, z_of=nothing.long()).kl_policy
        result = known(task, folder)
        result["base"] = {"samples": len(log_weight), "log_z": vars(log_z), "kl_target_base": vars(kl)}
        for key, weight in (("rates", nothing), ("target_means", log_weight)):
            estimates = estimate_moments(columns, weight)
            result["base"][key] = {name: vars(each) for name, each in zip(names, estimates, strict=True)}
        (folder / f"{task}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{task}: log Z {log_z}, by the rejection {Estimate(**result['log_z'])}", flush=True)


def known(task: str, folder: Path = RESULTS / "targets") -> dict[str, Any]:
    """Return the JSON of a target.

    Raises:
        FileNotFoundError: nothing was written.
    """
    path = folder / f"{task}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: python benchmarks/paper/truth.py {task} writes it")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def log_z_of(result: dict[str, Any]) -> Estimate:
    """Return log Z from everything that a target's JSON has about it."""
    accepted = Estimate(**result["log_z"])
    return both(accepted, Estimate(**result["base"]["log_z"])) if "base" in result else accepted


def read(task: str, model: LanguageModel, folder: Path = RESULTS / "targets") -> Truth:
    """Return what ``write`` has written, for a model with the tokenizer of tiny-bios.

    Raises:
        FileNotFoundError: nothing was written.
    """
    result, arrays = known(task, folder), np.load(folder / f"{task}.npz")
    tokens = torch.from_numpy(arrays["tokens"].astype(np.int64))
    position = torch.arange(tokens.shape[1])
    attention = (position < torch.from_numpy(arrays["length"])[:, None]).long()
    samples = Samples(
        tokens=tokens, attention_mask=attention, score_mask=(attention == 1) & (position > 0), prompt_len=1,
        log_prob=torch.from_numpy(arrays["log_base"]), context_id=torch.zeros(len(tokens), dtype=torch.int64),
        temperature=1.0, tokenizer=model.tokenizer, pad_token_id=model.pad_token_id,
    )  # fmt: skip
    return Truth(samples, torch.from_numpy(arrays["log_target"]), log_z_of(result), result["target"])


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
    # the tuning's task is left out, because its runs are only compared with one another
    left = [task for task in args.task if task != "tuning" and "base" not in known(task, args.out)]
    if left:
        measure({t: OF_A_CLASSIFIER if "classifier" in t else BASE_SAMPLES for t in left}, args.out)


if __name__ == "__main__":
    main()
