"""Define what goes into a kernel and what comes out: logits with the rows that are scored, and blocks of results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

#: The label of a row that is not scored.
IGNORE = -100
#: The largest magnitude of a token weight. csrc/batch.h has the same number.
MAX_TOKEN_WEIGHT = 1e30
#: A function that reads what a device has recorded about a call, and raises it.
Recorded: TypeAlias = Callable[[], object]


class Origin(NamedTuple):
    """The place of a batch's rows in the larger batch of which they are a chunk."""

    whole: Batch
    rows: Tensor  # (rows,) int64: for each row its number in the whole
    first_sequence: int


class Batch(NamedTuple):
    """A checked batch of B sequences of logits in the form that kernels take.

    ``logits`` is (B,T,V) with any batch and time strides, or packed (N,V) with ``cu_seqlens``.
    ``tokens`` is (B,T) or (rows,) int64, contiguous, one per row of logits in sequence order; -100 = not scored.
    ``labels`` is its view as (rows,).

    A batch may be a shard. Then its V logits belong to the tokens from ``vocab_start`` on, in a vocabulary of
    ``whole_vocab`` tokens. If the label of a row lies in another shard, this shard adds the exponentials of the row but
    not the logit of its label, and the gradient of the row is the softmax without the one-hot.

    ``token_weight`` multiplies a row's log pi in the loss, and so in the gradient. log pi of a sequence stays a plain
    sum, as do its entropy and the ratios and A that are made of it.
    """

    logits: Tensor
    tokens: Tensor
    cu_seqlens: Tensor | None  # (B+1,) int64, contiguous
    n_sequences: int
    steps: int  # T; 0 when packed
    scale: float  # 1 / temperature
    softcap: float  # 0.0: none
    vocab_start: int = 0
    whole_vocab: int = 0  # 0: V, no shard
    origin: Origin | None = None  # errors name places in the whole
    as_set: bool = False  # whether a head's fp32 products follow torch's settings; otherwise they are IEEE's
    token_weight: Tensor | None = None  # (rows,) fp64, contiguous, 0 where a row is not scored; None: all are 1

    @property
    def labels(self) -> Tensor:
        """(rows,) int64, the token of each row; -100 = not scored."""
        return self.tokens if self.tokens.dim() == 1 else self.tokens.view(-1)

    @property
    def vocab(self) -> int:
        """The number V of logits in a row."""
        return self.logits.shape[-1]

    @property
    def n_tokens(self) -> int:
        """The size of the vocabulary that labels are tokens of."""
        return self.whole_vocab or self.logits.shape[-1]

    @property
    def is_shard(self) -> bool:
        """Whether a row holds only a part of the vocabulary."""
        return self.whole_vocab != 0 and self.whole_vocab != self.logits.shape[-1]

    @property
    def n_rows(self) -> int:
        """B * T, or N when packed."""
        return self.tokens.numel()

    @property
    def first_sequence(self) -> int:
        """The number that sequence 0 has in the call."""
        return 0 if self.origin is None else self.origin.first_sequence


class Bonus(NamedTuple):
    """What a kernel needs to add the gradient of -sum_i weight_i H_i, where H_i sums over the rows of sequence i.

    For a row dH/dz_j = -p_j (log p_j + H), times the derivatives of scale and softcap.
    """

    entropy: Tensor  # (rows,) fp64, H of each row over the whole vocabulary
    weight: Tensor  # (B,) fp64, contiguous


Flat: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, float]


def flat(batch: Batch) -> Flat:
    """Return the fields that ``batch_of`` needs. The schema of a custom op accepts only tensors and numbers."""
    assert not batch.is_shard
    return batch.logits, batch.labels, batch.cu_seqlens, batch.token_weight, batch.scale, batch.softcap


def batch_of(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, token_weight: Tensor | None, scale: float, softcap: float
) -> Batch:
    """Return the batch whose fields ``flat`` returned."""
    packed = cu_seqlens is not None
    n = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else logits.shape[0]
    return Batch(logits, labels, cu_seqlens, n, 0 if packed else logits.shape[1], scale, softcap,
                 token_weight=token_weight)  # fmt: skip


def logits_to_come(hidden: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Return a stand-in of the shape, dtype and device that the logits of hidden states will have."""
    lead = hidden.shape[:-1]
    return hidden.new_empty(vocab, dtype=dtype).as_strided((*lead, vocab), (*[0] * len(lead), 1))


class SampleRows(NamedTuple):
    """Checked rows of logits (N,V), from each of which a token is drawn."""

    logits: Tensor
    seed: int  # in [0, 2^64)
    row_ids: Tensor | None  # (N,) int64, contiguous; None: 0, 1, ...
    step: int
    scale: float  # 1 / temperature
    softcap: float  # 0.0: none


# The columns of the two blocks of results. csrc/batch.h has the same order.
LSE, LABEL, ROW_ENTROPY = range(3)
LOG_PROB, ENTROPY, LOG_RATIO, LOG_TARGET_RATIO, WEIGHT, LOSS, CLIPPED = range(7)
#: The number of columns of the block of sequences without terms, and with them.
ONLY_SCORED, WITH_TERMS = 2, 7


class Scores:
    """The results of one pass over the logits, in fp64 and without gradient.

    With an entropy coefficient c the losses are -A log pi - c H. With token weights w the losses use
    sum_t w_t log pi(x_t) instead of log pi; nothing else does.

    Attributes:
        total: 0-d, the sum of the losses in a fixed order, divided by the divisor of the call; None after a pass that
            only scores.
        recorded: the checks that read what a device has recorded about the call.
        kept: the addresses that the backend keeps for its backward, or None.
    """

    def __init__(
        self, rows: Tensor | None, sequences: Tensor | None, total: Tensor | None = None,
        recorded: tuple[Recorded, ...] = (), kept: Any = None, flat: tuple[Tensor, int, int, int, int] | None = None,
    ) -> None:  # fmt: skip
        self._rows, self._sequences, self.total, self.recorded = rows, sequences, total, recorded
        self.kept, self._flat = kept, flat

    @staticmethod
    def in_one(
        memory: Tensor, row_columns: int, n_rows: int, columns: int, n: int, total: Tensor | None, kept: Any
    ) -> Scores:
        """Return the scores whose rows, followed by the sequences, lie at the start of a 1-D tensor.

        The views of them are made when they are read, since every view costs as much as a small tensor.
        """
        return Scores(None, None, total, (), kept, (memory, row_columns, n_rows, columns, n))

    @property
    def rows(self) -> Tensor:
        """(2, R), or (3, R) with entropy: log-sum-exp, the label's logit after scale and softcap, entropy.

        The label's logit is 0 where another shard has it.
        """
        if self._rows is None:
            assert self._flat is not None
            memory, row_columns, n_rows, _, _ = self._flat
            self._rows = memory.as_strided((row_columns, n_rows), (n_rows, 1))
        return self._rows

    @property
    def sequences(self) -> Tensor:
        """(7, B): log pi, entropy, log rho, log u, A, the loss, and 1 where max_weight or max_return acts.

        After a pass that only scores it is (2, B). For a shard it is NaN, since log pi needs the rows of all shards.
        """
        if self._sequences is None:
            assert self._flat is not None
            memory, row_columns, n_rows, columns, n = self._flat
            self._sequences = memory.as_strided((columns, n), (n, 1), row_columns * n_rows)
        return self._sequences

    @property
    def version(self) -> tuple[int, int]:
        """The number of changes of the values in place, which PyTorch counts for each of the blocks."""
        if self._flat is not None:
            return self._flat[0]._version, 0
        return self.rows._version, self.sequences._version

    def __reduce__(self) -> tuple[Any, ...]:
        return Scores, (self.rows, self.sequences, self.total, self.recorded)  # a copy has other addresses

    def replaced(
        self, *, rows: Tensor | None = None, total: Tensor | None = None, recorded: tuple[Recorded, ...] | None = None
    ) -> Scores:
        """Return these scores with some of their parts replaced."""
        return Scores(
            self.rows if rows is None else rows, self.sequences, self.total if total is None else total,
            self.recorded if recorded is None else recorded, self.kept if rows is None else None,
        )  # fmt: skip

    @property
    def lse(self) -> Tensor:
        """(R,) fp64, log-sum-exp of the scaled and capped logits; 0 for a row that is not scored."""
        if self._rows is None and self._flat is not None:
            return self._flat[0].narrow(0, 0, self._flat[2])
        return self.rows.select(0, LSE)

    @property
    def log_prob(self) -> Tensor:
        """(B,) fp64, log pi(x) in nats."""
        return self._column(LOG_PROB)

    @property
    def entropy(self) -> Tensor | None:
        """(B,) fp64, the entropy in nats, summed over scored rows; None where it was not asked for."""
        row_columns = self.rows.shape[0] if self._flat is None else self._flat[1]
        return self._column(ENTROPY) if row_columns > ROW_ENTROPY else None

    @property
    def weight(self) -> Tensor:
        """(B,) fp64, the weight A."""
        return self._column(WEIGHT)

    def _column(self, column: int) -> Tensor:
        if self._sequences is None and self._flat is not None:
            memory, row_columns, n_rows, _, n = self._flat
            return memory.narrow(0, row_columns * n_rows + column * n, n)
        return self.sequences.select(0, column)

    def bonus(self, coefficient: float) -> Bonus | None:
        """Return the bonus in which every sequence has this coefficient, or None for a coefficient of 0."""
        return bonus_of(self.rows, self.weight.new_full(self.weight.shape, coefficient)) if coefficient else None


def bonus_of(rows: Tensor, weight: Tensor) -> Bonus:
    """Return the bonus that a block of rows with entropy and weights (B,) of any dtype make."""
    return Bonus(rows.select(0, ROW_ENTROPY), weight.to(torch.float64).contiguous())
