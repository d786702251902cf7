"""Compare what others state of their GPU kernels with a model of ours, and write it between the marks of docs/gpu.md.

No device is involved. The model of ``linear_dm_loss`` takes the three products at the rate that others state for them,
and then the row kernels. Each row kernel takes as long as the slower of its bytes, at the bandwidth of the data sheet,
and its instructions, as roofline.py counts them. The gradient of the head is summed in fp32 from chunk to chunk. The
traffic of this sum may be hidden behind its product, so the model is a range from wholly hidden to not hidden. Launches
and the host's reads are left out.

    python scripts/ci/stated.py [FILE WRITTEN]    checks FILE, and writes it to WRITTEN with the current figures
"""

from __future__ import annotations

import sys

import torch
from figures import Figures, kept_figures
from marked import brought_up_to_date
from roofline import CARDS, Card

from dmfast.kernels import linear

H100, H200 = (next(card for card in CARDS if card.name == name) for name in ("H100", "H200"))
DIM, VOCAB, STEPS = 4096, 128256, 512
# the three products take this many ms for a token, as stated for 8,192 tokens
PRODUCTS = 33.0 / 8192
STATED = {1024: ("4.1", "4.8"), 4096: ("16.8", "16.7"), 8192: ("35.5", "34.4")}  # tokens: (quack, liger)
LOGITS, TRL = (8192, 151936), ".89"
BF16, FP32 = 2, 4


def milliseconds(card: Card, code: Figures, logits: int, bytes_: float) -> float:
    """Return the time of a row kernel: what takes longest, its bytes or one of the multiprocessor's units."""
    counts = code.random
    each = max(bytes_ / card.bandwidth, *(card.picoseconds(unit, n) for unit, n in counts.items()))
    return each * logits / 1e9


def chunks(tokens: int) -> int:
    """Return into how many chunks of whole sequences ``linear_dm_loss`` divides so many tokens."""
    rows = linear.rows_of_buffer(VOCAB, FP32 + BF16, torch.device("cuda"), None, True)
    return -(-tokens // max(rows // STEPS * STEPS, STEPS))


def ours(codes: dict[str, Figures], tokens: int) -> str:
    """Return the milliseconds of linear_dm_loss, forward and backward, from bf16 hidden states with fp32 logits."""
    logits, head = tokens * VOCAB, DIM * VOCAB
    rows = milliseconds(H200, codes["score_rows<fp32>"], logits, FP32)
    rows += milliseconds(H200, codes["write_rows<fp32 -> bf16>"], logits, FP32 + BF16)
    least = PRODUCTS * tokens + rows
    n = chunks(tokens)
    # each chunk writes the sum and all but the first read it, and then it is rounded, where a product alone would write
    # bf16
    more = 0 if n == 1 else head * (n * FP32 + (n - 1) * FP32 + FP32 + BF16 - BF16) / H200.bandwidth / 1e9
    return f"{least:.1f}" if not more else f"{least:.1f} to {least + more:.1f}"


def table() -> str:
    codes = {c.kernel: c for c in kept_figures()[0] if c.source == "CUDA" and c.arch == H100.arch}
    lines = [f"| H200, bf16, D {DIM}, V {VOCAB}, forward and backward | quack | liger, CuTe | three products | "
             "`linear_dm_loss`, model |", "|---|---|---|---|---|"]  # fmt: skip
    for tokens, (quack, liger) in STATED.items():
        alone = f"{PRODUCTS * tokens:.1f}" if tokens == 8192 else f"({PRODUCTS * tokens:.1f})"
        lines.append(f"| {tokens} tokens | {quack} | {liger} | {alone} | {ours(codes, tokens)} |")
    logits = LOGITS[0] * LOGITS[1]
    score = milliseconds(H100, codes["score_rows<bf16, entropy>"], logits, BF16)
    least = logits * BF16 / H100.bandwidth / 1e9
    lines += ["", f"| H100, bf16, {LOGITS}, from logits | trl | one read | scoring with entropy, model |",
              "|---|---|---|---|", f"| log π and entropy, forward | {TRL} | {least:.2f} | {score:.2f} |"]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    """Return the exit status."""
    return brought_up_to_date("stated", f"{table()}\nThe machine code comes from {kept_figures()[1]}.\n", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
