"""Lay the sequences of a batch end to end in fewer rows, so that a forward computes next to no padding.

transformers tells sequences of a row apart by position ids that begin anew. Attention in torch (``sdpa``) then computes
the products of all pairs of tokens in a row and masks those of two sequences, so that longer rows cost more of it:
``arrange`` weighs that against the padding. Flash attention computes the pairs within a sequence alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .families import attends_by_flash, text_config
from .samples import Samples

#: Sequences are packed only where that is estimated to save this part of a forward, since copies are not counted.
_WORTH = 0.1
#: The most elements of the mask over the pairs of tokens of all rows.
_MASK = 1 << 24


class Costs(NamedTuple):
    """What a forward computes, in multiplications of one layer.

    Attributes:
        token: those of a token, whatever comes before it.
        pair: those of a pair of tokens in attention.
        varlen: whether attention computes pairs of one sequence only, and takes one row.
    """

    token: float
    pair: float
    varlen: bool


def costs_of(model: nn.Module) -> Costs | None:
    """Return what a forward of the model computes; None where its configuration does not say how wide it is."""
    config: Any = text_config(model)
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not isinstance(layers, int) or not isinstance(width, int) or layers < 1:
        return None
    kind: Any = model
    ends = kind.get_input_embeddings(), kind.get_output_embeddings()
    around = {id(each.weight) for each in ends if each is not None}
    # an adapter adds next to nothing, and a view of the base must lay out its batches like the base itself
    adapter = f".{kind.base_model.prefix}" if hasattr(model, "peft_config") else None
    body = sum(
        each.numel()
        for name, each in model.named_parameters()
        if id(each) not in around and each.dim() > 1 and not (adapter and adapter in name)
    )
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = getattr(config, "num_experts_per_tok", None)
    if isinstance(experts, int) and isinstance(active, int) and experts > active > 0:
        body = body * active // experts
    return Costs(body / layers, 2.0 * width, attends_by_flash(model))


def arrange(lengths: Sequence[int], costs: Costs, longest: int | None) -> list[list[int]] | None:
    """Return which sequences share a row, in their order, or None if padding each to the longest costs no more.

    Args:
        lengths: the lengths of N sequences, in tokens.
        costs: what the model computes for a token and for a pair of tokens.
        longest: the most tokens that a row may have, or None if there is no limit.
    """
    n, widest = len(lengths), max(lengths, default=0)
    if n < 2 or widest == 0:
        return None
    best, found = (1 - _WORTH) * n * widest * (costs.token + costs.pair * widest), None
    order = sorted(range(n), key=lambda i: -lengths[i])
    for n_rows in {1} if costs.varlen else {n // k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, n) if k <= n}:
        rows = _filled(order, lengths, n_rows)
        width = max(sum(lengths[i] for i in row) for row in rows)
        if costs.varlen:
            cost = width * costs.token + costs.pair * sum(length * length for length in lengths)
        elif (longest is not None and width > longest) or n_rows * width * width > _MASK:
            continue
        else:
            cost = n_rows * width * (costs.token + costs.pair * width)
        if cost < best:
            best, found = cost, rows
    return found


def _filled(order: Sequence[int], lengths: Sequence[int], n_rows: int) -> list[list[int]]:
    """Return rows of about one length: each sequence goes to the row that is the shortest so far, the longest first."""
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    heap = [(0, row) for row in range(n_rows)]
    for i in order:
        used, row = heapq.heappop(heap)
        rows[row].append(i)
        heapq.heappush(heap, (used + lengths[i], row))
    return [sorted(row) for row in rows]


class Packed(NamedTuple):
    """N sequences in R rows of W tokens.

    Attributes:
        tokens: (R, W) int64.
        positions: (R, W) int64, from 0 in each sequence; 0 on what follows the last of a row.
        places: (N, T) int64, where each token of the padded batch lies in the flattened rows; -1 for padding.
    """

    tokens: Tensor
    positions: Tensor
    places: Tensor

    def padded(self, hidden: Tensor, columns: int) -> Tensor:
        """Return the last ``columns`` positions of the padded batch, (N, columns, D), 0 on padding; differentiable.

        Args:
            hidden: (R, W, D), what a forward of the rows gives.
        """
        places = self.places[:, -columns:].flatten()
        kept = (places >= 0).nonzero()[:, 0]
        # each row is copied once, so that no sum of the backward depends on an order
        rows = hidden.flatten(0, 1).index_select(0, places[kept])
        padded = rows.new_zeros(len(places), rows.shape[1]).index_copy(0, kept, rows)
        return padded.view(len(self.places), columns, -1)


def pack(samples: Samples, rows: Sequence[Sequence[int]]) -> Packed:
    """Return samples laid out in rows, each sequence without its padding.

    Args:
        samples: N sequences.
        rows: as ``arrange`` returns them.
    """
    seen = samples.attention_mask.bool()
    lengths = seen.sum(1).tolist()
    width = max(sum(lengths[i] for i in row) for row in rows)
    starts = [0] * len(samples)
    for r, row in enumerate(rows):
        at = r * width
        for i in row:
            starts[i] = at
            at += lengths[i]
    within = seen.cumsum(1) - 1
    places = torch.tensor(starts, device=seen.device)[:, None] + within
    tokens = samples.tokens.new_full((len(rows) * width,), samples.pad_token_id)
    positions = torch.zeros_like(tokens)
    tokens[places[seen]], positions[places[seen]] = samples.tokens[seen], within[seen]
    shape = len(rows), width
    return Packed(tokens.view(shape), positions.view(shape), torch.where(seen, places, -1))
