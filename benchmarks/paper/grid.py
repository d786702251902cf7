"""Run the experiments of the paper in order, several side by side, and continue where the last call stopped.

    python benchmarks/paper/grid.py                 # all: tuning, then the main grid and the studies, seed by seed
    python benchmarks/paper/grid.py main --jobs 2   # one part; a run is a process of one thread
    python benchmarks/paper/grid.py quick --out paper_quick

A run that has a result is not run again. A run that dies leaves NAME.failed.json, the others continue, and the next
call tries it again. At the end the JSON files are packed into one archive (store.py). With ``--commit`` each run is
committed when it ends, and the archive at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import store
from rich.console import Console
from run import METHODS

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "paper"
MAIN = ("reinforce", "reinforce_p", "kl_control", "gdc", "gdc++")
GRID = ("word_amazing", "word_restaurant", "wordlist_war", "wordlist_music", "classifier_positive",
        "classifier_negative", "women", "topics", "women_science", "women_sports")  # fmt: skip
STUDIED = ("word_amazing", "women")
TUNED = (*MAIN, "js", "tv")
VARIANTS = ("js", "tv", "gdc_mean", "gdc++_on_policy", "gdc_loo", "gdc++_clip", "gdc++_fresh")
SEEDS = (0, 1, 2)
LEARNING_RATES = (5e-5, 1.5e-4, 5e-4, 1.5e-3)
TUNING_SEED = 100
FAILED = ".failed.json"
PARTS = ("tuning", "base", "main", "batch", "variants")


@dataclass(frozen=True)
class Run:
    """Describe one process of run.py."""

    part: str
    task: str
    method: str
    seed: int
    learning_rate: float | None = None
    batch: int = 256
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of its file."""
        rate = f"-lr{self.learning_rate:g}" if self.part == "tuning" else ""
        batch = f"-b{self.batch}" if self.part == "batch" else ""
        return f"{self.part}/{self.task}-{self.method.replace('++', 'pp')}{rate}{batch}-seed{self.seed}.json"

    @property
    def name_of_failure(self) -> str:
        """Return the name of the file that replaces it if it died."""
        return self.name.removesuffix(".json") + FAILED

    @property
    def arguments(self) -> list[str]:
        """Return the arguments of run.py."""
        rate = [] if self.learning_rate is None else ["--learning-rate", str(self.learning_rate)]
        return [self.task, self.method, "--seed", str(self.seed), "--batch", str(self.batch), *rate, *self.options]


def score(result: dict[str, Any]) -> tuple[float, float]:
    """Return the score that chooses a method's learning rate, and its standard error. A larger score is better.

    The score is the method's own aim at the end of a run: -KL(p||pi), also for js and tv; E_pi[phi] for REINFORCE; and
    E_pi[phi] - beta KL(pi||a) for KL control, with the beta that it starts from.
    """
    last = result["evaluations"][-1]
    if not result["finite"]:
        return -math.inf, 0.0
    if result["method"] in ("reinforce", "reinforce_p", "kl_control"):
        (name,) = [key for key in last if key.startswith("phi/") and not key.endswith("_stderr")]
        beta = METHODS["kl_control"]["beta"] if result["method"] == "kl_control" else 0.0
        error = math.hypot(last[f"{name}_stderr"], beta * last["kl_policy_base_stderr"])
        return last[name] - beta * last["kl_policy_base"], error
    return -last["kl_exact"], last["kl_exact_stderr"]


def learning_rates(folder: Path) -> dict[str, float]:
    """Return the smallest rate of each tuned method that is within a standard error of its best."""
    found, results = {}, store.read(folder)
    for method in TUNED:
        of_method = (run for run in tuning() if run.method == method and run.name in results)
        scores = {run.learning_rate: score(results[run.name]) for run in of_method}
        if len(scores) == len(LEARNING_RATES):
            best, error = max(scores.values())
            found[method] = min(rate for rate, (value, _) in scores.items() if value >= best - error)
    return found


def tuning() -> Iterator[Run]:
    """Return the tuning runs. They use a task and a seed outside the grid, and are evaluated only at the end."""
    for rate in LEARNING_RATES:
        for method in TUNED:
            yield Run("tuning", "tuning", method, TUNING_SEED, rate, options=("--evaluations", "1"))


def tuned(folder: Path, methods: Sequence[str] = TUNED) -> dict[str, float]:
    """Return the learning rates of some methods.

    Raises:
        LookupError: one has not been chosen yet.
    """
    rates = learning_rates(folder)
    if missing := [method for method in methods if method not in rates]:
        raise LookupError(f"no learning rate for {', '.join(missing)}: run the tuning first")
    return rates


def plan(parts: Sequence[str], folder: Path) -> Iterator[Run]:
    """Return all runs of some parts, in order. The parts after the tuning need its results.

    Raises:
        LookupError: a method's learning rate has not been chosen yet.
    """
    rates = tuned(folder) if {*parts} - {"tuning", "base"} else {}
    for part in parts:
        if part == "tuning":
            yield from tuning()
        elif part == "base":
            for seed in SEEDS:
                yield from (Run(part, task, "base", seed) for task in GRID)
        elif part == "main":
            for seed in SEEDS:
                for task in GRID:
                    variance = ("--gradient-variance",) if task in STUDIED else ()
                    yield from (Run(part, task, m, seed, rates[m], options=variance) for m in MAIN)
        elif part == "batch":
            for seed in SEEDS:
                for task in STUDIED:
                    # the main grid has batches of 256
                    for batch in (64, 128, 512):
                        yield from (Run(part, task, m, seed, rates[m], batch) for m in ("gdc", "gdc++"))
        elif part == "variants":
            for seed in SEEDS:
                for task in STUDIED:
                    for method in VARIANTS:
                        rate = rates.get(method, rates["gdc++"])  # each of the others differs from GDC++ in one thing
                        yield Run(part, task, method, seed, rate, options=("--gradient-variance",))


def quick() -> list[Run]:
    """Return two tasks with GDC and GDC++, one seed and a quarter of the sequences.

    The learning rates are those of the grid.
    """
    rates = tuned(RESULTS / "runs", ("gdc", "gdc++"))
    options = ("--samples", "5120", "--eval-samples", "512", "--evaluations", "2")
    return [
        Run("quick", task, m, 0, rates[m], options=options)
        for task in ("wordlist_war", "women")
        for m in ("gdc", "gdc++")
    ]


class RunFailedError(RuntimeError):
    """Report that a run's process has died. ``record`` is what is kept of it."""

    def __init__(self, run: Run, status: int, stderr: str) -> None:
        lines = stderr.strip().splitlines()[-15:]
        super().__init__("\n".join([f"{run.name}: exit status {status}", *lines]))
        # other lines of a traceback show code, where "nan" means nothing
        nan = bool(lines and re.search(r"\b(nan|inf|finite)\b", lines[-1], re.IGNORECASE))
        self.record = {"arguments": run.arguments, "status": status, "nan": nan, "stderr": lines}


def execute(run: Run, folder: Path) -> float:
    """Run it, and return the seconds that it took.

    Raises:
        RunFailedError: its process died.
    """
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # with these settings glibc keeps freed memory; otherwise it maps every activation anew, a tenth of the time of a
    # small model
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), *run.arguments, "--out", str(folder / run.name)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RunFailedError(run, done.returncode, done.stderr)
    return time.perf_counter() - start


def commit(folder: Path, name: str) -> None:
    """Commit the results that exist. If git is busy with something else, the next call includes them."""
    results = ["--", ".", ":!*.part"]
    for command in (["add", "-A"], ["commit", "-q", "-m", f"paper: {name}"]):
        done = subprocess.run(["git", *command, *results], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"not committed yet: {done.stderr.strip() or done.stdout.strip()}")
            return


def work(runs: list[Run], folder: Path, jobs: int, console: Console, *, commits: bool) -> int:
    """Run what has no result yet, ``jobs`` at a time, and return how many failed."""
    results = store.read(folder)
    todo = [run for run in runs if run.name not in results]
    console.print(f"{len(runs)} runs, {len(runs) - len(todo)} done")
    seconds: list[float] = []
    failed = 0
    waiting, running = iter(todo), dict[Future[float], Run]()
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            while len(running) < jobs and (run := next(waiting, None)) is not None:
                running[pool.submit(execute, run, folder)] = run
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    seconds.append(future.result())
                except RunFailedError as error:
                    failed += 1
                    console.print(f"failed: {error}", style="red", markup=False)
                    path = folder / run.name_of_failure
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(error.record, indent=1) + "\n")
                else:
                    left = len(todo) - len(seconds) - failed
                    minutes = left * statistics.median(seconds) / jobs / 60
                    console.print(f"{run.name}: {seconds[-1]:.0f} s; {left} left, about {minutes:.0f} minutes")
                if commits:
                    commit(folder, run.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "quick", []], help="default: all but quick")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "runs")
    parser.add_argument("--commit", action="store_true", help="each run, as it ends")
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    failed = 0
    parts = args.parts or PARTS
    # the other learning rates are known after the tuning
    for stage in ([p for p in parts if p == "tuning"], [p for p in parts if p not in ("tuning", "quick")]):
        # runs go seed by seed, so that the results at any time are as complete a study as possible
        runs = sorted(plan(stage, args.out), key=lambda run: run.seed)
        failed += work(runs, args.out, args.jobs, console, commits=args.commit) if runs else 0
    if "quick" in parts:
        failed += work(quick(), args.out, args.jobs, console, commits=args.commit)
    if store.pack(args.out) and args.commit:
        commit(args.out, store.ARCHIVE)
    sys.exit(f"{failed} runs failed; the same command tries them again" if failed else 0)


if __name__ == "__main__":
    main()
