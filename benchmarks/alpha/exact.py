"""Measure exactly what a policy does on a prompt, from the log-probability of each right answer.

Let s = E_pi[v] be the sum of pi over the right answers, p = a v/Z and pi_v = pi v/s. Then pass@k = 1 - (1 - s)^k.
distinct@k, the number of different right answers among k samples, is the sum over the right answers of
1 - (1 - pi(x))^k. The divergences are KL(p||pi) = -log s + KL(p||pi_v) and KL(pi_v||p). Wrong answers, well formed or
not, are not needed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from language import Pair
from torch import Tensor

KS = (1, 4, 16, 64, 256)
RARE = 0.02  # above this Z of a prompt, pass@256 of the base is nearly 1


@torch.no_grad()
def log_probs(model: Any, tokenizer: Any, pairs: Sequence[Pair], answers: Mapping[Pair, Sequence[str]]) -> list[Tensor]:
    """Return for each pair log pi of its answers, EOS included, fp64."""
    texts = [pair.prompt + answer for pair in pairs for answer in answers[pair]]
    prompt = len(pairs[0].prompt)
    ids = tokenizer.get_vocab()
    found = torch.empty(len(texts), dtype=torch.float64)
    for length in sorted({len(text) for text in texts}):  # texts of one length need no padding and no mask
        places = [i for i, text in enumerate(texts) if len(text) == length]
        for start in range(0, len(places), 2048):
            part = places[start : start + 2048]
            tokens = torch.tensor([[ids[c] for c in texts[i]] for i in part])
            logits = model(input_ids=tokens).logits[:, prompt - 1 :].double()
            end = torch.full((len(part), 1), tokenizer.eos_token_id)
            labels = torch.cat([tokens[:, prompt:], end], 1)
            found[torch.tensor(part)] = logits.log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2))
    return list(found.split([len(answers[pair]) for pair in pairs]))


def measure(log_pi: Tensor, log_a: Tensor) -> dict[str, Any]:
    """Return the measures of one prompt from log pi and log a of all its right answers."""
    s, z = float(log_pi.logsumexp(0)), float(log_a.logsumexp(0))
    log_p, log_v, pi = log_a - z, log_pi - s, log_pi.exp()
    kl_covered = float((log_p.exp() * (log_p - log_v)).sum())
    return {
        "pass": [-math.expm1(k * math.log1p(-min(math.exp(s), 1 - 1e-15))) for k in KS],
        "distinct": [float(-torch.expm1(k * torch.log1p(-pi.clamp(max=1 - 1e-15))).sum()) for k in KS],
        "kl_target_policy": kl_covered - s,
        "kl_target_right": kl_covered,
        "kl_right_target": float((log_v.exp() * (log_v - log_p)).sum()),
    }


def mean(of: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of measures over prompts, rounded to the digits that a figure shows."""
    found: dict[str, Any] = {}
    for name, first in of[0].items():
        values: Any = [each[name] for each in of]
        whole = isinstance(first, list)
        means = (
            [statistics.fmean(column) for column in zip(*values, strict=True)] if whole else statistics.fmean(values)
        )
        found[name] = [round(m, 5) for m in means] if isinstance(means, list) else round(means, 5)
    return found
