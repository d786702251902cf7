"""Find out whether a forward draws random numbers, from the generators and the operators.

The values of two forwards do not show it. A router may draw in every forward and yet give the same values twice in most
batches, if its draw matters only where two experts are nearly tied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PROBABILITIES = ("dropout_p", "dropout", "p")


def random_draw(forward: Callable[[], object], devices: Iterable[torch.device]) -> str | None:
    """Return which operator draws random numbers in a forward, and where in the code, or None if no operator does.

    Draws that can't matter do not count: dropout of probability 0, a range of width 0, and single numbers, which
    LayerDrop draws even where it drops nothing.

    Args:
        forward: is run once, and again where a generator has moved. It moves the generators of its devices.
        devices: where it may draw, besides the CPU.
    """
    cuda = {device for device in devices if device.type == "cuda"}
    before = _states(cuda)
    forward()
    known = all(device.type in ("cpu", "cuda", "meta") for device in devices)
    if known and all(torch.equal(a, b) for a, b in zip(before, _states(cuda), strict=True)):
        return None
    seen = _RandomOperators()
    with seen:
        forward()
    return seen.first


def _states(cuda: Iterable[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)]


class _RandomOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the first operator that draws."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        is_random = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        if is_random and self.first is None and _matters(func, args, kwargs, out):
            self.first = f"{func.overloadpacket.__name__} in {_caller()}"
        return out


def _matters(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Return whether an operator may draw more than one number, and from more than one possible value."""
    if isinstance(out, Tensor) and out.numel() <= 1:
        return False
    schema = func._schema.arguments
    given = {each.name: each.default_value for each in schema if each.has_default_value()}
    given |= dict(zip((each.name for each in schema), args, strict=False)) | kwargs
    if any(name in given and given[name] in (0, None) for name in _PROBABILITIES if not _is_tensor(given.get(name))):
        return False
    if "from" in given and "to" in given and given["to"] is not None:
        return bool(given["from"] != given["to"])
    return _is_tensor(given.get("std")) or given.get("std") != 0


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _caller() -> str:
    """Return the innermost function that is neither torch's nor this module's."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module != __name__ and module.partition(".")[0] != "torch":
            break
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"
