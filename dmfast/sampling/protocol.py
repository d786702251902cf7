"""The protocol of whatever draws sequences and knows log q of them: a model of transformers or another engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..models import Source
from ..samples import Prompt, Samples


@runtime_checkable
class Sampler(Protocol):
    """A proposal q: it draws sequences, scores them and takes new parameters.

    Attributes:
        version: the number of the q that it holds, which it writes into ``Samples.version`` of all that it draws.
            ``OfflineProposal`` assigns it after each ``load``.
    """

    version: int

    def sample(
        self, prompts: Sequence[Prompt] | None = None, n: int = 1, *, max_new_tokens: int, temperature: float = 1.0,
        seed: int | None = None, batch_size: int | None = None, first_row: int = 0,
    ) -> Samples:  # fmt: skip
        """Draw n sequences of each prompt with log q, as ``LanguageModel.sample`` does."""
        ...

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return (N,) fp64, log q(x) in nats at the samples' temperature."""
        ...

    def load(self, source: Source) -> None:
        """Replace the parameters by those of a policy, or of a model that was saved into a folder: q <- pi.

        What was computed from the old ones goes with them, such as cached prompts.

        Raises:
            TypeError: this sampler has no parameters of its own that could be replaced.
            FileNotFoundError, ValueError, RuntimeError: the source does not fit. The sampler stays as it was.
        """
        ...
