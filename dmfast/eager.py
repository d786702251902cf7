"""The functions of ``dmfast.functional`` in plain torch: exact in fp64, slow, and differentiable as often as wanted.

They are those functions under the backend ``eager``, which is the oracle that the kernels are tested against.
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
