"""Run ``dmfast bench``: measure each configuration in a process of its own, and write the report as it grows."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..training.report import machine, write
from . import report
from .measure import in_fresh_process
from .noise import calmest, noisy
from .worker import Config

_OF_STEP = {"batch": 64, "length": 40, "rounds": 5}  # the numbers of --model and their defaults
SHAPES = ((512, 50257), (2048, 50257), (512, 151936), (4096, 1319))


def quick() -> list[Config]:
    """Return the configurations that take a minute or two."""
    threads = torch.get_num_threads()
    return [
        Config("logits", 512, 50257, threads=threads, rounds=10),
        Config("head", 512, 50257, 576, threads=threads, rounds=3),
        Config("sampling", 64, 50257, threads=threads, rounds=10),
    ]


def full() -> list[Config]:
    """Return all configurations, those that tell most first.

    The first shape has every combination, and the others have one change at a time.
    """
    return sorted(_all(), key=lambda c: (c.threads == 1) + c.huge_pages + (c.logits == "model"))


def _all() -> Iterator[Config]:
    ways = tuple(itertools.product((2, 1), (False, True), ("randn", "model")))
    for rows, vocab in SHAPES:
        rounds = 15 if rows * vocab < 3e7 else 5
        for dtype, (threads, pages, logits) in itertools.product(("float32", "bfloat16"), ways):
            changed = (threads == 1) + pages + (logits == "model")
            if changed < 2 or (rows, vocab) == SHAPES[0]:
                yield Config("logits", rows, vocab, 0, dtype, threads, pages, logits, rounds)
    for rows, vocab in SHAPES:
        for dim in (576, 768):
            for threads in (2, 1) if (rows, vocab) == (2048, 50257) else (2,):
                yield Config("head", rows, vocab, dim, threads=threads, rounds=5 if rows * vocab < 3e7 else 3)
    yield Config("head", 2048, 50257, 576, huge_pages=True, rounds=3)
    yield Config("head", 512, 50257, 576, "bfloat16", rounds=3)
    for threads in (2, 1):
        yield Config("sampling", 64, 50257, threads=threads, rounds=30)


def _wants_memory(c: Config) -> bool:
    """Tell whether memory is measured: once per shape and dtype, since neither threads nor values matter to it."""
    return c.form != "sampling" and c.vocab == 50257 and c.logits == "randn" and not c.huge_pages and c.threads != 1


def in_process(c: Config) -> dict[str, Any]:
    """Return what ``worker.run`` returns in a fresh process.

    Raises:
        RuntimeError: the process failed; the message has what it said.
    """
    environment = {"THP_MEM_ALLOC_ENABLE": "1" if c.huge_pages else "0", "OMP_NUM_THREADS": str(c.threads)}
    code = "from dmfast.bench.worker import main; main()"
    result: dict[str, Any] = in_fresh_process(code, json.dumps(asdict(c)), environment=environment)
    return result


def measure(c: Config, say: Callable[[Any], None]) -> dict[str, Any]:
    """Return the times and, once per shape and dtype, the peak memory of each rival.

    Where the rounds disagree, all is measured again in another process, as ``calmest`` says.
    """
    result = calmest(lambda: in_process(c), lambda r: r["ms"], say)
    if _wants_memory(c):
        names = [name for name in result["ms"] if name in result["gradient_error"]]
        result["memory_mb"] = {n: in_process(replace(c, memory_of=n))["memory_mb"] for n in names}
    say(report.table(result))
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dmfast bench``."""
    parser.add_argument(
        "--full",
        action="store_true",
        help="every shape, dtype and thread count; about 45 minutes on a machine that does nothing else",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where an earlier run into the same folder ended, and measure again what was noisy",
    )
    parser.add_argument("--only", metavar="TEXT", help="with --full: configurations whose title has this")
    parser.add_argument("--model", help="profile one training step of this model instead: a folder, a name of the hub, "
                        "tiny-bios or random-gpt2")  # fmt: skip
    parser.add_argument("--batch", type=int, help=f"with --model: sequences (default {_OF_STEP['batch']})")
    parser.add_argument("--length", type=int, help=f"with --model: new tokens of each (default {_OF_STEP['length']})")
    parser.add_argument("--rounds", type=int, help=f"with --model: steps of each (default {_OF_STEP['rounds']})")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for the JSON and the picture")


def _check(args: argparse.Namespace) -> None:
    """Check the options of ``dmfast bench`` before a model is loaded or a time is measured.

    Raises:
        ValueError: a number is not positive, or an option has no effect beside the others.
    """
    for name in _OF_STEP:
        value = getattr(args, name)
        if value is not None and not args.model:
            raise ValueError(f"--{name} {value} has no effect without --model: give --model NAME, or leave it out")
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be a positive integer, got {value}")
    for name in ("full", "resume", "only"):
        if args.model and getattr(args, name):
            raise ValueError(f"--{name} has no effect with --model, which profiles one training step: leave one out")
    if args.only and not args.full:
        raise ValueError(
            f"--only {args.only!r} chooses among the configurations of --full: add --full, or leave it out"
        )


def bench(args: argparse.Namespace, say: Callable[[Any], None]) -> None:
    """Run what ``args`` say, and write ``bench.json`` and ``bench.png``, or ``step.json`` and ``step.png``.

    Raises:
        ValueError: an option is out of range or has no effect, no configuration has the text of ``--only``, or the file
            to resume is not a result of this version of ``dmfast bench``.
        OSError, RuntimeError: the model can't be loaded, a file can't be written, or a measuring process failed.
    """
    _check(args)
    configs = [c for c in full() if (args.only or "") in c.title] if args.full else quick()
    if not configs:
        raise ValueError(f"--only {args.only!r}: no configuration of --full has this in its title")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model:
        from .step import profile

        batch, length, rounds = (getattr(args, name) or default for name, default in _OF_STEP.items())
        step = profile(args.model, batch, length, rounds, say)
        say(report.step_table(step))
        say(report.step_advice(step))
        write({"machine": machine(), **step}, args.out, "step.json")
        report.step_chart(step, args.out / "step.png")
        say(f"wrote {args.out / 'step.json'} and {args.out / 'step.png'}")
        return
    path, by_config = args.out / "bench.json", dict[Config, dict[str, Any]]()
    here = {k: v for k, v in machine().items() if k != "threads"} | _rivals()  # threads are the configuration's
    if args.resume and path.exists():
        by_config = _earlier(path, here)
    try:
        for i, c in enumerate(configs, 1):
            if c in by_config:
                continue
            say(f"{i} of {len(configs)}: {c.title}")
            by_config[c] = {"machine": here, **measure(c, say)}
            # the file is written after each, so that nothing is lost
            write({"unit": "ms", "results": list(by_config.values())}, args.out, path.name)
    except KeyboardInterrupt:
        say(f"ended after {len(by_config)}; --resume goes on")
    results = list(by_config.values())
    if not results:
        return
    report.chart(_for_chart(results), args.out / "bench.png")
    for ratio in report.ratios(results):
        say(str(ratio))
    say(report.advice(results))
    say(f"wrote {path} and {args.out / 'bench.png'}")


def _earlier(path: Path, here: dict[str, Any]) -> dict[Config, dict[str, Any]]:
    """Return the results of an earlier run on this machine by configuration.

    The noisy ones are left out, because they are measured again.

    Raises:
        ValueError: the file is not a result of this version of ``dmfast bench``.
    """
    try:
        found = json.loads(path.read_text())["results"]
        found = [r for r in found if r["machine"] | {"date": ""} == here | {"date": ""}]
        by_config = {Config(**r["config"]): r for r in found}
        return {config: r for config, r in by_config.items() if not noisy(r["ms"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--resume can't read {path} as results of this version of dmfast bench "
            f"({type(error).__name__}: {error}): leave --resume out, which replaces the file, or give another --out"
        ) from error


def _rivals() -> dict[str, str]:
    """Return the versions of the rivals that are installed."""
    found = {}
    for package in ("trl", "cut-cross-entropy", "liger-kernel", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _for_chart(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first result of each form."""
    chosen: dict[str, dict[str, Any]] = {}
    for r in results:
        chosen.setdefault(r["config"]["form"], r)
    return list(chosen.values())
