"""Run ``make gpu`` and ``make gpu-rivals`` on a machine with a CUDA device, in parts, the most informative first.

    run.py [gpu | rivals] [--only PART,PART] [--out FOLDER] [--dry] [--again]

Each part is a process. Its results go to a folder as soon as it has them: --out, else $OUT, else
benchmarks/results/gpu. All parts together have DMFAST_GPU_SECONDS (480). A part may take its own limit or what is left,
whichever is less. If too little is left for a part, it is skipped with the reason. A part that fails stops only the
parts that need it. The next call does not repeat what passed, nor the tests that a part had finished when it was cut
off. --again starts over. --only runs the named parts after machine and build. --dry runs the same with small shapes on
the host build of the kernels, so that the first real run fails of no typo.

It needs torch, nvcc and g++. The suite also needs pytest, hypothesis and mpmath, which may be in build/gpu/site, where
``make gpu-dry`` puts them for machines without a network. PYTHONPATH is kept, after the build.
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
# a dry run may share its processors, so its limits are this many times those of a device
PATIENCE = 4
LAST = 4.0  # this many seconds are kept for the summary
LOG = 2**20  # the log keeps this many bytes of a part's output
SUITE = ["test_cuda.py", "test_kernels.py"]
MORE = ["test_linear.py", "test_sample.py", "test_shards.py", "test_errors.py"]
TESTS = ("suite", "triton", "more")
CUDA = Path("/usr/local/cuda/bin")  # its tools are not always on PATH
# Parts write these files. With parts.json, summary.md and log.txt that is all: a borrowed machine may return only
# eight.
FILES = {"gpu": ("machine.json", "times.json", "counters.json", "head.json"),
         "rivals": ("machine.json", "rivals.json", "bench.json")}  # fmt: skip
# They are ended as a group. A session would outlive a run that is killed, and Python 3.10 has no other way.
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


class Part(NamedTuple):
    """Describe one process of the run."""

    command: list[str]
    limit: float  # the seconds that it may take
    least: float  # the seconds without which it does not begin
    needs: tuple[str, ...] = ("build",)
    control: list[str] | None = None  # a command on which a sanitizer must report no error, or it is of no use here
    missing: str | None = None  # the reason why it cannot run here at all


@dataclass
class Outcome:
    """Hold the result of a part. A run that was killed leaves ``not begun`` and ``running``."""

    name: str
    status: str = "not begun"
    seconds: float = 0.0
    why: str = ""


def copy(path: Path, to: Path) -> None:
    """Copy a file, if it exists, into a folder, where it is complete at any time."""
    if path.exists():
        results.write_text(to / path.name, path.read_text())


class Run:
    """Hold the folders of a run."""

    def __init__(self, command: str, out: Path, dry: bool) -> None:
        self.out, self.dry, self.files = out.resolve(), dry, FILES[command]
        self.work = ROOT / "build" / ("gpu-dry" if dry else "gpu")
        self.state = self.work / "parts.json"
        # the next call, whose own folder may be empty, finds a copy here
        self.kept = self.work / "results"
        self.log = self.out / "log.txt"
        self.key = key(dry)

    def begin(self, again: bool) -> dict[str, str]:
        """Make the folders, and return which parts passed.

        The folders get what earlier calls found for these sources on this device.
        """
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
        """Keep the results for the next call."""
        for name in self.files:
            copy(self.out / name, self.kept)
        results.write(self.state, done)


def parts(dry: bool, work: Path) -> dict[str, dict[str, Part]]:
    """Return the parts of each command by name, in order."""
    py, also = sys.executable, ["dry"] if dry else []

    def script(name: str, *arguments: str) -> list[str]:
        return [py, str(GPU / f"{name}.py"), *arguments, *also]

    pytest = [py, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "passed", "-o", "faulthandler_timeout=100"]
    # tests that never use the device are left out, because they take 40 s of a processor
    some = "not formula and not whatever_the_threads and not number_of_threads"
    triton = "vocabularies and (127 or 50257) and new or test_objectives and bf16 or special_logits and middle"
    if dry:
        some = "test_a_fault or test_the_same_three or any_shape"
    first = {
        "machine": Part(script("machine"), 60, 10, ()),
        "build": Part(script("build", str(work / "lib")), 240, 30, ()),
    }
    on_triton = Part([*pytest, "test_kernels.py", "test_triton.py", "-k", f"{triton} or test_triton"], 90, 20, ())
    # other proofs cover Triton's interpreter and emulator
    if dry:
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
    """Return memcheck and racecheck. In a dry run, stand-ins replace one that works and one that refuses the device."""
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
        # memcheck alone reports errors of calls, some of which torch makes on purpose
        quiet = ["--report-api-errors", "no"] if name == "memcheck" else []
        watch = [tool, "--tool", name, *quiet, "--error-exitcode", "9"]
        alone = [*watch, py, "-c", "import torch; print(torch.ones(8, device='cuda').sum().item())"]
        found[name] = Part([*watch, *checks], 60, 20, control=alone, missing=missing)
    return found


def key(dry: bool) -> str:
    """Return the key for which a result holds: the sources and the machine."""
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
    """Return the environment of a part."""
    tests = name in TESTS
    # pytest finds its plugin passed.py in the folder GPU
    paths = [str(run.work / "lib"), str(ROOT / "tests"), *[str(GPU)] * tests]
    if SITE.exists() and not all(map(importlib.util.find_spec, ("pytest", "hypothesis", "mpmath"))):
        # these come before what is installed, and hypothesis is compiled, so they are used only where packages are
        # missing
        paths.append(str(SITE))
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
    """End the part that runs, and its children, which would otherwise keep the device."""
    if _running is not None and _running.poll() is None:
        os.killpg(_running.pid, signal.SIGKILL)
        _running.wait()


def process(run: Run, name: str, command: list[str], limit: float) -> tuple[int, str]:
    """Return the exit code, 124 if the process was cut off, and its output.

    The log gets the output as it is printed.
    """
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
    """Return the log from a place on. If it is too long to send home, its middle is cut out."""
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
    """Return why a sanitizer is of no use here: it refuses the device, or reports errors of torch alone."""
    assert part.control is not None
    code, text = process(run, name, part.control, limit)
    if code == 0 and "SUMMARY: 0" in text and "not supported" not in text:
        return None
    return f"the sanitizer can't watch torch alone on this device (exit {code}): {end_of(text, 3)}"


def skipped(part: Part, outcomes: dict[str, Outcome], left: float, total: float) -> str | None:
    """Return why a part does not begin, or None."""
    if part.missing:
        return part.missing
    for need in part.needs:
        if outcomes[need].status != "passed":
            return f"{need} has not passed"
    if left < part.least:
        return f"{max(left, 0):.0f} s of {total:.0f} are left, and it takes {part.least:.0f} at least"
    return None


def page(out: Path) -> str:
    """Return the summary. An error in it must not cost the parts to come."""
    import report

    try:
        return report.summary(out)
    except Exception as error:
        return f"# No summary\n\n{type(error).__name__}: {error}\n\nWhat was found is in the JSON files.\n"


def go(
    run: Run, command: str, wanted: dict[str, Part], total: float, done: dict[str, str], begin: float
) -> list[Outcome]:
    """Run the parts in order, and store the outcomes of all of them after each one."""
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
    """Return the named parts with the two that come before, or all parts if none is named."""
    names = only.split(",") if only else list(all_parts)
    if unknown := [name for name in names if name not in all_parts]:
        sys.exit(f"make gpu: there is no part {', '.join(unknown)}; there are {', '.join(all_parts)}")
    return {name: part for name, part in all_parts.items() if name in (*names, "machine", "build")}


def seconds(dry: bool = False) -> float:
    """Return the total limit in seconds."""
    given = os.environ.get("DMFAST_GPU_SECONDS", "")
    try:
        found = float(given) if given else SECONDS * (PATIENCE if dry else 1)
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        sys.exit(f"make gpu: DMFAST_GPU_SECONDS must be a positive number of seconds, got {given!r}")
    return found


def folder(command: str, named: Path | None, dry: bool) -> Path:
    """Return the folder of the results."""
    if named is not None or os.environ.get("OUT"):
        return named or Path(os.environ["OUT"])
    base = ROOT / "build" / "gpu-dry" / "out" if dry else ROOT / "benchmarks" / "results" / "gpu"
    return base / "rivals" if command == "rivals" else base


def stopped(number: int, frame: Any) -> NoReturn:
    """End on a signal, and keep what was found so far."""
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
