"""OUT/bench.json -> OUT/bench.md and, where matplotlib is, OUT/bench.png: ``report.py OUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# reads and writes of a logit by each, as declared: docs/gpu.md
TRAFFIC = {
    "roof: read-sum": 1, "roof: in-place mul_": 2, "roof: copy_": 2, "scoring: sequence_log_prob": 1,
    "dm_loss gdc++, in place": 3, "dm_loss gdc++": 3, "dm_loss dpg (known weight), in place": 2,
    "scoring: sequence_log_prob (Triton)": 1, "dm_loss gdc++, in place (Triton)": 3,
    "dm_loss dpg (known weight), in place (Triton)": 3,
}  # fmt: skip


def bandwidth(result: dict[str, Any], name: str) -> float | None:
    """GB/s that a line's declared traffic comes to; known weights count 2 whether or not the row was kept."""
    c = result["config"]
    if c["form"] != "logits" or name not in TRAFFIC:
        return None
    size = {"float32": 4, "bfloat16": 2}[c["dtype"]]
    return float(TRAFFIC[name] * c["rows"] * c["vocab"] * size / result["ms"][name]["median"] / 1e6)


def table(result: dict[str, Any]) -> str:
    """Markdown; the roofs first, then the fastest."""
    lines = [f"### {result['title']}", "", "| | ms | quartiles | GB/s | of copy_ | peak memory, MB | gradient off |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    copy = bandwidth(result, "roof: copy_") if "roof: copy_" in result["ms"] else None
    for name, t in sorted(result["ms"].items(), key=lambda x: (not x[0].startswith("roof"), x[1]["median"])):
        rate, memory = bandwidth(result, name), result.get("memory_mb", {}).get(name)
        error = result["gradient_error"].get(name)
        cells = [
            name, f"{t['median']:.3f}", f"{t['low']:.3f} – {t['high']:.3f}", "" if rate is None else f"{rate:.0f}",
            "" if rate is None or copy is None else f"{rate / copy:.0%}", "" if memory is None else f"{memory:.0f}",
            "" if error is None else f"{error:.1g}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\nnot run: {name}: {why}" for name, why in result["not_run"].items()]
    return "\n".join(lines)


def memory_by_batch(results: list[dict[str, Any]]) -> list[str]:
    """Peaks of linear_dm_loss for batches of more than one size, beside what the gradients take that it returns."""
    said, peaks = [], {}
    for r in results:
        c, memory = r["config"], r.get("memory_mb", {}).get("linear_dm_loss gdc++")
        if c["form"] == "head" and memory is not None:
            gradients = (c["rows"] + c["vocab"]) * c["dim"] * {"float32": 4, "bfloat16": 2}[c["dtype"]] / 2**20
            peaks.setdefault((c["vocab"], c["dim"]), []).append((c["rows"], memory, memory - gradients))
    for (vocab, dim), found in peaks.items():
        if len(found) > 1:
            each = "; ".join(f"{rows} tokens: {peak:.0f} MB, {rest:.0f} beside gradients" for rows, peak, rest in found)
            said.append(f"linear_dm_loss, V {vocab}, D {dim}: {each}")
    return said


def main() -> None:
    out = Path(sys.argv[1])
    found = json.loads((out / "bench.json").read_text())
    head = ", ".join(f"{k} {v}" for k, v in found["machine"].items() if v is not None)
    parts = [head, *(table(result) for result in found["results"]), *memory_by_batch(found["results"])]
    parts += [f"not run: {title}: the device has too little memory" for title in found["no_memory"]]
    text = "\n\n".join(parts) + "\n"
    (out / "bench.md").write_text(text)
    print(text)
    try:
        from dmfast.bench.report import chart
    except ImportError as error:
        print(f"no picture ({error}); report.py draws it from the JSON where matplotlib and transformers are")
        return
    chart(found["results"], out / "bench.png")


if __name__ == "__main__":
    main()
