"""Hold sequences that were drawn from a language model, with all that the later parts need to know about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A string, token ids, or chat messages ({"role": ..., "content": ...}).
Prompt: TypeAlias = str | Sequence[int] | Tensor | Sequence[Mapping[str, Any]]

_TOKENWISE = ("tokens", "attention_mask", "score_mask")
_TENSORS = (*_TOKENWISE, "log_prob", "context_id", "version")
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def check_counts(**counts: object) -> None:
    """Check the numbers of sequences and tokens that a sampler is asked for.

    Raises:
        ValueError: a count is not an integer, or it is below 1.
    """
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be an integer, 1 or more, got {count!r:.100}")


def check_temperature(temperature: float) -> None:
    """Check the temperature of a sampler.

    Raises:
        ValueError: it is not a number, or not positive and finite.
    """
    if not (isinstance(temperature, (int, float, Real)) and 0 < temperature < float("inf")):
        raise ValueError(f"temperature must be a number, positive and finite, got {temperature!r:.100}")


@dataclass(frozen=True, eq=False)
class Samples:
    """N sequences drawn from a language model.

    Attributes:
        tokens: (N, T) int64, the prompt and then the continuation. Prompts are left-padded. Padding follows EOS.
        attention_mask: (N, T) int64, 1 on the tokens that the model reads: the prompt and the continuation up to and
            with the first EOS.
        score_mask: (N, T) bool, True on the tokens whose log-probability counts: the generated ones up to and with
            the first EOS, even if pad == eos. Context between them, such as a tool's output or another speaker's turn,
            is False (``LanguageModel.samples_of(score_mask=)``). The model reads it, and it is not scored.
        prompt_len: the padded width of the prompts.
        log_prob: (N,) fp64, log q(x) in nats under ``temperature``, as drawn. NaN where ``has_log_prob`` is False.
        context_id: (N,) int64, the number of the prompt of each sequence.
        temperature: the temperature at which the sequences were drawn and are scored.
        tokenizer: the tokenizer with which ``text`` decodes.
        pad_token_id: the token that pads ``tokens``.
        version: (N,) int64, the version of the proposal that drew each sequence. Default: 0 for all.
        rows: one mapping per sequence, the row of the data set that its prompt came from, so that a scorer sees a
            reference answer. None where the data set has prompts only.
        has_log_prob: whether log q is known. It is unknown for sequences that came from elsewhere without it
            (``LanguageModel.samples_of``). These can be scored, and the only training on them is by likelihood.
        eos_token_ids: the tokens that end a sequence, by which ``finished`` tells whether one has ended. Empty: the
            tokenizer's EOS.

    Raises:
        ValueError: the tensors or the rows are not those of N sequences.
    """

    tokens: Tensor
    attention_mask: Tensor
    score_mask: Tensor
    prompt_len: int
    log_prob: Tensor
    context_id: Tensor
    temperature: float
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    version: Tensor = None  # type: ignore[assignment]  # __post_init__ makes zeros of it
    rows: Sequence[Mapping[str, Any]] | None = None
    has_log_prob: bool = True
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2:
            raise ValueError(f"tokens must be (N, T), got the shape {tuple(self.tokens.shape)}")
        n = len(self.tokens)
        if self.version is None:
            object.__setattr__(self, "version", torch.zeros(n, dtype=torch.int64, device=self.tokens.device))
        for name in _TENSORS:
            shape, expected = getattr(self, name).shape, self.tokens.shape if name in _TOKENWISE else (n,)
            if shape != expected:
                raise ValueError(f"{name} must be {tuple(expected)}, as tokens says, got the shape {tuple(shape)}")
        if self.rows is not None:
            object.__setattr__(self, "rows", tuple(self.rows))
            if len(self.rows) != n:
                raise ValueError(f"rows must hold one row for each of {n} sequences, got {len(self.rows)}")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: slice | Tensor | Sequence[int] | Sequence[bool]) -> Samples:
        """Return some of the sequences.

        Args:
            index: a slice, an (N,) bool mask, or (M,) integers. Mask and integers may be a tensor, a list or an array.

        Raises:
            TypeError: the index is one integer, which would leave no batch, or it is not an index.
            IndexError: a mask has another length, or an integer is out of range.
        """
        if not isinstance(index, slice):
            index = self._places(index)
        rows = self.rows
        if rows is not None:
            places = range(len(self))[index] if isinstance(index, slice) else index.tolist()
            rows = [rows[i] for i in places]
        return replace(self, rows=rows, **{name: getattr(self, name)[index] for name in _TENSORS})

    def _places(self, index: Any) -> Tensor:
        """Return the (M,) int64 places that a mask or integers name."""
        if isinstance(index, (int, tuple)) or getattr(index, "shape", None) == ():
            raise TypeError(
                f"Samples are a batch and can't be indexed by {index!r}: write samples[i : i + 1] for the one sequence "
                "i, and a list, a tensor or a slice for several"
            )
        if isinstance(index, list) and not index:
            index = torch.empty(0, dtype=torch.int64)
        try:
            places = torch.as_tensor(index, device=self.tokens.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"Samples take a slice, a bool mask or integers as an index, got a {type(index).__name__}"
            ) from error
        if places.dim() != 1 or places.dtype not in (torch.bool, *_INTEGERS):
            raise TypeError(
                "Samples take a slice, a bool mask or integers of one dimension as an index, got "
                f"{places.dtype} of the shape {tuple(places.shape)}"
            )
        n = len(self)
        if places.dtype == torch.bool:
            if len(places) != n:
                raise IndexError(f"a mask of {len(places)} does not fit {n} sequences")
            return places.nonzero()[:, 0]
        if places.device.type == "cpu" and len(places) and not (-n <= int(places.min()) and int(places.max()) < n):
            raise IndexError(f"the index goes from {int(places.min())} to {int(places.max())}, beyond {n} sequences")
        return places.long()

    def check_log_prob(self, use: str) -> None:
        """Check that log q of the sequences is known.

        Args:
            use: the use that needs log q, as the subject of the error's sentence.

        Raises:
            ValueError: log q is unknown.
        """
        if not self.has_log_prob:
            raise ValueError(
                f"{use} needs log q(x) of each sequence, which these samples don't have: LanguageModel.samples_of got "
                "no log_prob. They can be scored, and trained on by likelihood"
            )

    def with_rows(self, rows: Sequence[Mapping[str, Any]] | None) -> Samples:
        """Return the samples with the row of the data set that each sequence's prompt came from.

        Args:
            rows: one row for each prompt. ``context_id`` must still be the prompt's place. None: there are no rows.
        """
        return replace(self, rows=None if rows is None else [rows[place] for place in self.context_id.tolist()])

    def across_contexts(self, n: int) -> Tensor:
        """Return (min(n, N),) int64, the places of sequences that stand for all when they are shown or compared.

        They are the first sequence of every context, then the second of each, and so on. If not every context can
        give one more, the contexts that give one are spread evenly. The sequences of a context must lie together, and
        all contexts must have equally many.
        """
        contexts = int(self.context_id.max()) + 1 if len(self) else 1
        rounds = torch.arange(len(self)).view(contexts, -1).T
        whole, rest = divmod(min(n, len(self)), contexts)
        found = rounds[:whole].flatten()
        return torch.cat([found, rounds[whole, torch.arange(rest) * contexts // rest]]) if rest else found

    def to(self, device: torch.device | str) -> Samples:
        """Return the samples with their tensors on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    @cached_property
    def text(self) -> list[str]:
        """N strings, the scored tokens of the continuations without special tokens. They are decoded on first use."""
        rows = zip(self.tokens.tolist(), self.score_mask.tolist(), strict=True)
        kept = [[token for token, scored in zip(*row, strict=True) if scored] for row in rows]
        texts: list[str] = self.tokenizer.batch_decode(kept, skip_special_tokens=True) if kept else []
        return texts

    @cached_property
    def finished(self) -> Tensor:
        """(N,) bool, whether each sequence ended in an EOS by itself and was not cut off at a length."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        last = torch.where(self.score_mask, places, -1).amax(1)
        ends = [token for token in self.eos_token_ids or (self.tokenizer.eos_token_id,) if token is not None]
        token = self.tokens.gather(1, last.clamp(min=0)[:, None])[:, 0]
        return torch.isin(token, torch.tensor(ends, dtype=torch.int64, device=token.device)) & (last >= 0)

    def state_dict(self) -> dict[str, Any]:
        """Return all fields except ``tokenizer`` and ``rows``; ``Samples(**state, tokenizer=...)`` restores them."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("tokenizer", "rows")}

    def trimmed(self) -> Samples:
        """Return the samples without the columns that are padding in every one of these sequences."""
        used = self.attention_mask.any(0).nonzero()[:, 0]
        if len(used) == 0:
            return self
        first, last = min(int(used[0]), self.prompt_len - 1), int(used[-1]) + 1
        return replace(
            self, prompt_len=self.prompt_len - first,
            **{name: getattr(self, name)[:, first:last] for name in _TOKENWISE},
        )  # fmt: skip

    def by_prompt_length(self) -> list[tuple[Tensor, Samples]]:
        """Return parts of the samples with their (M,) int64 places. The prompts of a part have one length, unpadded."""
        lengths = self.attention_mask[:, : self.prompt_len].sum(1)
        parts = []
        for length in sorted(set(lengths.tolist())):
            places = (lengths == length).nonzero()[:, 0]
            first = self.prompt_len - length
            part = self[places]
            kept = {name: getattr(part, name)[:, first:] for name in _TOKENWISE}
            parts.append((places, replace(part, prompt_len=length, **kept)))
        return parts

    @staticmethod
    def cat(parts: Sequence[Samples]) -> Samples:
        """Concatenate several batches, padded to one width. ``context_id`` and ``version`` stay as they are.

        Log q of the whole is known if that of every part is known.

        Raises:
            ValueError: there are no parts, they were drawn at different temperatures, or only some have ``rows``.
        """
        if not parts or any(part.temperature != parts[0].temperature for part in parts):
            raise ValueError("Samples.cat needs one or more Samples, all of one temperature")
        rows = None if all(part.rows is None for part in parts) else [row for part in parts for row in part.rows or ()]
        if rows is not None and any(part.rows is None for part in parts if len(part)):
            raise ValueError("Samples.cat needs rows on all parts or on none, and some have none")
        prompt = max(part.prompt_len for part in parts)
        rest = max(part.tokens.shape[1] - part.prompt_len for part in parts)

        def padded(name: str, value: int = 0) -> Tensor:
            return torch.cat(
                [
                    nn.functional.pad(
                        getattr(part, name),
                        (prompt - part.prompt_len, rest - (part.tokens.shape[1] - part.prompt_len)),
                        value=value,
                    )
                    for part in parts
                ]
            )

        return replace(
            parts[0],
            tokens=padded("tokens", parts[0].pad_token_id),
            attention_mask=padded("attention_mask"),
            score_mask=padded("score_mask"),
            prompt_len=prompt,
            log_prob=torch.cat([part.log_prob for part in parts]),
            context_id=torch.cat([part.context_id for part in parts]),
            version=torch.cat([part.version for part in parts]),
            rows=rows,
            has_log_prob=all(part.has_log_prob for part in parts if len(part)),
        )
