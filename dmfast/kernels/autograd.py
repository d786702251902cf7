"""What the losses' autograd.Functions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a backward that is itself to be differentiated, whose result would silently be a constant."""

    def refuse_twice(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "dmfast's losses can't be differentiated twice, and backward was called with create_graph=True; "
                "dmfast.eager has the same functions in plain torch"
            )
        return backward(ctx, *grads)

    return refuse_twice


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, which torch leaves untyped."""
    return function.apply(*args)  # type: ignore[no-untyped-call]


def expected_grad(weight_known: bool, dtype: torch.dtype, reduction: str, grad_scale: float | None) -> float | None:
    """The grad_output to fold into a gradient written by forward, or None where that must wait for backward."""
    if not weight_known or reduction == "none":
        return None
    if grad_scale is None and dtype == torch.float16:
        return None  # without the scaler's factor small gradients would round to 0
    return 1.0 if grad_scale is None else float(grad_scale)
