"""Measure the error of log pi of long sequences that are scored from 16-bit hidden states with fp32 logits.

The truth is fp64 on the same 16-bit tensors. The error is that of log pi of the first n tokens, at its largest over n
from 512 to ``--tokens``.

    python benchmarks/long_log_prob.py [FILE]
    nice python benchmarks/long_log_prob.py --interpreter --vocab 4999 [FILE]

The second command runs the Triton kernels in Triton's interpreter, as ``make interpreter`` does, and takes minutes.
With ``PYTHONPATH`` at a host build of the CUDA kernels (scripts/ci/host_cuda.sh), the first command runs these.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

if "--interpreter" in sys.argv:  # Triton must know before it is imported, and dmfast's modules import torch, which does
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import interpreter  # noqa: F401

import torch

import dmfast
from dmfast.kernels import select
from dmfast.training.report import machine

FROM, ROWS = 512, 64


def error_of(dtype: torch.dtype, args: argparse.Namespace) -> dict[str, float]:
    """Return the largest error over the lengths, the error of a token, and the CPU time."""
    torch.manual_seed(0)
    hidden = torch.randn(1, args.tokens, args.dim).to(dtype)
    weight = (torch.randn(args.vocab, args.dim) * args.spread / args.dim**0.5).to(dtype)
    tokens = torch.randint(args.vocab, (1, args.tokens))
    wide = weight.double().t()
    exact = torch.cat([
        (h.double() @ wide).log_softmax(-1).gather(-1, token[:, None])[:, 0]
        for h, token in zip(hidden[0].split(ROWS), tokens[0].split(ROWS), strict=True)
    ])  # fmt: skip
    start = time.process_time()
    with torch.no_grad():
        out = dmfast.linear_dm_loss(
            hidden, weight, tokens, objective="reinforce", on_policy=True, reward=torch.ones(1), chunk_bytes=2**28
        )
    taken = time.process_time() - start
    of_tokens = (out.token_log_prob[0] - exact).abs()
    of_prefixes = (out.token_log_prob[0] - exact).cumsum(0)[FROM - 1 :].abs()
    return {
        f"largest error of {FROM} to {args.tokens} tokens, nats": float(of_prefixes.max()),
        "largest error of a token, nats": float(of_tokens.max()),
        "CPU seconds": round(taken, 1),
    }


def main() -> None:
    """Print the errors, and add them to FILE if one is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--interpreter", action="store_true", help="run the Triton kernels in Triton's interpreter")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--spread", type=float, default=5.7, help="the standard deviation of the logits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    backend = select(torch.empty(1)).name
    shape = {name: getattr(args, name) for name in ("tokens", "dim", "vocab", "spread")}
    for name in args.dtype:
        found = shape | error_of(getattr(torch, name), args)
        print(backend, name, found, flush=True)
        if args.file is not None:
            kept = json.loads(args.file.read_text()) if args.file.exists() else {}
            kept[f"{backend}, {name}"] = found | {"machine": machine()}
            args.file.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
