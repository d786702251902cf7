"""Run the ``dmfast`` command.

``demo`` trains a small model, ``train`` runs a recipe, ``fit-z`` draws the pass rates of its prompts,
``serve-proposal`` starts a vLLM server that draws for a run, ``report`` compares runs, ``bench`` runs benchmarks, and
``doctor`` shows which backends run here.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any

from . import __version__

_INSTALL = "pip install 'dmfast[train]'"
_NEEDED = ("transformers", "accelerate", "safetensors", "yaml", "rich", "matplotlib")  # by demo, train and bench


def doctor() -> int:
    """Print versions, backends and missing packages, and return 1 if only the slow backend runs."""
    import numpy as np
    import torch

    from . import backends

    print(f"dmfast {__version__}, python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} threads")
    print("backends:")
    for info in backends().values():
        print(_wrapped(f"  {info.name:6} {'in use' if info.in_use else 'not in use':11} {info.detail}", 21))
    print("packages:")
    for package in ("transformers", "accelerate", "safetensors", "pyyaml", "rich", "matplotlib", "nltk", "peft"):
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "missing: " + ("for LoRA, pip install peft" if package == "peft" else _INSTALL)
        print(f"  {package:12} {found}")
    print("what dmfast needs, and its extras, each by pip install 'dmfast[NAME]':")
    for line in _extras():
        print(_wrapped(f"  {line}", 15))
    return 0 if backends()["cpu"].available else 1


def _wrapped(line: str, indent: int) -> str:
    """Return a line that is wrapped on a terminal, and left whole for a program that reads it."""
    if not sys.stdout.isatty():
        return line
    return textwrap.fill(line, shutil.get_terminal_size().columns, subsequent_indent=" " * indent)


def _extras() -> list[str]:
    """Return a line for each extra that says whether it is installed, what it would bring, and what clashes."""
    from .extras import extras

    try:
        return [f"{extra.name:12} {extra}" for extra in extras()]
    except metadata.PackageNotFoundError:
        return ["unknown: dmfast runs from its sources and is not installed, so that pip has no list of them"]
    except ModuleNotFoundError as error:
        return [f"unknown: {error}; pip install packaging"]


def report(runs: list[str], out: str) -> int:
    """Write the page that compares the runs, and return 0, or 1 if a run can't be read."""
    from .report import page, read

    try:
        html = page(read(runs))
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"dmfast report: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {len(html.encode()) / 1e6:.1f} MB")
    return 0


def _override(text: str) -> tuple[str, Any]:
    """Split ``train.max_steps=5`` into the key and its value, which is read as JSON or YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as train.max_steps=5; got {text!r}")
    from .reading import of_command_line

    try:
        return key, of_command_line(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the value of {key}: {error}") from error


def _parser(complete: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dmfast", description=(__doc__ or "").replace("``", ""))
    parser.add_argument("--version", action="version", version=f"dmfast {__version__}", help="print the version")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")

    demo = command("demo", "train a small model until half of its biographies are about women")
    train = command("train", "run a job from a YAML file")
    fit_z = command("fit-z", "write the prompts of a job with the pass rate of each under the base")
    for each in (train, fit_z):
        each.add_argument("recipe", help="the YAML file; the folder dmfast/recipes has examples")
        each.add_argument("--set", dest="overrides", type=_override, action="append", default=[], metavar="KEY=VALUE",
                          help="replaces an entry, such as train.max_steps=5, by a value in JSON or YAML, such as "
                          "'prompts=[Mary, John]'")  # fmt: skip
    fit_z.add_argument("--out", required=True, help="the .jsonl file that is written")
    fit_z.add_argument("--n", type=int, default=64, help="completions of each prompt")
    fit_z.add_argument("--seed", type=int, default=0, help="the seed of the completions")
    fit_z.add_argument("--drop-zero", action="store_true", help="leave out prompts of which no completion is right")
    train.add_argument("--out", help="the folder that the run writes into; replaces train.output_dir")
    train.add_argument("--resume", nargs="?", const=True, default=False, metavar="CHECKPOINT",
                       help="go on from a checkpoint, given by its folder or its name in the run; the newest one if "
                       "none is given")  # fmt: skip
    report = command("report", "write one HTML page that compares runs")
    report.add_argument("runs", nargs="+", metavar="RUN",
                        help="a folder with log.json (train, demo) or trainer_state.json (DMTrainer)")  # fmt: skip
    report.add_argument("--out", default="report.html", help="the file of the page")
    bench = command("bench", "time the fused losses beside other ones, or one training step of your own model")
    serve = command("serve-proposal", "start a vLLM server that draws from the proposal of a run")
    command("doctor", "show versions, backends and what is missing")
    if complete == "serve-proposal":
        from .sampling.serve import add_arguments as add_serve_arguments

        add_serve_arguments(serve)
    if complete == "demo":
        from .demo import add_demo_arguments

        add_demo_arguments(demo)
    if complete == "bench":
        from .bench.run import add_arguments

        add_arguments(bench)
    for each in commands.choices.values():
        for action in each._actions:
            given = not (action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS))
            if given and "(default" not in (action.help or ""):
                action.help = f"{action.help} (default %(default)s)"
    return parser


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show dmfast's own warnings without a file and a line, which would not be of the user's own code."""
    others, ours = warnings.formatwarning, f"{__package__}."

    def shown(message: Any, category: Any, *place: Any, **more: Any) -> str:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith(ours):
            return f"warning: {message}\n"
        return others(message, category, *place, **more)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = others


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        with _plain_warnings():
            status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as head, has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _run(argv: list[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    needed = {"demo": _NEEDED, "train": _NEEDED, "fit-z": _NEEDED, "bench": _NEEDED, "report": ("matplotlib",)}.get(
        "".join(words[:1]), ()
    )
    missing = [package for package in needed if util.find_spec(package) is None]
    if missing and not {"-h", "--help"} & set(words):
        print(f"dmfast {words[0]} needs {', '.join(missing)}: {_INSTALL}", file=sys.stderr)
        return 1
    rest: list[str] = []
    if words[:1] == ["serve-proposal"] and "--" in words:  # argparse would look for its own options there
        cut = words.index("--")
        words, rest = words[:cut], words[cut + 1 :]
    args = _parser("" if missing else "".join(words[:1])).parse_args(words)
    if args.command == "doctor":
        return doctor()
    if args.command == "demo":
        from .demo import demo

        try:
            demo(args)
        except (ValueError, OSError, ImportError) as error:
            print(f"dmfast demo: {error}", file=sys.stderr)
            return 1
        return 0
    if args.command == "report":
        return report(args.runs, args.out)
    if args.command == "serve-proposal":
        from .sampling.serve import serve

        args.vllm = rest
        try:
            serve(args)
        except (ValueError, OSError) as error:
            print(f"dmfast serve-proposal: {error}", file=sys.stderr)
            return 1
    from .demo import console

    if args.command == "bench":
        from .bench.run import bench

        try:
            bench(args, console().print)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"dmfast bench: {error}", file=sys.stderr)
            return 1
        return 0
    from accelerate import PartialState

    from .training import recipe

    sys.path.insert(0, os.getcwd())  # so that the user's own scorers are found
    overrides = dict(args.overrides)
    if args.command == "train" and args.out:
        overrides["train.output_dir"] = args.out
    try:
        asked = recipe.read(args.recipe, overrides)
        if args.command == "fit-z":
            recipe.fit_z(asked, args.out, n=args.n, seed=args.seed, drop_zero=args.drop_zero, say=console().print)
        else:
            recipe.run(asked, resume=args.resume, say=console().print)
    except (ValueError, OSError, ImportError) as error:
        print(f"dmfast {args.command}: {error}", file=sys.stderr)
        return 1
    PartialState().destroy_process_group()  # torch warns if a process ends with a process group
    return 0
