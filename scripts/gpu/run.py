"""``make gpu``: builds, tests and measures on a CUDA device, in parts; a part that passed is not done again, nor the
tests and configurations that one had behind it when it was cut off.

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
from typing import NamedTuple

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
SUITE = ["test_cuda.py", "test_kernels.py", "test_shards.py", "test_linear.py", "test_sample.py", "test_errors.py"]


class Part(NamedTuple):
    """One process of the run."""

    command: list[str]
    limit: int  # seconds
    kept: bool = False  # cut off, it goes on where it was
    control: list[str] | None = None  # of a sanitizer: what it must find nothing in, or it can't be used here


def parts() -> dict[str, Part]:
    """By name, in order."""
    py, dry = sys.executable, ["dry"] if DRY else []
    checks = [py, str(GPU / "checks.py")]
    pytest = [py, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "passed", "-o", "faulthandler_timeout=100"]
    # what never touches the device: 40 s of a processor
    some = "not formula and not whatever_the_threads and not number_of_threads"
    if DRY:
        some = "test_a_fault or test_the_same_three or any_shape"
    found = {
        "build": Part([py, str(GPU / "build.py"), str(WORK / "lib"), *dry], 300),
        "checks": Part([*checks, *dry], 60),
        "suite": Part([*pytest, *SUITE, "-k", some], 180, kept=True),
    }
    if not DRY:  # Triton needs a device; its interpreter and emulator are other proofs
        some = "vocabularies and (127 or 50257) and new or test_objectives and bf16 or special_logits and middle"
        found["triton"] = Part([*pytest, "test_kernels.py", "-k", some], 60, kept=True)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if DRY:
        found["memcheck"] = Part([*checks, "few", "dry"], 60, control=[py, "-c", "print('ERROR SUMMARY: 0 errors')"])
        found["racecheck"] = Part([py, "-c", "1 / 0"], 60, control=[py, "-c", "print('Device not supported')"])
    elif Path(sanitizer).exists():
        for tool in ("memcheck", "racecheck"):
            # of memcheck alone: errors of calls, of which torch tries some that may fail
            quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
            watch = [sanitizer, "--tool", tool, *quiet, "--error-exitcode", "9", py]
            alone = "import torch; print(torch.ones(8, device='cuda').sum().item())"
            found[tool] = Part([*watch, *checks[1:], "few"], 60, control=[*watch, "-c", alone])
    else:
        print("memcheck, racecheck: not run, there is no compute-sanitizer")
    found["bench"] = Part([py, str(GPU / "bench.py"), str(OUT), *dry], 280, kept=True)
    found["report"] = Part([py, str(GPU / "report.py"), str(OUT)], 30)
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


def environment(name: str) -> dict[str, str]:
    """Of a part."""
    paths = [str(WORK / "lib"), str(ROOT / "tests")]
    if SITE.exists() and not all(map(importlib.util.find_spec, ("pytest", "hypothesis", "mpmath"))):
        paths.append(str(SITE))  # before what is installed, so only where that lacks them: hypothesis is compiled
    found = {**os.environ, "DMFAST_SYNC_CHECKS": "0", "DMFAST_GPU_KEY": key()}
    if name == "memcheck":
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch's pool would hide reads beyond a tensor
    if name == "triton":
        found["DMFAST_BACKEND"] = "triton"
    if name in ("suite", "triton"):
        paths.append(str(GPU))  # passed.py
        found |= {"DMFAST_SYNC_CHECKS": "1", "DMFAST_TEST_DEVICE": "cpu" if DRY else "cuda",
                  "DMFAST_GPU_PASSED": str(WORK / f"{name}.passed")}  # fmt: skip
    return {**found, "PYTHONPATH": os.pathsep.join(paths)}


def run(name: str, command: list[str], limit: float, log: Path) -> int:
    """The exit code."""
    cwd = ROOT / "tests" if name in ("suite", "triton") else ROOT
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment(name), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own children too, or they would keep the device
            process.wait()
            file.write(f"\nended after {limit:.0f} s\n")
            return 124


def end_of(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def unusable(name: str, part: Part) -> str | None:
    """Why a sanitizer can't be used here: it refuses the device, or complains of torch alone."""
    assert part.control is not None
    log = WORK / f"{name}.control.log"
    code, text = run(name, part.control, part.limit, log), log.read_text(errors="replace")
    if code == 0 and "SUMMARY: 0" in text and "not supported" not in text:
        return None
    return f"the sanitizer can't watch torch alone on this device (exit {code}):\n{end_of(log, 5)}"


def main() -> None:
    if not DRY and not torch.cuda.is_available():
        sys.exit("make gpu: no device (torch.cuda.is_available() is False); `make gpu-dry` runs without one")
    for folder in (WORK, OUT):
        folder.mkdir(parents=True, exist_ok=True)
    state = WORK / "parts.json"
    if "again" in sys.argv:
        for old in (OUT / "bench.json", state, *WORK.glob("*.passed")):
            old.unlink(missing_ok=True)
    done = json.loads(state.read_text()) if state.exists() else {}
    here, failed, not_run, begin = key(), [], [], time.monotonic()
    for name, part in parts().items():
        if done.get(name) == here and name != "report":
            print(f"{name}: passed before")
            continue
        start = time.monotonic()
        if MOST - (start - begin) < 5:
            sys.exit(f"make gpu: {MOST} s are over before {name}; the same command goes on")
        if part.control is not None and (why := unusable(name, part)):
            print(f"{name}: not run, {why}", flush=True)
            not_run.append(name)
            continue
        left = MOST - (time.monotonic() - begin)
        log = WORK / f"{name}.log"
        code = run(name, part.command, min(part.limit, left), log)
        print(end_of(log, 25 if code else 3), flush=True)
        cut = code == 124 and (part.kept or left < part.limit)
        said = "passed" if code == 0 else "cut off, the same command goes on" if cut else f"FAILED ({code})"
        print(f"{name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
        if code == 0:
            done[name] = here
            state.write_text(json.dumps(done, indent=1) + "\n")
        else:
            failed.append(name)
            if name == "build":
                break
    if not_run:
        print(f"make gpu: not run: {', '.join(not_run)}")
    if failed:
        sys.exit(f"make gpu: failed or cut off: {', '.join(failed)}; logs in {WORK.relative_to(ROOT)}")
    if DRY and not_run != ["racecheck"]:
        sys.exit("make gpu-dry: a sanitizer that refuses the device was taken for one that found nothing")


if __name__ == "__main__":
    main()
