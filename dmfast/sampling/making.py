"""Make engines by the names that a configuration has for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..models import LanguageModel
from .engine import Engine
from .vllm_http import HTTPSampler, Server
from .vllm_local import VLLMSampler


def check_options(sampler: Any, options: Any) -> None:
    """Check the name of a sampler and its options. Nothing is reached or loaded.

    Args:
        sampler: ``model``, ``vllm``, or the address of a server.
        options: a mapping, or None.

    Raises:
        ValueError: there is no such sampler, or it has no such option.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"sampler_options must be a mapping of argument names, got {options!r:.100}")
    if sampler == "model":
        if options:
            raise ValueError(f"sampler='model' has no options, got sampler_options={dict(options)!r:.100}")
        return
    kind = _kind(sampler)
    taken = [name for name in inspect.signature(kind).parameters if name not in ("url", "like")]
    unknown = [name for name in options or {} if name not in taken]
    if unknown:
        raise ValueError(
            f"sampler_options has {', '.join(map(str, unknown))}, which sampler={sampler!r} does not take; it takes "
            f"{', '.join(taken)}"
        )
    if kind is HTTPSampler:
        Server(sampler)


def make(sampler: str, like: LanguageModel, options: Mapping[str, Any] | None = None) -> Engine:
    """Return the engine of this name, connected or started; ``OfflineProposal(policy, sampler=...)`` then loads it.

    Args:
        sampler: ``vllm`` or the address of a server.
        like: the policy.
        options: the further arguments of ``VLLMSampler`` or ``HTTPSampler``.

    Raises:
        ValueError, EngineError, ImportError: as in ``check_options`` and in the sampler.
    """
    check_options(sampler, options)
    if _kind(sampler) is VLLMSampler:
        return VLLMSampler(like, **(options or {}))
    return HTTPSampler(sampler, like, **(options or {}))


def _kind(sampler: Any) -> type[Engine]:
    if sampler == "vllm":
        return VLLMSampler
    if isinstance(sampler, str) and sampler.startswith(("http://", "https://")):
        return HTTPSampler
    raise ValueError(
        f"sampler must be 'model', 'vllm' or the address of a vLLM server, http://host:port, got {sampler!r}"
    )
