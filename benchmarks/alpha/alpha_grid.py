"""Run the comparison: choose the runs and their order, and go on where an earlier start stopped.

    python benchmarks/alpha/alpha_grid.py                     # all, with two processes of one thread
    python benchmarks/alpha/alpha_grid.py quick --out build/alpha_quick

The two methods with a beta first run at each beta with one rate. Each method then runs at each learning rate with the
first seed. The settings with the best pass@1 and the best pass@64 on the validation prompts run with the other seeds.
Five methods come first, with all seeds, and then the others. Two methods run once more without their baseline, at the
rate that was chosen with it. A run whose result exists is not run again. A run that
fails leaves NAME.failed.json, the others go on, and the next start tries it again. In the end the results are packed
into one archive. ``--commit`` commits each result when its run ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "paper"))
RESULTS = HERE.parent / "results" / "alpha"

import store  # noqa: E402  # of the paper's runs: files, and their archive
from exact import KS  # noqa: E402
from train_one import BARE, BASE, EVALUATIONS, LIKELIHOOD, METHODS, STEPS, Data, run  # noqa: E402

RATES = (2e-4, 5e-4, 1e-4, 5e-5)  # the likeliest first
BETAS = (0.1, 0.2, 0.05)
SEEDS = (0, 1, 2)  # the first is the seed with which rates are chosen
FAILED = ".failed.json"
#: The measures by which a rate is chosen, from the last evaluation on validation prompts.
CHOICES = {"pass@1": KS.index(1), "pass@64": KS.index(64)}
#: These five are done before the others begin, so that the results say something at any time.
CORE = ("alpha=0", "alpha=0.9", "reinforce", "alpha=0.5", LIKELIHOOD)
ALL = (*CORE, "alpha=0.999", "maxrl", "gdc++ offline", "alpha=0.25", "alpha=0.75", "gspo", "kl_control", "vargrad")
assert {*ALL, *BARE} == {*METHODS, LIKELIHOOD}
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The arguments of one call of ``train_one.run``."""

    method: str
    rate: float
    seed: int
    beta: float | None = None
    steps: int = STEPS
    evaluations: int = EVALUATIONS

    @property
    def name(self) -> str:
        """The name of the file of its result."""
        beta = "" if self.beta is None else f"-beta{self.beta:g}"
        method = self.method.replace("++ ", "pp_").replace(" ", "_")
        return f"seed{self.seed}/{method}{beta}-lr{self.rate:g}.json"

    @property
    def name_of_failure(self) -> str:
        """The name of the file that is written instead if the run fails."""
        return self.name.removesuffix(".json") + FAILED


def has_beta(method: str) -> bool:
    """Return whether a method's target is a exp(v/beta)."""
    return method in METHODS and METHODS[method].beta


def score(result: Mapping[str, Any], by: str) -> float:
    """Return the measure by which a rate is chosen: pass@1 or pass@64 on the validation prompts at the end of a run."""
    value: float = result["end"]["validation"]["pass"][CHOICES[by]]
    return value


def best(results: Results, method: str, by: str, *, rate: float | None = None) -> dict[str, Any] | None:
    """Return the best run of a method with the first seed, at one rate if it is given, or None if there is none yet."""
    of_method = [
        result for name, result in results.items()
        if name.startswith(f"seed{SEEDS[0]}/")
        and not name.endswith(FAILED)
        and result["method"] == method
        and rate in (None, result["rate"])
    ]  # fmt: skip
    return max(of_method, key=lambda result: score(result, by), default=None)


def rates(results: Results, methods: Sequence[str]) -> list[Run]:
    """Return the runs by which rates are chosen. Methods with a beta have theirs once all betas have run."""
    found = []
    for method in methods:
        if not has_beta(method):
            found += [Run(method, rate, SEEDS[0]) for rate in RATES]
            continue
        tried = [Run(method, RATES[0], SEEDS[0], beta) for beta in BETAS]
        found += tried
        first = best(results, method, "pass@1", rate=RATES[0])
        if first is not None and all({run.name, run.name_of_failure} & results.keys() for run in tried):
            found += [Run(method, rate, SEEDS[0], first["beta"]) for rate in RATES[1:]]
    return found


def chosen(results: Results, method: str) -> dict[str, tuple[float, float | None]]:
    """Return the best rate and beta of a method for each of ``CHOICES``, among the runs that are done."""
    found = {by: best(results, method, by) for by in CHOICES}
    return {by: (result["rate"], result["beta"]) for by, result in found.items() if result is not None}


def other_seeds(results: Results, methods: Sequence[str], seeds: Sequence[int] = SEEDS[1:]) -> list[Run]:
    """Return the runs of methods whose rates are chosen, seed by seed."""
    settings = {method: {*chosen(results, method).values()} for method in methods}
    return [
        Run(method, rate, seed, beta)
        for seed in seeds for method in methods for rate, beta in sorted(settings[method], key=str)
    ]  # fmt: skip


def bare(results: Results) -> list[Run]:
    """Return the runs without a baseline of methods whose rates are chosen."""
    settings = {name: chosen(results, whole).get("pass@1") for name, whole in BARE.items()}
    return [Run(name, of[0], SEEDS[0]) for name, of in settings.items() if of is not None]


def untrained() -> Run:
    """Return the run that evaluates the base without training."""
    return Run(BASE, 0.0, SEEDS[0], steps=0)


def quick(_: Results) -> list[Run]:
    """Return the runs of four methods at one rate and one seed, with a third of the steps."""
    methods = ("alpha=0", "alpha=0.9", "reinforce", LIKELIHOOD)
    return [untrained(), *(Run(method, RATES[0], SEEDS[0], steps=STEPS // 3, evaluations=4) for method in methods)]


#: Each stage gives its runs from the results that exist.
STAGES: tuple[Callable[[Results], list[Run]], ...] = (
    lambda results: [untrained(), *rates(results, CORE)],
    lambda results: other_seeds(results, CORE),
    lambda results: rates(results, ALL),
    bare,
    lambda results: other_seeds(results, ALL),
)


_data: Data | None = None  # the data of this worker process


def _start(base: Path) -> None:
    import torch
    from transformers.utils import logging

    global _data
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    _data = Data(base)


def _work(each: Run, folder: Path) -> tuple[Run, str | None]:
    """Do a run and write its result. Return the run, and the error if it failed."""
    assert _data is not None
    try:
        how = {"beta": each.beta, "steps": each.steps, "evaluations": each.evaluations}
        result = run(_data, each.method, each.rate, each.seed, **how)
    except (ValueError, RuntimeError, ArithmeticError):
        error = traceback.format_exc()
        write(folder / each.name_of_failure, {"method": each.method, "error": error.splitlines()[-15:]})
        return each, error
    write(folder / each.name, result)
    (folder / each.name_of_failure).unlink(missing_ok=True)
    return each, None


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(path)


def commit(folder: Path, name: str) -> None:
    """Commit the results that exist. If git is busy with something else, the next call commits them."""
    for command in (["add", "-A"], ["commit", "-q", "-m", f"alpha: {name}"]):
        done = subprocess.run(
            ["git", *command, "--", ".", ":!*.part"], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"not committed yet: {done.stderr.strip() or done.stdout.strip()}", flush=True)
            return


def do(plan: Callable[[Results], list[Run]], folder: Path, pool: Any, *, commits: bool) -> int:
    """Do the runs of a plan that are not done, until it has no more, and return the number of runs that failed."""
    tried: set[str] = set()
    failed = 0
    while True:
        results = store.read(folder)
        runs = plan(results)
        todo = [each for each in runs if each.name not in results and each.name not in tried]
        if not todo:
            return failed
        tried |= {each.name for each in todo}
        print(f"{len(runs)} runs, {len(runs) - len(todo)} done", flush=True)
        start = time.perf_counter()
        for n, future in enumerate(as_completed([pool.submit(_work, each, folder) for each in todo]), 1):
            each, error = future.result()
            failed += error is not None
            left = (time.perf_counter() - start) / n * (len(todo) - n) / 60
            print(f"{each.name}: {error or 'done'}; {len(todo) - n} left, about {left:.0f} minutes", flush=True)
            if commits:
                commit(folder, each.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "quick"), default="all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "runs")
    parser.add_argument("--base", type=Path, default=HERE / "base")
    parser.add_argument("--commit", action="store_true", help="commit each run as it ends")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # with this glibc keeps freed memory; without it every activation is mapped anew
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    failed = 0
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), _start, (args.base,)) as pool:
        for plan in (quick,) if args.what == "quick" else STAGES:
            failed += do(plan, args.out, pool, commits=args.commit)
    if args.what == "all" and not failed and store.pack(args.out) and args.commit:
        commit(args.out, store.ARCHIVE)
    sys.exit(f"{failed} runs failed; the same command tries them again" if failed else 0)


if __name__ == "__main__":
    main()
