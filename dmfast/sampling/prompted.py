"""Make a sampler of a model with a prompt of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import LanguageModel, Source
from ..samples import Prompt, Samples


class Prompted:
    """A model with a prompt of its own, as a proposal for a target without that prompt: q(x) = model(x | prompt).

    The samples carry the target's context instead of this prompt, so that the target scores them as its own.

    Args:
        model: the model that draws the continuations.
        prompt: the prompt of the model, whatever the context is.
    """

    def __init__(self, model: LanguageModel, prompt: Prompt) -> None:
        self.model, self.prompt = model, prompt

    @property
    def version(self) -> int:
        """The version of the model."""
        return self.model.version

    @version.setter
    def version(self, version: int) -> None:
        self.model.version = version

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt] | None = None, n: int = 1, *, max_new_tokens: int, temperature: float = 1.0,
        seed: int | None = None, batch_size: int | None = None, first_row: int = 0,
    ) -> Samples:  # fmt: skip
        """Draw as ``LanguageModel.sample`` does. ``prompts`` holds the one context of the target; None: the empty one.

        Raises:
            ValueError: there are several prompts, or as in ``LanguageModel.sample``.
        """
        context = one_context(prompts)
        x = self.model.sample([self.prompt], n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                              batch_size=batch_size, first_row=first_row)  # fmt: skip
        return self.model.with_prompt(x, context)

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return (N,) fp64, log q(x) in nats of the continuations after this prompt."""
        return self.model.log_prob(self.model.with_prompt(samples, self.prompt), batch_size=batch_size)

    def load(self, source: Source) -> None:
        """Replace the model's parameters, as in ``LanguageModel.load``. The prompt stays."""
        self.model.load(source)


def one_context(prompts: Sequence[Prompt] | None) -> Prompt:
    """Return the only prompt, or the empty one for None.

    Raises:
        ValueError: there is no prompt, or more than one.
    """
    if prompts is not None and len(prompts) != 1:
        raise ValueError(f"a proposal with a prompt of its own serves one context at a time, got {len(prompts)}")
    return "" if prompts is None else prompts[0]
