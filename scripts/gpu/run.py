"""``make gpu`` and ``make gpu-rivals``: what to do on a machine with a CUDA device, in parts, the most telling first.

    run.py [gpu | rivals] [--only PART,PART] [--out FOLDER] [--dry] [--again]

Each part is a process, and what it found is in the folder as soon as it has found it: --out, else $OUT, else
benchmarks/results/gpu. All of them have DMFAST_GPU_SECONDS together (480): a part may take what its limit says and what
is left, and one for which too little is left is skipped, with the reason. One that fails stops only those that need it.
What passed is not done again by the next call, nor the tests that a part had behind it when it was cut off; --again
starts anew. --only does these parts, after machine and build. --dry does the same on the host build of the kernels,
small, so that the first real run dies of no typo.

Needs torch, nvcc and g++; the suite needs pytest, hypothesis and mpmath too, which may lie in build/gpu/site
(``make gpu-dry`` fills it, for machines without a network). PYTHONPATH is kept, behind what was built.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import results

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "scripts" / "gpu"
SITE = ROOT / "build" / "gpu" / "site"
SECONDS = 480.0
PATIENCE = 4  # a dry run's limits are so many times those of a device: it may share its processors
LAST = 4.0  # seconds kept for the summary
LOG = 2**20  # bytes of a part's output that the log keeps
SUITE = ["test_cuda.py", "test_kernels.py"]
MORE = ["test_linear.py", "test_sample.py", "test_shards.py", "test_errors.py"]
TESTS = ("suite", "triton", "more")
CUDA = Path("/usr/local/cuda/bin")  # whose tools are not always on PATH
# What parts write. With parts.json, summary.md and log.txt these are all: a machine that is lent may send back eight.
FILES = {"gpu": ("machine.json", "times.json", "counters.json", "head.json"),
         "rivals": ("machine.json", "rivals.json", "bench.json")}  # fmt: skip
# To be ended as one, but no session, which would outlive a run that is killed; Python 3.10 has no other way.
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


class Part(NamedTuple):
    """One process of the run."""

    command: list[str]
    limit: float  # seconds that it may take
    least: float  # seconds without which it is not begun
    needs: tuple[str, ...] = ("build",)
    control: list[str] | None = None  # of a sanitizer: what it must find nothing in, or it can't be used here
    missing: str | None = None  # why it can't run here at all


@dataclass
class Outcome:
    """What became of a part; ``not begun`` and ``running`` are what a run that was killed leaves."""

    name: str
    status: str = "not begun"
    seconds: float = 0.0
    why: str = ""


def copy(path: Path, to: Path) -> None:
    """Copy a file, if there is one, into a folder, where it is whole at any time."""
    if path.exists():
        results.write_text(to / path.name, path.read_text())


class Run:
    """Where a run keeps what."""

    def __init__(self, command: str, out: Path, dry: bool) -> None:
        self.out, self.dry, self.files = out.resolve(), dry, FILES[command]
        self.work = ROOT / "build" / ("gpu-dry" if dry else "gpu")
        self.state = self.work / "parts.json"
        self.kept = self.work / "results"  # a copy, for the next call, whose folder may be empty
        self.log = self.out / "log.txt"
        self.key = key(dry)

    def begin(self, again: bool) -> dict[str, str]:
        """Make the folders, put in what earlier calls found for these sources on this device, and return which parts
        passed."""
        done = {} if again else results.read(self.state) or {}
        done = {name: k for name, k in done.items() if k == self.key}
        if not done:
            for old in (self.kept, self.state, *self.work.glob("*.passed")):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        for folder in (self.work, self.out, self.kept):
            folder.mkdir(parents=True, exist_ok=True)
        if not (self.work / "lib").exists():
            done.pop("build", None)
        for name in self.files:
            copy(self.kept / name, self.out)
        self.log.write_text("")
        return done

    def end_part(self, done: dict[str, str]) -> None:
        """Keep what there is for the next call."""
        for name in self.files:
            copy(self.out / name, self.kept)
        results.write(self.state, done)


def parts(dry: bool, work: Path) -> dict[str, dict[str, Part]]:
    """Return the parts of each command by name, in order."""
    py, also = sys.executable, ["dry"] if dry else []

    def script(name: str, *arguments: str) -> list[str]:
        return [py, str(GPU / f"{name}.py"), *arguments, *also]

    pytest = [py, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "passed", "-o", "faulthandler_timeout=100"]
    # left out is what never touches the device: 40 s of a processor
    some = "not formula and not whatever_the_threads and not number_of_threads"
    triton = "vocabularies and (127 or 50257) and new or test_objectives and bf16 or special_logits and middle"
    if dry:
        some = "test_a_fault or test_the_same_three or any_shape"
    first = {
        "machine": Part(script("machine"), 60, 10, ()),
        "build": Part(script("build", str(work / "lib")), 240, 30, ()),
    }
    on_triton = Part([*pytest, "test_kernels.py", "test_triton.py", "-k", f"{triton} or test_triton"], 90, 20, ())
    if dry:  # its interpreter and emulator are other proofs
        on_triton = on_triton._replace(missing="Triton needs a device")
    found = {
        "gpu": {
            **first,
            "checks": Part(script("checks"), 60, 10),
            "times": Part(script("times"), 90, 15),
            "counters": Part(script("counters"), 90, 25),
            "suite": Part([*pytest, *SUITE, "-k", some], 150, 20),
            "head": Part(script("head"), 60, 15),
            "triton": on_triton,
            **sanitizers(dry, script("checks", "few")),
            "more": Part(
                [*pytest, *MORE, "-k", some], 150, 20, missing="a dry run of suite says as much" if dry else None
            ),
        },
        "rivals": {
            **first,
            "rivals": Part(script("rivals"), 400, 30),
            "bench": Part(script("bench"), 300, 30),
        },
    }
    more = PATIENCE if dry else 1
    return {name: {n: p._replace(limit=more * p.limit) for n, p in some.items()} for name, some in found.items()}


def sanitizers(dry: bool, checks: list[str]) -> dict[str, Part]:
    """Return memcheck and racecheck. Dry: stand-ins for one that works and one that refuses the device."""
    py = sys.executable
    if dry:
        works, refuses = (
            [py, "-c", f"print('{said}')"] for said in ("ERROR SUMMARY: 0 errors", "Device not supported")
        )
        return {
            "memcheck": Part(checks, 60, 10, control=works),
            "racecheck": Part([py, "-c", "1 / 0"], 60, 5, control=refuses),
        }
    tool = shutil.which("compute-sanitizer") or str(CUDA / "compute-sanitizer")
    missing = None if Path(tool).exists() else f"there is no compute-sanitizer on PATH or in {CUDA}"
    found = {}
    for name in ("memcheck", "racecheck"):
        # of memcheck alone: errors of calls, of which torch tries some that may fail
        quiet = ["--report-api-errors", "no"] if name == "memcheck" else []
        watch = [tool, "--tool", name, *quiet, "--error-exitcode", "9"]
        alone = [*watch, py, "-c", "import torch; print(torch.ones(8, device='cuda').sum().item())"]
        found[name] = Part([*watch, *checks], 60, 20, control=alone, missing=missing)
    return found


def key(dry: bool) -> str:
    """Return what a result holds for: the sources and the machine."""
    import torch

    h = hashlib.sha256()
    for folder in ("csrc", "dmfast", "tests", "scripts/gpu"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                h.update(path.read_bytes())
    h.update((ROOT / "cuda_compiler.py").read_bytes())
    device = "dry" if dry else torch.cuda.get_device_name(0)
    return f"{h.hexdigest()[:16]} {device} {torch.__version__} {sys.version.split()[0]}"


def environment(run: Run, name: str, limit: float) -> dict[str, str]:
    """Return that of a part."""
    tests = name in TESTS
    paths = [str(run.work / "lib"), str(ROOT / "tests"), *[str(GPU)] * tests]  # GPU: passed.py
    if SITE.exists() and not all(map(importlib.util.find_spec, ("pytest", "hypothesis", "mpmath"))):
        paths.append(str(SITE))  # before what is installed, so only where that lacks them: hypothesis is compiled
    if given := os.environ.get("PYTHONPATH"):
        paths.append(given)
    tools = [os.environ.get("PATH", os.defpath), *[str(CUDA)] * CUDA.exists()]
    found = {**os.environ, "PATH": os.pathsep.join(tools), "PYTHONPATH": os.pathsep.join(paths),
             "PYTHONUNBUFFERED": "1", "DMFAST_SYNC_CHECKS": "0",
             "DMFAST_GPU_KEY": run.key, "DMFAST_GPU_OUT": str(run.out), "DMFAST_GPU_WORK": str(run.work),
             "DMFAST_GPU_LIMIT": f"{limit:.0f}"}  # fmt: skip
    if name == "memcheck":
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch's pool would hide reads beyond a tensor
    if name == "triton":
        found["DMFAST_BACKEND"] = "triton"
    if tests:
        found |= {"DMFAST_SYNC_CHECKS": "1", "DMFAST_TEST_DEVICE": "cpu" if run.dry else "cuda",
                  "DMFAST_GPU_PASSED": str(run.work / f"{name}.passed")}  # fmt: skip
    return found


_running: subprocess.Popen[bytes] | None = None


def end_running() -> None:
    """End the part that runs, and its own children too, or they would keep the device."""
    if _running is not None and _running.poll() is None:
        os.killpg(_running.pid, signal.SIGKILL)
        _running.wait()


def process(run: Run, name: str, command: list[str], limit: float) -> tuple[int, str]:
    """Return the exit code, 124 where it was cut off, and what the process said, which is in the log as it is said."""
    global _running
    with run.log.open("ab") as file:
        file.write(f"\n=== {name}\n".encode())
        file.flush()
        start = file.tell()
        cwd = ROOT / "tests" if name in TESTS else ROOT
        _running = subprocess.Popen(command, cwd=cwd, env=environment(run, name, limit), stdin=subprocess.DEVNULL,
                                    stdout=file, stderr=subprocess.STDOUT, **OWN_GROUP)  # fmt: skip
        try:
            code = _running.wait(limit)
        except subprocess.TimeoutExpired:
            end_running()
            code = 124
    return code, shortened(run.log, start)


def shortened(log: Path, start: int) -> str:
    """Return the log from a place on, after cutting out its middle if that is too long to be sent home."""
    with log.open("rb+") as file:
        file.seek(start)
        said = file.read()
        if len(said) > LOG:
            cut = f"\n... {len(said) - LOG} bytes left out ...\n".encode()
            said = said[: LOG // 4] + cut + said[-(LOG - LOG // 4) :]
            file.seek(start)
            file.write(said)
            file.truncate()
    return said.decode(errors="replace")


def end_of(text: str, lines: int) -> str:
    """Return the last lines."""
    return "\n".join(text.splitlines()[-lines:])


def unusable(run: Run, name: str, part: Part, limit: float) -> str | None:
    """Return why a sanitizer can't be used here: it refuses the device, or complains of torch alone."""
    assert part.control is not None
    code, text = process(run, name, part.control, limit)
    if code == 0 and "SUMMARY: 0" in text and "not supported" not in text:
        return None
    return f"the sanitizer can't watch torch alone on this device (exit {code}): {end_of(text, 3)}"


def skipped(part: Part, outcomes: dict[str, Outcome], left: float, total: float) -> str | None:
    """Return why a part is not begun, if it is not."""
    if part.missing:
        return part.missing
    for need in part.needs:
        if outcomes[need].status != "passed":
            return f"{need} has not passed"
    if left < part.least:
        return f"{max(left, 0):.0f} s of {total:.0f} are left, and it takes {part.least:.0f} at least"
    return None


def page(out: Path) -> str:
    """Return the summary; a fault of it must not cost the parts to come."""
    import report

    try:
        return report.summary(out)
    except Exception as error:
        return f"# No summary\n\n{type(error).__name__}: {error}\n\nWhat was found is in the JSON files.\n"


def go(
    run: Run, command: str, wanted: dict[str, Part], total: float, done: dict[str, str], begin: float
) -> list[Outcome]:
    """Run the parts, in order, and leave after each one what became of all of them."""
    outcomes = {name: Outcome(name) for name in wanted}

    def tell() -> None:
        said = {"command": command, "dry": run.dry, "seconds": total, "key": run.key,
                "parts": [asdict(x) for x in outcomes.values()]}  # fmt: skip
        results.write(run.out / "parts.json", said)
        results.write_text(run.out / "summary.md", page(run.out))

    for name, part in wanted.items():
        outcome, start = outcomes[name], time.monotonic()
        if done.get(name) == run.key:
            outcome.status, outcome.why = "passed", "by an earlier call"
            continue
        left = total - LAST - (start - begin)
        why = skipped(part, outcomes, left, total)
        if why is None and part.control is not None:
            outcome.status = "running"
            tell()
            why = unusable(run, name, part, min(part.limit, left))
            left = total - LAST - (time.monotonic() - begin)
        if why is not None:
            outcome.status, outcome.why = "skipped", why
        else:
            outcome.status = "running"
            tell()
            code, text = process(run, name, part.command, min(part.limit, left))
            outcome.status = "passed" if code == 0 else "cut off" if code == 124 else "failed"
            outcome.why = {0: "", 124: f"after {min(part.limit, left):.0f} s"}.get(
                code, f"exit {code}: {end_of(text, 1)}"
            )
            print(end_of(text, 3 if code == 0 else 25), flush=True)
            if code == 0:
                done[name] = run.key
        outcome.seconds = round(time.monotonic() - start, 1)
        print(f"{name}: {outcome.status}{outcome.why and f' ({outcome.why})'}, {outcome.seconds:.0f} s", flush=True)
        run.end_part(done)
        tell()
    tell()
    return list(outcomes.values())


def chosen(all_parts: dict[str, Part], only: str) -> dict[str, Part]:
    """Return the parts that were named, with the two that come before; all of them where none was."""
    names = only.split(",") if only else list(all_parts)
    if unknown := [name for name in names if name not in all_parts]:
        sys.exit(f"make gpu: there is no part {', '.join(unknown)}; there are {', '.join(all_parts)}")
    return {name: part for name, part in all_parts.items() if name in (*names, "machine", "build")}


def seconds(dry: bool = False) -> float:
    """Return the total limit."""
    given = os.environ.get("DMFAST_GPU_SECONDS", "")
    try:
        found = float(given) if given else SECONDS * (PATIENCE if dry else 1)
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        sys.exit(f"make gpu: DMFAST_GPU_SECONDS must be a positive number of seconds, got {given!r}")
    return found


def folder(command: str, named: Path | None, dry: bool) -> Path:
    """Return where results go."""
    if named is not None or os.environ.get("OUT"):
        return named or Path(os.environ["OUT"])
    base = ROOT / "build" / "gpu-dry" / "out" if dry else ROOT / "benchmarks" / "results" / "gpu"
    return base / "rivals" if command == "rivals" else base


def stopped(number: int, frame: Any) -> NoReturn:
    """End on a signal: what was found so far is there."""
    end_running()
    sys.exit(f"make gpu: ended by signal {number}")


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(usage="run.py [gpu | rivals] [--only PART,PART] [--out FOLDER] [--dry] [--again]")
    parser.add_argument("command", nargs="?", default="gpu", choices=("gpu", "rivals"))
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    total = seconds(options.dry)
    try:
        import torch
    except ImportError:
        sys.exit(f"make gpu: {sys.executable} has no torch; name one that has it: make gpu PYTHON=/path/to/python")
    if not options.dry and not torch.cuda.is_available():
        sys.exit("make gpu: no device (torch.cuda.is_available() is False); `make gpu-dry` runs without one")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stopped)
    run = Run(options.command, folder(options.command, options.out, options.dry), options.dry)
    done = run.begin(options.again)
    wanted = chosen(parts(options.dry, run.work)[options.command], options.only)
    outcomes = go(run, options.command, wanted, total, done, begin)
    print((run.out / "summary.md").read_text())
    bad = [f"{x.name} ({x.status})" for x in outcomes if x.status not in ("passed", "skipped")]
    not_run = [x.name for x in outcomes if x.status == "skipped"]
    if not_run:
        print(f"make gpu: not run: {', '.join(not_run)}")
    if bad:
        sys.exit(f"make gpu: {', '.join(bad)}; {run.out / 'log.txt'}")
    if (
        options.dry
        and not options.only
        and not_run != {"gpu": ["triton", "racecheck", "more"], "rivals": []}[options.command]
    ):
        sys.exit("make gpu-dry: what was skipped is not what a dry run skips")


if __name__ == "__main__":
    main()
