"""What a model is now, from fresh samples of itself: E_pi[phi], KL(pi||a) and KL(p||pi)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..estimators import Estimate, PartitionFunctions, estimate, estimate_moments
from ..models import LanguageModel, Prompt, Samples
from ..targets import EBM


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    target: EBM,
    prompts: Sequence[Prompt] | None = None,
    n: int = 512,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    first_row: int = 0,
    gather: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Samples, dict[str, Estimate]]:
    """Draws ``n`` sequences per prompt from ``model`` and says what they are like.

    Args:
        model: pi. target: its moments and monitored features are the phi, its base is a.
        prompts, max_new_tokens, temperature, seed, batch_size, first_row: as in ``LanguageModel.sample``.
        gather: in distributed training, puts the values of all ranks together.

    Returns:
        The samples (of this rank), and with standard errors ``phi/<feature>``, ``kl_policy_base`` (KL(pi||a), nats),
        ``kl_policy`` (KL(p||pi), nats; with Z from these samples), ``length`` (scored tokens) and ``finished`` (the
        share that ended in EOS).
    """
    x = model.sample(
        prompts, n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size,
        first_row=first_row,
    )  # fmt: skip
    log_base = target.base.log_prob(x, batch_size=batch_size)
    scores = target.score(x, log_base)
    names = [*(f"phi/{name}" for name in (*target.moment_names, *target.monitor_names)), "kl_policy_base", "length",
             "finished"]  # fmt: skip
    last = x.tokens.gather(1, x.score_mask.long().cumsum(1).argmax(1, keepdim=True))[:, 0]
    finished = torch.isin(last, torch.tensor(model.eos_token_ids, device=last.device))
    one_each = torch.stack([x.log_prob - log_base, x.score_mask.sum(1).double(), finished.double()], 1)
    columns = gather(torch.cat([scores.features, scores.monitored, one_each], 1))
    found = dict(zip(names, estimate_moments(columns, torch.zeros_like(columns[:, 0])), strict=True))
    contexts, log_target, log_prob = gather(x.context_id), gather(scores.log_target), gather(x.log_prob)
    log_z = PartitionFunctions().updated(contexts, log_target, log_prob).log_z(contexts)
    found["kl_policy"] = estimate(log_prob, log_prob, log_target, log_z).kl_policy
    return x, found
