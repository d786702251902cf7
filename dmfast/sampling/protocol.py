"""Define the protocol of everything that draws sequences and knows their log q: a transformers model or an engine."""

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
        version: the number of the q that it holds. It writes this number into ``Samples.version`` of all its draws.
            ``OfflineProposal`` assigns it after each ``load``.
    """

    version: int

    def sample(
        self, prompts: Sequence[Prompt] | None = None, n: int = 1, *, max_new_tokens: int, temperature: float = 1.0,
        seed: int | None = None, batch_size: int | None = None, first_row: int = 0,
    ) -> Samples:  # fmt: skip
        """Draw n sequences of each prompt, with log q, as ``LanguageModel.sample`` does."""
        ...

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return (N,) fp64, log q(x) in nats at the samples' temperature."""
        ...

    def load(self, source: Source) -> None:
        """Replace the parameters by those of a policy, or of a model that was saved into a folder: q <- pi.

        Everything that was computed from the old parameters is dropped, such as cached prompts.

        Raises:
            TypeError: this sampler has no parameters of its own to replace.
            FileNotFoundError, ValueError, RuntimeError: the source does not fit. The sampler stays as it was.
        """
        ...
