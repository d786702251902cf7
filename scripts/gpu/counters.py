"""Count bytes from memory, cache hits and instructions of the four row kernels with ncu: ``counters.py [dry]``.

ncu runs this file with ``target``, which launches each kernel once and writes down the order. The rows of ncu's table
are matched to that order by name. A dry run launches the kernels too, and reads a table without values.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import results

DRY = "dry" in sys.argv
# this part may take this many seconds
LIMIT = float(os.environ.get("DMFAST_GPU_LIMIT", "100"))
METRICS = {
    "ns": "gpu__time_duration.sum",
    "dram_read": "dram__bytes_read.sum",
    "dram_write": "dram__bytes_write.sum",
    # these are requests of multiprocessors, and not those between the halves of L2
    "l2_read_sectors": "lts__t_sectors_srcunit_tex_op_read.sum",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "instructions": "smsp__inst_executed.sum",  # these are instructions of warps
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "blocks_per_sm": "launch__occupancy_limit_shared_mem",
}
SECTOR = 32  # bytes


class Launch(NamedTuple):
    """Describe one kernel of the plan."""

    backend: str
    line: str  # the name of a line of times.py
    kernel: str
    rows: int
    vocab: int
    dtype: str


def shapes() -> list[Any]:
    """Return times.py's shapes with fewer rows, because ncu runs each kernel several times and restores its output."""
    import times

    return [x if DRY else x._replace(rows=1024) for x in times.shapes()]


def launches() -> Iterator[tuple[Launch, Any]]:
    """Yield each launch of the plan with the call that makes it, after one call of it."""
    import times
    import torch

    from dmfast import kernels

    for backend in (kernels.CUDA, kernels.TRITON):
        for shape in shapes():
            if backend.why_not(torch.device(times.DEVICE), getattr(torch, shape.dtype)):
                continue
            lines = times.lines(backend, times.problem(shape))
            for name, line in lines.items():
                if line.kernel is None:
                    continue
                line.call(0)
                yield Launch(backend.name, name, line.kernel, *shape), line.call


def target(plan: Path) -> None:
    """Launch each kernel once while the profiler records, and write the order of launches."""
    import torch

    launched = []
    for launch, call in launches():
        if DRY:
            call(1)
        else:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call(1)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        launched.append(launch._asdict())
        results.write(plan, launched)


def table(text: str) -> list[dict[str, str]]:
    """Return the rows of ncu's CSV (``--page raw``) without the text before the head and the row of units."""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith('"ID",')]
    if not heads:
        errors = [line for line in lines if line.startswith(("==ERROR==", "==WARNING=="))]
        raise ValueError("ncu printed no table: " + (" ".join(errors) or text.strip()[-300:] or "nothing"))
    found = list(csv.DictReader(line for line in lines[heads[0] :] if line.startswith('"')))
    return [row for row in found if row["ID"]]


def number(text: str | None) -> float | None:
    """Return the number in a cell, in which ncu may separate thousands, or None if ncu could not count."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def per_logit(launch: Launch, row: dict[str, str]) -> dict[str, Any]:
    """Return the counters, and their values for each logit, where 1 means all logits once."""
    size = {"float32": 4}.get(launch.dtype, 2)
    logits = launch.rows * launch.vocab
    found: dict[str, Any] = {name: number(row.get(metric)) for name, metric in METRICS.items()}
    for name, counter, one in (("reads from memory", "dram_read", logits * size),
                               ("writes to memory", "dram_write", logits * size),
                               ("reads from L2", "l2_read_sectors", logits * size / SECTOR),
                               ("instructions per logit", "instructions", logits / 32)):  # fmt: skip
        found[name] = None if found[counter] is None else round(found[counter] / one, 3)
    return {**launch._asdict(), "grid": row.get("Grid Size"), "block": row.get("Block Size"), **found}


def matched(plan: list[Launch], rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the counters of each launch.

    Raises ValueError if ncu saw other launches than the plan has, or another order.
    """
    found = []
    for i, (launch, row) in enumerate(zip(plan, rows, strict=False)):
        if launch.kernel not in row["Kernel Name"]:
            raise ValueError(f"launch {i} is {row['Kernel Name']!r} to ncu and {launch.kernel!r} in the plan")
        found.append(per_logit(launch, row))
    if len(rows) != len(plan):
        raise ValueError(f"ncu saw {len(rows)} launches, the plan has {len(plan)}")
    return found


def stand_in(plan: list[Launch]) -> str:
    """Return what ncu would print in a dry run, in which no counter has a value."""
    names = ["ID", "Kernel Name", "Block Size", "Grid Size", *METRICS.values()]
    rows = [names, [""] * len(names)]
    rows += [[str(i), f"void dmf::{x.kernel}()", "", "", *["n/a"] * len(METRICS)] for i, x in enumerate(plan)]
    return "==PROF== dry\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)


def command(log: Path, plan: Path) -> list[str]:
    """Return the command of ncu. It leaves the clocks as they are."""
    ncu = shutil.which("ncu")
    if ncu is None:
        sys.exit("there is no ncu on PATH")
    return [ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
            "--profile-from-start", "off", "--kernel-name", "regex:(score|write|sample)_rows",
            "--metrics", ",".join(METRICS.values()), "--log-file", str(log),
            sys.executable, __file__, "target", str(plan)]  # fmt: skip


def main() -> None:
    work = Path(os.environ["DMFAST_GPU_WORK"])
    plan_file, log = work / "ncu.plan.json", work / "ncu.csv"
    for old in (plan_file, log):
        old.unlink(missing_ok=True)
    run = [sys.executable, __file__, "target", str(plan_file), "dry"] if DRY else command(log, plan_file)
    said = ""
    try:
        done = subprocess.run(run, timeout=LIMIT - 5, check=False)
        if done.returncode:
            said = f"exit {done.returncode}"
    except subprocess.TimeoutExpired:
        said = f"cut off after {LIMIT - 5:.0f} s"
    plan = [Launch(**x) for x in results.read(plan_file) or []]
    text = stand_in(plan) if DRY else log.read_text(errors="replace") if log.exists() else ""
    print(text)
    path = results.folder() / "counters.json"
    try:
        rows = table(text)
        if said:  # the last launch may be in only one of the two
            plan, rows = plan[: len(rows)], rows[: len(plan)]
        found = matched(plan, rows)
    except ValueError as error:
        results.write(path, {"launches": [], "why": f"{error}{said and f' ({said})'}"})
        sys.exit(str(error))
    results.write(path, {"launches": found, **({"why": said} if said else {})})
    if said:
        sys.exit(said)


if __name__ == "__main__":
    if "target" in sys.argv:
        target(Path(sys.argv[2]))
    else:
        main()
