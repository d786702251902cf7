"""Run Triton's kernels in its interpreter, on CPU tensors, as backend ``triton``. This is a plugin of pytest.

The plugin also mends what the interpreter (3.6 to 3.9) gets wrong:

- It truncates fp32 to bf16, and must round to nearest, ties to even.
- Its ``tl.fma`` rounds twice, so that the terms of a row would lose the precision that the kernels use it for.
- It reads and writes wherever a pointer leads. Here every lane that is not masked must lie in a tensor that was given.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["DMFAST_BACKEND"] = "triton"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
_convert_float, _init_args = interpreter._convert_float, interpreter.GridExecutor._init_args_hst
_load, _store = Builder.create_masked_load, Builder.create_masked_store
# the tensors of the running launch lie in these ranges
_allowed: list[tuple[int, int]] = []


def _round_to_bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(x.shape)


def _convert(x, from_type, to_type, rounding):
    if from_type == tl.float32 and to_type == tl.bfloat16:
        return _round_to_bf16(x)
    return _convert_float(x, from_type, to_type, rounding)


def _fma(self, x, y, z):
    exact = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype)


def _check(pointers, mask):
    size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
    at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
    inside = np.zeros(at.shape, bool)
    for low, high in _allowed:
        inside |= (at >= low) & (at + size <= high)
    if not inside.all():
        raise IndexError(f"a kernel reaches outside its tensors: {int((~inside).sum())} lanes")


def _checked_load(self, pointers, mask, *rest):
    _check(pointers, mask)
    return _load(self, pointers, mask, *rest)


def _checked_store(self, pointers, value, mask, *rest):
    _check(pointers, mask)
    return _store(self, pointers, value, mask, *rest)


def _remember(self, args, kwargs):
    found = _init_args(self, args, kwargs)
    _allowed.clear()
    for given in (*found[0], *found[1].values()):
        x = getattr(given, "base", given)
        if isinstance(x, torch.Tensor) and x.numel():
            storage = x.untyped_storage()
            _allowed.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return found


interpreter._convert_float = _convert
interpreter.GridExecutor._init_args_hst = _remember
Builder.create_fma = _fma
Builder.create_masked_load, Builder.create_masked_store = _checked_load, _checked_store
np.seterr(all="ignore")  # the kernels compute 0 / 0 and log(0) on purpose
