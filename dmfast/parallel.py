"""Cut the rows of a head among the ranks of a process group, which the linear losses take as ``group`` or a DTensor.

Besides this module only ``sharding.py``, ``tensor_parallel.py`` and ``training/`` call torch.distributed.

Every rank has the same hidden states and inputs, and its own rows of the head. The ranks compare their arguments before
anything is computed. So a wrong call on one rank raises an error on all of them, and none waits for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

_T = TypeVar("_T")
_FAILED, _START, _COLUMNS = range(3)  # these places of a rank's message precede the digests of its arguments
_NO_START, _MESSAGE = -1, 32


@dataclass(frozen=True)
class VocabShards:
    """The ranks among which a vocabulary is cut: a ``kernels.shards.Shards``.

    Attributes:
        group: the process group.
        start: the first token of this rank.
        vocab: the size of the whole vocabulary.
        largest: the most tokens that a rank has.
        device: the device of the tensors that are exchanged.
    """

    group: Any
    start: int
    vocab: int
    largest: int
    device: torch.device

    def exchange(self, mine: Tensor | None, shape: tuple[int, int], look: bool) -> Tensor:
        """Return each rank's part of the rows, as ``Shards`` says."""
        columns, rows = shape
        # one further element of each column says whether the rank has failed
        message = torch.full((columns, rows + 1), torch.nan, dtype=torch.float64, device=self.device)
        if mine is not None:
            message[:, :rows] = mine
            message[:, rows] = 0.0
        parts = torch.stack(_gathered(message, self.group))
        if look:
            failed = parts[:, 0, rows].isnan()
            if bool(failed.any()):
                raise RuntimeError(f"rank {int(failed.nonzero()[0])} of the group has failed: its own error says why")
        return parts[..., :rows]

    def add(self, x: Tensor) -> None:
        """Replace x by its sum over the ranks."""
        distributed.all_reduce(x, group=self.group)


def _gathered(mine: Tensor, group: Any) -> list[Tensor]:
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, mine, group=group)
    return parts


def is_dtensor(x: object) -> bool:
    """Return whether x is a DTensor, without importing the module that defines the class."""
    return isinstance(x, Tensor) and hasattr(x, "placements") and hasattr(x, "to_local")


def local_head(head: Tensor, bias: Tensor | None, group: Any, vocab_start: int | None) -> tuple[
    Tensor, Tensor | None, Any
]:  # fmt: skip
    """Return this rank's rows of head and bias, and the group among which they are cut, or None if they are whole.

    Args:
        head, bias: ``weight`` and ``bias`` of ``linear_dm_loss``.
        group: a ProcessGroup or a DeviceMesh of one dimension; None: the group of a head that is a DTensor.
        vocab_start: as in ``linear_dm_loss``.

    Raises:
        TypeError: the bias is cut in another way than the head.
        ValueError: a DTensor is not cut along the vocabulary, over one dimension of its mesh.
    """
    if group is not None and hasattr(group, "get_group"):
        group = group.get_group()
    if not is_dtensor(head):
        if is_dtensor(bias):
            raise TypeError("bias is a DTensor and weight is not; give both in one form")
        if group is None and vocab_start is not None:
            raise ValueError("vocab_start needs group, the process group that has the other rows of weight")
        return head, bias, group
    placements, mesh = head.placements, head.device_mesh  # type: ignore[attr-defined]
    cut = [k for k, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or not placements[cut[0]].is_shard(0):
        raise ValueError(
            f"weight is a DTensor with placements {tuple(placements)}; the losses take one that is cut along its rows, "
            "the vocabulary, over one dimension of its mesh: Shard(0), and Replicate() over the others"
        )
    if group is not None or vocab_start is not None:
        raise ValueError("group and vocab_start are known from a weight that is a DTensor; leave them out")
    if bias is not None and (not is_dtensor(bias) or bias.placements != placements):  # type: ignore[attr-defined]
        raise TypeError(f"bias must be a DTensor with the placements of weight, {tuple(placements)}")
    local: Tensor = head.to_local(grad_placements=placements)  # type: ignore[attr-defined]
    own: Tensor | None = None if bias is None else bias.to_local(grad_placements=placements)  # type: ignore[attr-defined]
    return local, own, mesh.get_group(cut[0])


def together(
    group: Any, vocab_start: int | None, head: Tensor, check: Callable[[], tuple[_T, Mapping[str, object]]]
) -> tuple[_T, VocabShards]:
    """Check the arguments of a call on all ranks, and return the result of ``check`` and the shards of the ranks.

    Args:
        group: the process group.
        vocab_start: the first token of this rank; None: the ranks have the tokens in the order of their numbers.
        head: the rows of the head that this rank has.
        check: a function that raises an error for this rank's arguments, or returns its result and, by name, the values
            that must be the same on all ranks.

    Raises:
        RuntimeError: torch.distributed is not initialised, or another rank refused its arguments.
        ValueError: the arguments differ among the ranks, or their rows do not make a vocabulary.
    """
    if not distributed.is_initialized():
        raise RuntimeError("group was given, but torch.distributed is not initialised: call init_process_group first")
    made: _T | None = None
    same: Mapping[str, object] = {}
    error: Exception | None = None
    try:
        made, same = check()
    except Exception as found:  # it is raised below, once the other ranks know of it
        error = found
    start = _NO_START if vocab_start is None else vocab_start
    told = torch.zeros(_MESSAGE, dtype=torch.int64, device=head.device)
    mine = [int(error is not None), start, head.shape[0], *(_digest(value) for value in same.values())]
    told[: len(mine)] = torch.tensor(mine)
    ranks = torch.stack(_gathered(told, group)).tolist()
    if error is not None:
        raise error
    failed = [k for k, rank in enumerate(ranks) if rank[_FAILED]]
    if failed:
        raise RuntimeError(f"rank {failed[0]} of the group has refused its arguments: its own error says why")
    for k, name in enumerate(same, start=_COLUMNS + 1):
        other = [r for r, rank in enumerate(ranks) if rank[k] != ranks[0][k]]
        if other:
            raise ValueError(
                f"all ranks of the group must get the same {name}, and rank {other[0]} got another one than rank 0; "
                "ranks that share a vocabulary work on the same sequences"
            )
    starts = _starts(ranks)
    shards = VocabShards(group, starts[distributed.get_rank(group)], sum(rank[_COLUMNS] for rank in ranks),
                         max(rank[_COLUMNS] for rank in ranks), head.device)  # fmt: skip
    assert made is not None
    return made, shards


def _starts(ranks: list[list[int]]) -> list[int]:
    """Return the first token of each rank.

    Raises:
        ValueError: the ranks' tokens overlap or have a gap.
    """
    starts = [rank[_START] for rank in ranks]
    if all(start == _NO_START for start in starts):
        return [sum(rank[_COLUMNS] for rank in ranks[:k]) for k in range(len(ranks))]
    expected = 0
    for start, columns in sorted((rank[_START], rank[_COLUMNS]) for rank in ranks):
        if start != expected and columns:
            shares = ", ".join(f"rank {k} [{rank[_START]}, {rank[_START] + rank[_COLUMNS]})"
                               for k, rank in enumerate(ranks))  # fmt: skip
            raise ValueError(
                f"the rows of weight on the ranks must make a vocabulary, without a gap and without an overlap; got "
                f"{shares}; check vocab_start"
            )
        expected += columns
    return starts


def _digest(value: object) -> int:
    """Return 64 bits that are the same for equal values. A tensor's depend on its shape and its elements' bits."""
    if isinstance(value, Tensor):
        bits = value.detach().reshape(-1)
        bits = bits.view(torch.int64) if bits.dtype == torch.float64 else bits.to(torch.int64)
        places = torch.arange(1, len(bits) + 1, device=bits.device)
        value = (tuple(value.shape), int((bits * (places * 0x9E3779B97F4A7C1)).sum()))  # the product may wrap
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class _Shared(torch.autograd.Function):
    """The identity on a tensor that all ranks have alike. Its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole, group=ctx.group)
        return whole, None


class _Columns(torch.autograd.Function):
    """The concatenation of all ranks' columns. Each rank's gradient is that of its own columns."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Any, width: int) -> Tensor:
        largest = -(-width // distributed.get_world_size(group))
        ctx.start, ctx.columns = distributed.get_rank(group) * largest, mine.shape[-1]
        padded = torch.nn.functional.pad(mine, (0, largest - mine.shape[-1])).contiguous()
        # only the last ranks have fewer columns, so that the padding lies behind all of them
        return torch.cat(_gathered(padded, group), -1)[..., :width]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[..., ctx.start : ctx.start + ctx.columns], None, None


def whole_logits(
    make: Callable[[Tensor, Tensor, Tensor | None], Tensor], hidden: Tensor, head: Tensor, bias: Tensor | None
) -> Tensor:
    """Return the differentiable (..., V) logits of all tokens. Where the head is cut among ranks, all of them call it.

    Args:
        make: a function that makes (..., V) logits of hidden states, head and bias.
        hidden: (..., D), the same on all ranks.
        head, bias: (V, D) and (V,) or None. They are DTensors, with the rows in the order of the ranks, where the head
            is cut.
    """
    local, own, group = local_head(head, bias, None, None)
    if group is None:
        return make(hidden, head, bias)
    mine = make(_Shared.apply(hidden, group), local, own)  # type: ignore[no-untyped-call]
    found: Tensor = _Columns.apply(mine, group, head.shape[0])  # type: ignore[no-untyped-call]
    return found
