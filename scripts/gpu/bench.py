"""The configurations of ``make gpu``, each by dmfast.bench.worker in a process of its own; go on where they ended.

``bench.py OUT [dry]`` writes OUT/bench.json after each; report.py makes a table and a picture of it.
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

import torch

from dmfast.bench.measure import in_fresh_process
from dmfast.bench.worker import Config

DRY = "dry" in sys.argv
VOCABULARIES = (32000, 50257, 128256, 151936)


def configs() -> list[Config]:
    """8 sequences of 1,024 tokens: from logits, and from hidden states at D 4096. Dry: small and on the CPU."""
    if DRY:
        return [Config("logits", 16, 257, dtype="bfloat16", rounds=1, steps=8),
                Config("head", 16, 257, 32, "bfloat16", rounds=1, steps=8)]  # fmt: skip
    rows = {"dtype": "bfloat16", "rounds": 7, "steps": 1024, "device": "cuda"}
    logits = [Config("logits", 8192, v, **rows) for v in VOCABULARIES]
    return logits + [Config("head", 8192, v, 4096, **rows) for v in (50257, 128256)]


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found["sources"] = os.environ.get("DMFAST_GPU_KEY")  # figures of other kernels are not gone on with
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
    path = Path(sys.argv[1]) / "bench.json"
    here, results = machine(), []
    if path.exists():
        earlier = json.loads(path.read_text())
        results = earlier["results"] if earlier["machine"] == here else []
    failed = False
    for c in configs():
        if asdict(c) in [r["config"] for r in results]:
            continue
        print(c.title, flush=True)
        try:
            results.append(in_fresh_process("from dmfast.bench.worker import main; main()", json.dumps(asdict(c))))
        except RuntimeError as error:  # the next one may have room
            print(error, flush=True)
            failed = True
            continue
        path.write_text(json.dumps({"machine": here, "unit": "ms", "results": results}, indent=1) + "\n")
    if failed:
        sys.exit("a configuration failed")


if __name__ == "__main__":
    main()
