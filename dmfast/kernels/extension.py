"""Load the compiled module ``dmfast._C``, and turn batches, terms and results into the pointers that it takes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..objectives import ON_POLICY, Objective, Terms
from .batch import ONLY_SCORED, WITH_TERMS, Batch, Bonus, SampleRows, Scores

_C: ModuleType | None
_IMPORT_ERROR: str | None = None
try:
    # torch is imported first, so that the extension uses the OpenMP library that torch has loaded
    _C = importlib.import_module("dmfast._C")
except ImportError as error:
    _C = None
    _IMPORT_ERROR = str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: The dtypes of per-sequence inputs that the CPU kernels read.
_READ_AS_THEY_ARE = (torch.float32, torch.float64)
# the enum Fault of csrc/batch.h
BAD_ROW, BAD_LABEL, BAD_WEIGHT, UNUSUAL = 1, 2, 3, 4


def _installed_elsewhere(here: Path) -> Path | None:
    """Return the folder of a dmfast with kernels that comes later on Python's path than the one that was imported."""
    folders = (Path(entry or ".").resolve() / "dmfast" for entry in sys.path)
    return next((each for each in folders if each != here.resolve() and any(each.glob("_C*.*"))), None)


def why_not() -> str | None:
    """Return None if the compiled kernels were found, else the reason why not."""
    if _C is not None:
        return None
    here = Path(__file__).parents[1]
    other = _installed_elsewhere(here)
    if other is not None and (here.parent / "csrc").is_dir():
        return (
            f"dmfast is imported from {here}, a folder of sources without compiled kernels, in the place of the "
            f"installation in {other}, since Python looks into the working directory first: run from another one, or "
            "build the kernels in the sources by pip install -e ."
        )
    return (
        "dmfast was installed without its compiled kernels (no C++ compiler at install time, or DMFAST_BUILD=none); "
        f"reinstall with g++ and DMFAST_BUILD=cpu to see the error [{_IMPORT_ERROR}]"
    )


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """Return None if the kernels take logits of this dtype, else the reason why not."""
    if dtype in DTYPES:
        return None
    return f"logits are {dtype}; the compiled kernels take float32, bfloat16 and float16"


def pointer(x: Tensor | None) -> int:
    """Return the address of a tensor, or 0 for None."""
    return 0 if x is None else x.data_ptr()


def bonus_pointers(bonus: Bonus | None) -> tuple[int, int]:
    """Return the addresses of the rows' entropies and of the sequences' weights, or zeros if there is no bonus."""
    return (0, 0) if bonus is None else (bonus.entropy.data_ptr(), bonus.weight.data_ptr())


def _address(x: Tensor, name: str) -> int:
    """Return the address of an input that a kernel will read.

    Raises:
        TypeError: the input has no memory. It is a FakeTensor, a zero tensor without storage, or a tensor whose storage
            was freed, as FSDP and offloading do.
    """
    address = x.data_ptr()
    if address == 0 and x.numel():
        raise TypeError(
            f"{name} ({x.dtype} {tuple(x.shape)}) have no memory that a kernel could read: their storage is gone, or "
            "they are a stand-in; pass a tensor that holds its values until backward is done"
        )
    return address


def row_strides(x: Tensor, batch: Batch) -> tuple[int, int]:
    """Return the strides of a sequence and of a row, in elements."""
    return (0, x.stride(0)) if batch.cu_seqlens is not None else (x.stride(0), x.stride(1))


def gradient_arguments(dz: Tensor, batch: Batch) -> tuple[int, ...]:
    """Return the dtype, address and strides of a gradient, as the kernels take them."""
    return DTYPES[dz.dtype], dz.data_ptr(), *row_strides(dz, batch)


def batch_struct(batch: Batch) -> Any:
    """Return a batch as the kernels take it. The result keeps no tensor alive."""
    assert _C is not None
    logits = batch.logits
    shape = logits.shape
    if batch.cu_seqlens is None:
        starts, strides = 0, logits.stride()
    else:
        starts, strides = _address(batch.cu_seqlens, "cu_seqlens"), (0, logits.stride(0))
    vocab = shape[-1]
    return _C.Batch(
        DTYPES[logits.dtype], _address(logits, "logits"), batch.n_sequences, batch.steps, batch.n_rows,
        strides[0], strides[1], starts, _address(batch.tokens, "tokens"), vocab, batch.scale, batch.softcap,
        batch.vocab_start, batch.whole_vocab or vocab, torch.get_num_threads(), pointer(batch.token_weight),
    )  # fmt: skip


def _columns(columns: Sequence[Tensor]) -> list[int] | None:
    """Return address, stride and size of an element of each column, or None if the CPU kernels can't read one."""
    found: list[int] = []
    for x in columns:
        if x.dtype not in _READ_AS_THEY_ARE or x.is_neg():
            return None
        found += (_address(x, "inputs"), x.stride(0), x.element_size())
    return found


def terms_struct(terms: Terms | None, into: tuple[Tensor, int, int] | None = None) -> Any:
    """Return terms as the kernels take them. The result keeps no tensor alive.

    Args:
        terms: the terms, or None for a call that only scores.
        into: fp64 memory of the CPU, an offset and B. If the columns of the terms have not been stacked yet, they are
            stacked there.
    """
    assert _C is not None
    if terms is None:
        return _C.Terms()
    objective = terms.objective
    assert isinstance(objective, Objective)
    number, flags, parameter, max_log_return = objective.for_kernels
    flags |= ON_POLICY if terms.on_policy else 0
    scalars = [parameter, terms.max_weight, terms.entropy_coefficient, *terms.constants, max_log_return]
    columns = None if into is None or terms.columns is None else _columns(terms.columns)
    if into is None or columns is None:
        block = terms.block
        return _C.Terms(number, flags, _address(block, "inputs"), block.stride(0), terms.present, scalars, [])
    memory, offset, n = into
    struct = _C.Terms(number, flags, memory.data_ptr() + 8 * offset, n, terms.present, scalars, columns)
    terms.lie_in(memory, offset, n)
    return struct


def make_outputs(
    batch: Batch, terms: Terms | None, entropy: bool, divide_by: float, room: int = 0
) -> tuple[Scores, Any, Tensor, int]:
    """Return empty results, the pointers to them, the memory in which they lie, and the offset of its free part.

    Args:
        batch, terms, entropy, divide_by: as in ``Backend.forward``.
        room: the size of the free part, in numbers.
    """
    assert _C is not None
    n_rows, n = batch.n_rows, batch.n_sequences
    row_columns, columns = 3 if entropy else 2, ONLY_SCORED if terms is None else WITH_TERMS
    used = row_columns * n_rows + columns * n
    # torch.empty(..., device=...) costs twice as much as new_empty, and a torch.device(...) context would move a
    # torch.empty without device elsewhere
    memory = batch.tokens.new_empty(used + room, dtype=torch.float64)
    total, to = None, 0
    if terms is not None:
        total = memory.new_empty(())  # it carries a gradient, so it must not be a view
        to = total.data_ptr()
    address = memory.data_ptr()
    outputs = _C.Outputs(address, address + 8 * row_columns * n_rows, n_rows, n, to, entropy, divide_by)
    return Scores.in_one(memory, row_columns, n_rows, columns, n, total, None), outputs, memory, used


def rows_arguments(rows: SampleRows, uniforms: Tensor | None) -> tuple[Any, ...]:
    """Return the arguments with which both ``sample`` functions begin."""
    logits = rows.logits
    return (
        DTYPES[logits.dtype], _address(logits, "logits"), logits.shape[0], logits.stride(0), logits.shape[1],
        rows.scale, rows.softcap, rows.seed, pointer(rows.row_ids), rows.step, pointer(uniforms),
    )  # fmt: skip


def weigh(terms: Terms, log_prob: float, log_proposal: float, log_target: float, log_z: float, reward: float,
          log_base: float, baseline: float) -> tuple[float, float, float, bool, bool]:  # fmt: skip
    """Return log_ratio, log_target_ratio, weight, clipped and out_of_range of a sequence by csrc/objective.h."""
    assert _C is not None
    result = _C.weigh(terms_struct(terms), log_prob, log_proposal, log_target, log_z, reward, log_base, baseline)
    return tuple(result)


def matrix_arguments(x: Tensor, factor: float, upstream: Tensor) -> tuple[Any, ...]:
    """Return the arguments of ``scale`` for all rows of a contiguous tensor that is not empty."""
    assert _C is not None
    v = x.shape[-1]
    n = x.numel() // v
    batch = _C.Batch(DTYPES[x.dtype], 0, 1, n, n, 0, v, 0, 0, v, 1.0, 0.0, 0, v, torch.get_num_threads(), 0)
    return batch, factor, upstream.data_ptr(), DTYPES[x.dtype], x.data_ptr(), 0, v


def make_sample_outputs(rows: SampleRows) -> tuple[Tensor, Tensor]:
    """Return empty tokens (N,) and log_prob (N,)."""
    tokens = rows.logits.new_empty(rows.logits.shape[0], dtype=torch.int64)
    return tokens, torch.empty_like(tokens, dtype=torch.float64)
