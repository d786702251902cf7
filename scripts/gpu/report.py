"""Write what a run found as a page: summary.md of the JSON in a folder. ``report.py FOLDER`` prints it again.

It first lists the result of each part, then what the numbers decide (docs/gpu-first-run.md), then the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import results

NEAR = 1.25  # up to this many reads of a logit count as one read


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return Markdown. None is an empty cell."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = ["" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row]
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


# --- what the numbers decide --------------------------------------------------------------------------------------


def second_read(launches: list[dict[str, Any]]) -> list[str]:
    """Say of known weights whether the second read comes from memory."""
    said = []
    for x in launches:
        memory, l2 = x["reads from memory"], x["reads from L2"]
        if x["line"] != "known weight" or memory is None or l2 is None:
            continue
        where = f"{x['backend']}, V {x['vocab']}, {x['dtype']}"
        if l2 <= NEAR:
            said.append(f"{where}: the row is kept, {l2:.2f} reads a logit")
        elif memory <= NEAR:
            said.append(f"{where}: the second read comes from L2 ({l2:.2f} reads, {memory:.2f} of them from memory)")
        else:
            said.append(f"{where}: the second read comes from memory ({l2:.2f} reads, {memory:.2f} from memory)")
    return said


def launches_of_known(times: list[dict[str, Any]]) -> list[str]:
    """Say whether one or two launches are faster for a known weight, and how far it is from a copy."""
    said = []
    for x in times:
        ms = {name: line["ms"] for name, line in x.get("lines", {}).items() if "ms" in line}
        one, two, copy = ms.get("known weight"), ms.get("known weight, two launches"), ms.get("roof: copy")
        if one is None or two is None:
            continue
        better = "one launch" if one <= two else "two launches"
        beside = "" if copy is None else f"; a copy takes {copy:.3f}"
        said.append(f"{x['title']}: {better} ({one:.3f} ms against {two:.3f}{beside})")
    return said


def of_products(head: list[dict[str, Any]]) -> list[str]:
    """Say how much linear_dm_loss adds to its products."""
    said = []
    for x in head:
        ms = {name: line["ms"] for name, line in x["lines"].items() if "ms" in line}
        ours, roof = ms.get("linear_dm_loss gdc++"), ms.get("roof: its three products")
        if ours is not None and roof is not None:
            said.append(f"{x['rows']} tokens: {ours:.2f} ms, of which its products alone are {roof:.2f}")
    return said


# --- the tables ---------------------------------------------------------------------------------------------------


def of_times(times: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Return the table of the kernels' times."""
    copy = machine.get("rates", {}).get("copy", {}).get("GB/s")
    rows = []
    for x in times:
        if "not_run" in x:
            rows.append((x["title"], "", None, None, None, f"not run: {x['not_run']}"))
        for name, line in x.get("lines", {}).items():
            rate = line.get("GB/s")
            share = f"{rate / copy:.0%}" if rate and copy else None
            how = line.get("failed") or "; ".join(filter(None, (line["by"], line.get("why"))))
            rows.append((x["title"], name, line.get("ms"), rate, share, how))
    return table(("", "", "ms", "GB/s of the least traffic", "of a copy", "taken by"), rows)


def of_counters(launches: list[dict[str, Any]]) -> str:
    """Return the table of ncu's counters."""
    columns = ("reads from memory", "writes to memory", "reads from L2", "l2_hit_percent", "instructions per logit",
               "issue_percent", "dram_percent", "warps_percent", "registers")  # fmt: skip
    rows = [[f"{x['backend']} ({x['rows']}, {x['vocab']}) {x['dtype']}", x["line"], *[x[c] for c in columns]]
            for x in launches]  # fmt: skip
    return table(("", "", *columns), rows)


def of_head(head: list[dict[str, Any]]) -> str:
    """Return the table of linear_dm_loss and the figures beside it."""
    return table(("tokens", "", "ms", "peak MB", "taken by"),
                 [(x["rows"], name, line.get("ms"), line.get("peak_mb"), line.get("failed") or line["by"])
                  for x in head for name, line in x["lines"].items()])  # fmt: skip


def of_rivals(rivals: list[dict[str, Any]]) -> str:
    """Return the table of the rivals."""
    rows = []
    for x in rivals:
        if "not_run" in x:
            rows.append((x["name"], None, None, None, None, f"not run: {x['not_run']}"))
        for line in x.get("lines", []):
            rows.append((x["name"], line.get("rows") or line["what"], line["ms"], line.get("peak_mb"),
                         line.get("gradient_off"), line["by"]))  # fmt: skip
    return table(("", "tokens", "ms", "peak MB", "gradient off", "taken by"), rows)


def of_bench(bench: dict[str, Any]) -> list[str]:
    """Return a table for each configuration of bench.py, with the roofs first and then the fastest."""
    said = []
    for result in bench["results"]:
        memory, off = result.get("memory_mb", {}), result["gradient_error"]
        order = sorted(result["ms"].items(), key=lambda x: (not x[0].startswith("roof"), x[1]["median"]))
        rows = [(n, t["median"], f"{t['low']:.3f} to {t['high']:.3f}", memory.get(n), off.get(n)) for n, t in order]
        rows += [(name, None, None, None, f"not run: {why}") for name, why in result["not_run"].items()]
        said.append(f"### {result['title']}\n\n" + table(("", "ms", "quartiles", "peak MB", "gradient off"), rows))
        if result.get("with_latency"):
            said.append(f"Python's latency is in the times of {', '.join(result['with_latency'])}.")
    return said + [f"not run: {title}: the device has too little memory" for title in bench["no_memory"]]


def summary(folder: Path) -> str:
    """Return the page."""
    found = {name: results.read(folder / f"{name}.json")
             for name in ("parts", "machine", "times", "counters", "head", "rivals", "bench")}  # fmt: skip
    parts, machine = found["parts"], found["machine"] or {}
    lines = [f"# make gpu{'-rivals' * (parts['command'] == 'rivals')}"]
    if parts["dry"]:
        lines.append("A dry run: no figure on this page was taken on a GPU.")
    lines.append(", ".join(f"{k} {v}" for k, v in {**machine.get("device", {}), **machine.get("versions", {})}.items()
                           if v is not None) or "The machine is not known.")  # fmt: skip
    lines.append(
        table(("part", "", "s", ""), [(x["name"], x["status"], x["seconds"], x["why"]) for x in parts["parts"]])
    )
    rates = [(name, rate.get("GB/s", rate.get("TFLOP/s")), "TFLOP/s" if "TFLOP/s" in rate else "GB/s", rate["by"])
             for name, rate in machine.get("rates", {}).items()]  # fmt: skip
    if rates:
        lines += ["## Rates", table(("", "", "", "taken by"), rates)]
    launches = (found["counters"] or {}).get("launches", [])
    decided = second_read(launches) + launches_of_known(found["times"] or []) + of_products(found["head"] or [])
    if decided:
        lines += ["## What the numbers decide", "\n".join(f"- {x}" for x in decided)]
    if found["times"]:
        lines += ["## Kernels", of_times(found["times"], machine)]
    if found["counters"]:
        why = found["counters"].get("why")
        lines += ["## Counters", *[f"Not all of them: {why}"] * bool(why), of_counters(launches)]
    if found["head"]:
        lines += ["## From hidden states", of_head(found["head"])]
    if found["rivals"]:
        lines += ["## Rivals", of_rivals(found["rivals"])]
    if found["bench"]:
        lines += ["## dmfast bench on the device", *of_bench(found["bench"])]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
