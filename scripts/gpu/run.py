"""``make gpu``: builds, tests and measures on a CUDA device, in parts; a part that passed is not done again.

``run.py dry`` does the same on the host build of the kernels, small: so that the first real run dies of no typo.
``run.py again`` starts anew. Needs torch, nvcc and g++; the suite needs pytest and hypothesis too, which may lie in
build/gpu/site (``make gpu-dry`` fills it, for machines without a network).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

try:
    import torch
except ImportError:
    sys.exit(f"make gpu: {sys.executable} has no torch; name one that has it: make gpu PYTHON=/path/to/python")

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "scripts" / "gpu"
DRY = "dry" in sys.argv
WORK = ROOT / "build" / ("gpu-dry" if DRY else "gpu")
OUT = WORK / "results" if DRY else ROOT / "benchmarks" / "results" / "gpu"
SITE = ROOT / "build" / "gpu" / "site"
MOST = 600  # seconds of one call
SUITE = ["test_cuda.py", "test_kernels.py", "test_linear.py", "test_sample.py", "test_errors.py"]


def parts() -> dict[str, tuple[list[str], int]]:
    """Name -> command, and the seconds that it may take."""
    py, dry = sys.executable, ["dry"] if DRY else []
    checks = [py, str(GPU / "checks.py")]
    suite = [py, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITE]
    if DRY:
        suite += ["-k", "test_a_fault or test_the_same_three or any_shape"]
    found = {
        "build": ([py, str(GPU / "build.py"), str(WORK / "lib"), *dry], 300),
        "checks": ([*checks, *dry], 60),
        "suite": (suite, 180),
    }
    if not DRY:  # Triton needs a device; its interpreter and emulator are other proofs
        some = "vocabularies and (127 or 50257) and new or test_objectives and bf16 or special_logits and middle"
        found["triton"] = ([py, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_kernels.py", "-k", some], 60)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(sanitizer).exists() and not DRY:
        for tool in ("memcheck", "racecheck"):
            found[tool] = ([sanitizer, "--tool", tool, "--error-exitcode", "9", *checks, "few"], 60)
    elif DRY:
        found["memcheck"] = ([*checks, "few", "dry"], 60)
    else:
        print("no compute-sanitizer: memcheck and racecheck are left out")
    found["bench"] = ([py, str(GPU / "bench.py"), str(OUT), *dry], 280)
    found["report"] = ([py, str(GPU / "report.py"), str(OUT)], 30)
    return found


def key() -> str:
    """What a result holds for: the sources and the machine."""
    h = hashlib.sha256()
    for folder in ("csrc", "dmfast", "tests", "scripts/gpu"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                h.update(path.read_bytes())
    h.update((ROOT / "cuda_compiler.py").read_bytes())
    device = "dry" if DRY else torch.cuda.get_device_name(0)
    return f"{h.hexdigest()[:16]} {device} {torch.__version__} {sys.version.split()[0]}"


def run(name: str, command: list[str], limit: int) -> int:
    """The exit code; what is said goes to a file of its own, its end here."""
    paths = [str(WORK / "lib"), str(ROOT / "tests")]
    if SITE.exists() and not all(map(importlib.util.find_spec, ("pytest", "hypothesis", "mpmath"))):
        paths.append(str(SITE))  # before what is installed, so only where that lacks them: hypothesis is compiled
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "DMFAST_SYNC_CHECKS": "0", "DMFAST_GPU_KEY": key(),
    }  # fmt: skip
    if name == "memcheck":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch's pool would hide reads beyond a tensor
    if name == "triton":
        environment["DMFAST_BACKEND"] = "triton"
    if name in ("suite", "triton"):
        environment |= {"DMFAST_SYNC_CHECKS": "1", "DMFAST_TEST_DEVICE": "cpu" if DRY else "cuda"}
    log = WORK / f"{name}.log"
    cwd = ROOT / "tests" if name in ("suite", "triton") else ROOT
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own children too, or they would keep the device
            process.wait()
            file.write(f"\nended after {limit} s\n")
            code = 124
    print("\n".join(log.read_text(errors="replace").splitlines()[-25 if code else -3 :]), flush=True)
    return code


def main() -> None:
    if not DRY and not torch.cuda.is_available():
        sys.exit("make gpu: no device (torch.cuda.is_available() is False); `make gpu-dry` runs without one")
    for folder in (WORK, OUT):
        folder.mkdir(parents=True, exist_ok=True)
    state = WORK / "parts.json"
    if "again" in sys.argv:
        (OUT / "bench.json").unlink(missing_ok=True)
    done = json.loads(state.read_text()) if state.exists() and "again" not in sys.argv else {}
    here, failed, begin = key(), [], time.monotonic()
    for name, (command, limit) in parts().items():
        if done.get(name) == here and name != "report":
            print(f"{name}: passed before")
            continue
        start = time.monotonic()
        left = int(MOST - (start - begin))
        if left < 5:
            sys.exit(f"make gpu: {MOST} s are over before {name}; the same command goes on")
        code = run(name, command, min(limit, left))
        said = "passed" if code == 0 else "cut off, run again" if code == 124 and left < limit else f"FAILED ({code})"
        print(f"{name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
        if code == 0:
            done[name] = here
            state.write_text(json.dumps(done, indent=1) + "\n")
        else:
            failed.append(name)
            if name == "build":
                break
    if failed:
        sys.exit(f"make gpu: failed: {', '.join(failed)}; logs in {WORK.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
