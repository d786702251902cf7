"""The ``dmfast`` command: ``demo`` trains a small real model, ``doctor`` tells what runs here and what not."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata, util


def doctor() -> int:
    """Prints versions, backends and what is missing; 1 if only the slow backend runs."""
    import numpy as np
    import torch

    from . import __version__, backends

    print(f"dmfast {__version__}, python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} threads")
    print("backends:")
    for info in backends().values():
        print(f"  {info.name:6} {'in use' if info.in_use else 'not in use':11} {info.detail}")
    print("extras:")
    for extra, packages in (("train", ("transformers", "safetensors")), ("demo", ("rich", "matplotlib"))):
        for package in packages:
            found = metadata.version(package) if util.find_spec(package) else f"missing: pip install 'dmfast[{extra}]'"
            print(f"  {package:12} {found}")
    return 0 if backends()["cpu"].available else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dmfast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo_parser = commands.add_parser("demo", help="half of the biographies about women, in a minute or two")
    commands.add_parser("doctor", help="versions, backends, what is missing")
    missing = [package for package in ("transformers", "rich", "matplotlib") if util.find_spec(package) is None]
    if not missing:
        from .demo import add_arguments

        add_arguments(demo_parser)
    args, rest = parser.parse_known_args(argv)
    if args.command == "doctor":
        return doctor()
    if missing:
        print(f"dmfast demo needs {', '.join(missing)}: pip install 'dmfast[demo]'", file=sys.stderr)
        return 1
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from .demo import run
    from .examples.custom_loop import train

    run(args, train)
    return 0
