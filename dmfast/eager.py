"""Provide the functions of ``dmfast.functional`` in plain torch.

They are exact in fp64, slow, and can be differentiated more than once. They run the backend ``eager``, the reference
against which the kernels are tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

from . import functional

_F = TypeVar("_F", bound=Callable[..., object])


def _eagerly(function: _F) -> _F:
    return cast(_F, functools.update_wrapper(functools.partial(function, backend="eager"), function))


dm_loss = _eagerly(functional.dm_loss)
sequence_log_prob = _eagerly(functional.sequence_log_prob)
linear_dm_loss = _eagerly(functional.linear_dm_loss)
linear_sequence_log_prob = _eagerly(functional.linear_sequence_log_prob)
sample_tokens = _eagerly(functional.sample_tokens)
