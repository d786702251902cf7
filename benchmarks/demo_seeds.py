"""Run the demo's recipe for seeds 0, 1 and 2, and write results/demo/.

The recipe's settings were chosen on seeds from 100 on.

    python benchmarks/demo_seeds.py [--seeds 0 1 2] [--out benchmarks/results/demo]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dmfast.demo import RECIPES
from dmfast.training import recipe, report


def main() -> None:
    """Run the seeds one after the other, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as work:
            overrides = {"train.seed": seed, "train.output_dir": work, "train.disable_tqdm": True}
            log = recipe.run(recipe.read(RECIPES / "tiny_bios.yaml", overrides), say=lambda _: None)
            shutil.copy(Path(work) / "report.png", args.out / f"seed{seed}.png")
            written: dict[str, Any] = json.loads((Path(work) / "log.json").read_text())
        written["recipe"]["train"].pop("output_dir")
        report.write(written, args.out, f"seed{seed}.json")
        print(f"seed {seed}: {written['verdict']}; {log['swaps']} swaps, training {log['seconds_training']:.0f} s")


if __name__ == "__main__":
    main()
