"""Take one GDC++ step in plain transformers and torch, which is what dmfast is measured against.

The step does what the existing toolkits do, as well as plain torch allows. ``generate`` draws the sequences with its KV
cache. q and a score them in batches and without gradient. Then come the policy's forward, log_softmax and gather, and
the loss of Korbak et al. 2022 (arXiv:2206.00761, section 3.3). Only ``generate`` loops over tokens in Python. The step
uses nothing of dmfast but the stopwatch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .measure import Phases


class EagerStep(Phases):
    """Hold policy, proposal q and base a as transformers models, an optimiser, and where the time goes.

    Args:
        policy, proposal, base: causal language models with dropout 0.
        bos, eos, pad: token ids; any of ``eos`` ends a sequence.
        feature: phi, a function of (N, T) tokens that returns (N,).
        lambda_: lambda of the target P = a exp(lambda phi).
        batch: the number of sequences of a step.
        length: the number of new tokens of each sequence.
    """

    def __init__(
        self, policy: Any, proposal: Any, base: Any, *, bos: int, eos: list[int], pad: int, feature: Any,
        lambda_: float, batch: int, length: int, log_z: float = 0.0, learning_rate: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.proposal, self.base = policy, proposal, base
        self.bos, self.eos, self.pad = bos, eos, pad
        self.feature, self.lambda_, self.log_z = feature, lambda_, log_z
        self.batch, self.length = batch, length
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate)

    def generate(self) -> tuple[Tensor, Tensor]:
        """Return tokens (N, 1 + T) and the mask (N, T) of what counts, which is all up to and with the first EOS."""
        prompt = torch.full((self.batch, 1), self.bos)
        settings = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=self.length, eos_token_id=self.eos,
            pad_token_id=self.pad, use_cache=True,
        )  # fmt: skip
        self.proposal.generation_config = GenerationConfig()  # the model's own settings must not act
        with torch.no_grad():
            tokens = self.proposal.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        is_eos = torch.isin(tokens[:, 1:], torch.tensor(self.eos)).long()
        mask = is_eos.cumsum(-1) - is_eos == 0
        return tokens, mask

    def log_prob(self, model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the log of the probability of each sequence, (N,)."""
        attention = torch.cat([torch.ones_like(tokens[:, :1]), mask.long()], 1)
        # The last token predicts nothing. It is left out of the input, because slicing the logits would copy them all.
        logits = model(input_ids=tokens[:, :-1], attention_mask=attention[:, :-1], use_cache=False).logits
        chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return torch.where(mask, chosen, 0.0).sum(-1)

    def __call__(self) -> float:
        """Take one step and return its loss."""
        with self.phase("sampling"):
            tokens, mask = self.generate()
        with self.phase("scoring by q"), torch.no_grad():
            log_q = self.log_prob(self.proposal, tokens, mask)
        with self.phase("scoring by a"), torch.no_grad():
            log_target = self.log_prob(self.base, tokens, mask) + self.lambda_ * self.feature(tokens[:, 1:])
        with self.phase("policy forward"):
            log_pi = self.log_prob(self.policy, tokens, mask)
            with torch.no_grad():
                weight = (log_target - self.log_z - log_q).exp() - (log_pi - log_q).exp()
            loss = -(weight * log_pi).mean()
        with self.phase("policy backward"):
            loss.backward()
        with self.phase("optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach())
