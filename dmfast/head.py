"""Find a model's last hidden states and its head, from which the fused losses make the logits themselves.

A model's class does not tell whether its logits are a plain nn.Linear of hidden states. So the first forward compares a
few of the model's logits with those that its hidden states and head give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import sharding, tensor_parallel
from .functional import linear_logits, plain_logits
from .parallel import whole_logits

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_SHOWN = (slice(2), slice(-2, None))  # the last positions are compared, because they are never left padding


class HiddenAndHead(NamedTuple):
    """The parts of a model's logits, ``cap(scale * (hidden @ weight.T + bias))``."""

    hidden: Tensor  # (N, K, D)
    weight: Tensor  # (V, D); a DTensor where the vocabulary is cut among ranks
    bias: Tensor | None  # (V,); a DTensor where weight is one
    labels: Tensor  # (N, K) int64, the token that each position predicts; -100 = not scored
    softcap: float | None
    scale: float
    logits_dtype: str  # "float32" or "same": the dtype in which the linear losses make logits

    def logits(self) -> Tensor:
        """Return the differentiable (N, K, V) logits, in fp32 for 16-bit hidden states with logits_dtype "float32"."""
        dtype = self.hidden.dtype
        if self.logits_dtype == "float32":
            dtype = torch.promote_types(dtype, torch.float32)
        products = whole_logits(
            lambda hidden, weight, bias: plain_logits(hidden, weight, bias, dtype), self.hidden, self.weight, self.bias
        )
        return self.finished(products)

    def finished(self, products: Tensor) -> Tensor:
        """Scale and cap the head's products, as the model does."""
        z = products * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def unwrapped(model: nn.Module) -> Any:
    """Return the model without DDP or DeepSpeed's engine around it."""
    return model.module if isinstance(model, DistributedDataParallel) or sharding.is_engine(model) else model


class HeadProbe:
    """The knowledge about one model's head: whether hidden states and head make the model's logits.

    It holds no model, so that it can be copied when another module takes a model's place.

    Args:
        logits_dtype: as in ``LanguageModel``.

    Attributes:
        verified: whether a forward has shown that hidden states and head make the logits.
        failure: why they do not, once a forward has shown that; None before.
        dtype: the dtype in which hidden states and head are multiplied, once a forward has shown it.
    """

    def __init__(self, logits_dtype: str) -> None:
        self.logits_dtype = logits_dtype
        self._seen: tuple[Any, ...] = ()  # the dtypes and the forward for which the other attributes were found
        self.verified = False
        self._agreed = False  # whether all ranks that hold a sharded model know the same
        self.failure: str | None = None
        self.dtype: torch.dtype | None = None

    def why_not(self, model: nn.Module) -> str | None:
        """Return why hidden states and head can't make the logits, as far as that is known without a forward."""
        if self.failure is not None:
            return self.failure
        if hasattr(model, "_orig_mod"):
            return "the model is compiled, and torch.compile ignores the hook that takes its hidden states"
        get: Any = getattr(unwrapped(model), "get_output_embeddings", None)
        head = get() if get is not None else None
        if head is None:
            return "the model names no head (get_output_embeddings)"
        kind = sharding.class_of(head)
        if kind is not nn.Linear:  # adapters, modules_to_save, quantised layers
            return f"the head is a {kind.__module__}.{kind.__qualname__}, not an nn.Linear"
        cut = tensor_parallel.cuts_vocabulary(head)
        plain = type(head.weight) in (nn.Parameter, Tensor)
        if not (plain or cut or _is_shard_of(unwrapped(model), head.weight)):
            return f"the head's weight is a {type(head.weight).__qualname__} that is not cut along the vocabulary"
        if head.weight.is_meta or hasattr(head, "_hf_hook"):
            return "the head is offloaded"
        if "forward" in vars(head) and not cut:
            return "the head's forward was replaced on the instance, so that it may compute something else"
        hooks = [*head._forward_hooks.values(), *head._forward_pre_hooks.values()]
        if not all(sharding.is_own_hook(hook) for hook in hooks):
            return "the head has hooks, which may change what it computes"
        scale, softcap = _scaling(model)
        if not scale > 0 or (softcap is not None and scale != 1.0):
            return f"the model's logits are scaled by {scale} with a softcap of {softcap}"
        return None

    def read(self, model: nn.Module, labels: Tensor, forward: Callable[[], Any]) -> HiddenAndHead | None:
        """Return hidden states and head from one forward in which the head does almost no work.

        Args:
            model: the module whose head it is, perhaps within DDP.
            labels: (N, K) int64, the tokens that the last K positions predict.
            forward: a function that runs the model and returns its output, of which ``logits`` is read.

        Returns:
            The parts of the logits, or None where ``why_not`` says why they can't be had.
        """
        self._look(model)
        if self.why_not(model) is not None:
            return None
        scale, softcap = _scaling(model)
        out, captured = self._capture(model, forward, whole=False)
        if captured is None:
            return None
        entered, weight, bias = captured
        hidden = entered[:, -labels.shape[1] :]
        found = HiddenAndHead(hidden, weight, bias, labels, softcap, scale, self.logits_dtype)
        if not self.verified and len(labels):
            self._compare(out.logits, entered[_SHOWN], found)
        if sharding.in_step(model) or tensor_parallel.is_cut(model):
            self.agree(model)
        return None if self.failure is not None else found

    def agree(self, model: nn.Module) -> None:
        """Take over what all ranks found, because ranks that hold parts of a model must run the same forwards.

        The ranks call it together. Once they agree it does nothing.
        """
        if self._agreed or not (sharding.is_sharded(model) or tensor_parallel.is_cut(model)):
            return
        failed = not sharding.agree(model, self.failure is None)
        verified = sharding.agree(model, self.verified)
        if failed and self.failure is None:
            self.failure = "on another rank the model's logits differ from those of its hidden states and head"
        self.verified, self._agreed = verified and not failed, verified or failed

    def _look(self, model: nn.Module) -> None:
        """Forget what is known if the head's dtype or the model's forward has changed."""
        inner = unwrapped(model)
        get: Any = getattr(inner, "get_output_embeddings", None)
        weight = getattr(get() if get is not None else None, "weight", None)
        if weight is None:
            return
        device = weight.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # accelerate replaces the forward on the instance to run it under its autocast
        seen = (weight.dtype, autocast, vars(inner).get("forward"))
        if seen != self._seen:
            self._seen, self.verified, self._agreed, self.dtype = seen, False, False, None

    def unknown(self, model: nn.Module) -> bool:
        """Return whether only a forward can tell if hidden states and head make the logits."""
        self._look(model)
        return not self.verified and self.why_not(model) is None

    def rounds(self, model: nn.Module) -> bool:
        """Return whether a forward has shown that the model rounds its logits to 16 bits where the losses do not."""
        self._look(model)
        return self._rounds() and self.why_not(model) is None

    def _rounds(self) -> bool:
        return self.logits_dtype == "float32" and self.dtype in SIXTEEN_BIT

    def last_logits(self, model: nn.Module, forward: Callable[[], Any]) -> tuple[Any, Tensor]:
        """Return a forward's output and (R, V) logits of its last position, made as the losses make them.

        Where the head multiplies in 16 bits, the logits are made in fp32 from hidden states and head. So log q of the
        draws is not rounded where log pi is not.

        Args:
            model: the module whose head it is, perhaps within DDP.
            forward: a function that runs the model without a gradient and returns its output, of which ``logits`` is
                read.
        """
        self._look(model)
        # the usual case comes first, because this runs at every token
        if (self.verified and not self._rounds()) or self.why_not(model) is not None:
            out = forward()
            return out, out.logits[:, -1]
        out, captured = self._capture(model, forward, whole=not self.verified)
        if captured is None:
            return out, out.logits[:, -1]
        entered, weight, bias = captured
        scale, softcap = _scaling(model)
        unlabelled = HiddenAndHead(entered, weight, bias, entered.new_empty(0), softcap, scale, self.logits_dtype)
        if not self.verified:
            self._compare(out.logits[_SHOWN], entered[_SHOWN], unlabelled)
            if not (self.verified and self._rounds()):
                return out, out.logits[:, -1]
        return out, unlabelled.finished(whole_logits(linear_logits, entered[:, -1], weight, bias))

    def _capture(
        self, model: nn.Module, forward: Callable[[], Any], *, whole: bool
    ) -> tuple[Any, tuple[Tensor, Tensor, Tensor | None] | None]:
        """Return a forward's output, and the hidden states that entered the head with the head's weight and bias.

        These three have the dtype in which they are multiplied. They are None where ``failure`` then says why.

        Args:
            model, forward: as in ``read``.
            whole: whether the head makes all of its logits, and not only those that are compared.
        """
        head = unwrapped(model).get_output_embeddings()
        captured: list[Tensor] = []
        dtypes: list[torch.dtype | None] = []

        def capture(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not args:
                return None
            hidden = args[0]
            device = hidden.device.type
            captured.append(hidden)
            dtypes.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
            if whole:
                return None
            # The states are not detached, because DDP searches from the outputs the parameters that get a gradient.
            return (hidden[:1, :0] if self.verified else hidden[_SHOWN], *args[1:])

        hook = head.register_forward_pre_hook(capture)
        try:
            out = forward()
        finally:
            hook.remove()
        if len(captured) != 1:
            self.failure = f"the model calls its head {len(captured)} times in a forward, not once"
            return out, None
        if sharding.is_shard(head.weight) and hasattr(head, "unshard"):
            head.unshard()  # FSDP has freed the whole weight after the head's own forward
        own = tensor_parallel.cuts_vocabulary(head) and head.weight.device_mesh.ndim == 1
        if sharding.is_shard(head.weight) and not own:
            self.failure = "the head's parameters are shards after a forward"
            return out, None
        hidden, weight, bias = captured[0], head.weight, head.bias
        if dtypes[0] is not None:  # autocast may have been on only within the model's forward
            hidden, weight = hidden.to(dtypes[0]), weight.to(dtypes[0])
            bias = None if bias is None else bias.to(dtypes[0])
        return out, (hidden, weight, bias)

    def _compare(self, logits: Tensor, shown: Tensor, found: HiddenAndHead) -> None:
        """Note whether the model's logits of the shown hidden states are the head's, and why not."""
        self.failure = _what_differs(logits, shown, found)
        self.verified = self.failure is None and bool((logits < torch.inf).all())  # -inf forbids a token
        self.dtype = found.weight.dtype


def _is_shard_of(model: nn.Module, weight: Any) -> bool:
    """Return whether a head's weight is a shard that FSDP makes whole in a forward."""
    return sharding.is_sharded(model) and sharding.is_shard(weight)


def _scaling(model: nn.Module) -> tuple[float, float | None]:
    """Return the constants of the config that act on logits: a factor and Gemma's softcap."""
    config: Any = unwrapped(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    factor = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    scale = float(1.0 if factor is None else factor) / float(1.0 if divisor is None else divisor)
    return scale, getattr(config, "final_logit_softcapping", None)


@torch.no_grad()
def _what_differs(logits: Tensor, hidden: Tensor, found: HiddenAndHead) -> str | None:
    """Return how the model's logits of a few positions differ from those of their hidden states, or None if equal."""
    shown = hidden.detach().to(found.weight.dtype)
    ours = found.finished(whole_logits(nn.functional.linear, shown, found.weight, found.bias).float())
    logits = logits.detach().float()
    if logits.shape != ours.shape:
        return f"for {tuple(shown.shape)} hidden states the model gives {tuple(logits.shape)} logits"
    tolerance = 1e-4 if found.weight.dtype in (torch.float32, torch.float64) else 2e-2
    largest = float(ours.abs().nan_to_num(0.0, 0.0, 0.0).max())
    # The error is NaN where the model has diverged. It passes here, because the loss says where the NaN is.
    error = float(torch.where(logits == ours, 0.0, logits - ours).abs().max())
    if error > tolerance * max(largest, 1.0):
        return (
            f"the model's logits differ by up to {error:.2g} from those of its hidden states and head: it does "
            "more to them than dmfast knows of"
        )
    return None
