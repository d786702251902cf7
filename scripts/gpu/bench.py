"""Run ``dmfast bench`` on the device, each configuration by worker.py in a process of its own: ``bench.py [dry]``.

bench.json is written after each configuration. A later call continues from it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import results
import torch

from dmfast.bench.measure import in_fresh_process
from dmfast.bench.report import OURS
from dmfast.bench.worker import Config

DRY = "dry" in sys.argv
HERE = Path(__file__).parent
WORKER = (f"import runpy, sys; sys.path.append({str(HERE)!r}); "
          f"runpy.run_path({str(HERE / 'worker.py')!r}, run_name='__main__')")  # fmt: skip
# in a dry run Triton's rows run in its interpreter
INTERPRETED = {"TRITON_INTERPRET": "1"} if DRY else {}
VOCABULARIES = (32000, 50257, 128256, 151936)


def configs() -> list[Config]:
    """Return the configurations: 8 sequences of 1,024 tokens, from logits, and from hidden states at D 4096.

    From hidden states there are also four times as many sequences, which should not show in the memory. The most
    informative come first. A dry run is small and on the CPU.
    """
    if DRY:
        small = {"dtype": "bfloat16", "rounds": 1, "steps": 8}
        return [Config("logits", 16, 257, **small), Config("head", 16, 257, 32, **small)]
    given = {"dtype": "bfloat16", "rounds": 7, "steps": 1024, "device": "cuda"}
    logits = [Config("logits", 8192, v, **given) for v in VOCABULARIES]
    head = [Config("head", rows, v, 4096, **given)
            for rows, v in ((8192, 50257), (32768, 50257), (8192, 128256), (8192, 32000), (8192, 151936))]  # fmt: skip
    return logits + head


def machine() -> dict[str, Any]:
    """Return the machine of the figures."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    # figures of other kernels must not be continued
    found["sources"] = os.environ.get("DMFAST_GPU_KEY")
    for package in ("triton", "liger-kernel", "cut-cross-entropy", "trl", "quack-kernels"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if not DRY:
        p = torch.cuda.get_device_properties(0)
        found |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory,
                  "multiprocessors": p.multi_processor_count, "cuda": torch.version.cuda}  # fmt: skip
    return found


def main() -> None:
    path = results.folder() / "bench.json"
    found: dict[str, Any] = {"machine": machine(), "unit": "ms", "results": [], "no_memory": []}
    earlier = results.read(path)
    if earlier is not None and earlier["machine"] == found["machine"]:
        found = earlier
    failed = False
    for c in configs():
        if asdict(c) in [r["config"] for r in found["results"]] or c.title in found["no_memory"]:
            continue
        print(c.title, flush=True)
        try:
            found["results"].append(in_fresh_process(WORKER, json.dumps(asdict(c)), environment=INTERPRETED))
            ours = [f"{k}: {v}" for k, v in found["results"][-1]["not_run"].items() if k.startswith(OURS)]
            if ours:
                print("dmfast's own did not run:", *ours, sep="\n  ", flush=True)
                failed = True
        except RuntimeError as error:
            print(error, flush=True)
            if "OutOfMemoryError" not in str(error):
                failed = True
                continue
            found["no_memory"].append(c.title)
        results.write(path, found)
    if failed:
        sys.exit("a configuration failed")


if __name__ == "__main__":
    main()
