"""Read from a model's configuration and code what can be known of it without a forward."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

# PhiMoE's router_jitter_noise is left: it is a threshold of the router in evaluation too
_JITTER = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
_LENGTHS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
_IN_CONFIG = re.compile(r"\bconfig\.(\w*(?:drop|jitter)\w*)")


def disable_dropout(model: nn.Module) -> int:
    """Set every dropout probability and router jitter of the model to 0, LoRA's too, and return how many were above 0.

    The training mode stays as it is, because gradient checkpointing needs it. Where a forward reads a probability from
    the configuration, the configuration is changed, so a model that is saved afterwards has 0 there. A forward whose
    source can't be read is assumed to read every probability of its module's configuration.
    """
    changed = 0
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_dropout = name == "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop" in name
            if (is_dropout or name in _JITTER) and isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
                changed += 1
    for config, name in _read_from_config(model):
        if isinstance(getattr(config, name, None), float) and getattr(config, name) > 0:
            setattr(config, name, 0.0)
            changed += 1
    return changed


def _read_from_config(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yield each configuration from which a forward reads a probability, with the name of the probability."""
    names: dict[type, set[str] | None] = {}
    for module in model.modules():
        kind = type(module)
        if getattr(module, "config", None) is None or not kind.__module__.startswith("transformers"):
            continue
        if kind not in names:
            names[kind] = _read_by(kind)
        found = names[kind]
        if found is None:
            found = {name for name in vars(module.config) if "drop" in name or "jitter" in name}
        for name in sorted(found - {"router_jitter_noise"}):
            yield module.config, name


def _read_by(kind: type[nn.Module]) -> set[str] | None:
    """Return the names of the probabilities that a class's forward reads from its config, or None without source."""
    try:
        return set(_IN_CONFIG.findall(inspect.getsource(kind.forward)))
    except (OSError, TypeError):  # made by exec, a build without sources, a compiled extension
        return None


def without_adapters(model: nn.Module) -> Any:
    """Return the transformers model within a PEFT model."""
    found: Any = model
    return found.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language model, which in a multimodal one is a part of the whole."""
    config: Any = without_adapters(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attends_by_flash(model: nn.Module) -> bool:
    """Return whether attention computes only pairs of tokens of one sequence if a row holds several sequences."""
    return str(getattr(text_config(model), "_attn_implementation", "")).startswith("flash")


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens the model takes, prompt and continuation together, or None if no limit is known.

    If LongRoPE scales positions in another way beyond some length, the limit is that length. A sequence that crosses
    it, and the sequences of its batch, have other probabilities in one forward than step by step.
    """
    config = text_config(model)
    limits: list[Any] = [getattr(config, name, None) for name in _LENGTHS]
    limits = [limit - first_position(model) if isinstance(limit, int) else None for limit in limits]
    limits += [_switches_at(config)]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known) if known else None


def why_context(model: nn.Module) -> str:
    """Return what a message about the context adds if it is shorter than the config says: the reason, or nothing."""
    switch = _switches_at(text_config(model))
    if switch is None or switch != context_length(model):
        return ""
    return (
        f", since its LongRoPE (original_max_position_embeddings={switch}) scales positions otherwise beyond it, and "
        "a sequence that crosses it has another probability in one forward than step by step"
    )


def first_position(model: nn.Module) -> int:
    """Return the position of the first token: 0, or in models such as RoBERTa the position after that of padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _switches_at(config: Any) -> Any:
    """Return the length at which LongRoPE changes its factors, if the model has it."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return None
    for each in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if each.get("rope_type", each.get("type")) == "longrope":
            own = each.get("original_max_position_embeddings")
            return own or getattr(config, "original_max_position_embeddings", None)
    return None


def execution_device(model: nn.Module) -> torch.device:
    """Return the device for the model's inputs, which is where the layers run if the model is offloaded."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
    devices = [parameter.device for parameter in model.parameters()]
    return next((device for device in devices if device.type != "meta"), devices[0])


def text_inputs(model: nn.Module) -> list[str]:
    """Return the names of the inputs by which a multimodal model tells text from images. They are 0 on text.

    Some models demand them in training.
    """
    inner = without_adapters(model)
    if text_config(inner) is getattr(inner, "config", None):
        return []  # in a model of text alone, such as GPT-2, these inputs number the segments of a text, as in BERT
    parameters = inspect.signature(inner.forward).parameters
    return [name for name in ("token_type_ids", "mm_token_type_ids") if name in parameters]
