"""Run ``DMTrainer`` under FSDP2: refuse what was not tried, and let accelerate shard policy, base and proposal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import accelerate
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import TrainingArguments

from .. import sharding
from . import launcher

_HOW = "fsdp=True in DMConfig, started by torchrun or accelerate launch with one process for each GPU"
UNCHECKED = (
    "gather_for_sampling=False leaves the model sharded, and check_scores=True compares scores with draws in forwards "
    "whose number differs by rank: set check_scores=False, after a short run with gather_for_sampling=True, or a "
    "smaller model of the same family, has passed the check"
)
TRIED = {"torch": "2.13", "accelerate": "1.15", "transformers": "5.24"}


def asked(args: TrainingArguments) -> str | None:
    """Return the name of what asks for FSDP, an argument or ``accelerate launch``, or None if nothing does."""
    return launcher.asked(args, "fsdp", "ACCELERATE_USE_FSDP")


def refuse_arguments(args: TrainingArguments) -> None:
    """Refuse what does not go with FSDP, before an accelerator is made.

    Raises:
        ValueError: FSDP is asked for in one process, or together with an option that was not tried with it.
        ImportError: a library is older than the version that FSDP was tried with.
    """
    by = asked(args)
    if by is None:
        return
    if args.world_size == 1:
        raise ValueError(f"{by} asks for FSDP, and this is one process, which can't shard anything: {_HOW}")
    for library in (torch, accelerate, transformers):
        floor = TRIED[library.__name__]
        if Version(library.__version__) < Version(floor):
            raise ImportError(
                f"FSDP, which {by} asks for, was tried with {library.__name__} {floor}, and {library.__version__} is "
                "installed: update it, or use DDP"
            )
    refused = {
        "gradient_variance_steps": "it differentiates each sequence alone; measure it in one process",
        "proposal_device": "the proposal is sharded like the policy",
        "torch_compile": "that was not tried",
    }
    for name, why in refused.items():
        if getattr(args, name):
            raise ValueError(f"{name}={getattr(args, name)!r} does not run under FSDP, which {by} asks for: {why}")
    if not args.gather_for_sampling and args.check_scores:
        raise ValueError(UNCHECKED)


def refuse_plugin(accelerator: Any, args: TrainingArguments) -> None:
    """Refuse any sharding but FSDP2 as it was tried, once accelerate says what it runs.

    Raises:
        ValueError: accelerate does not run what was asked for, or it runs FSDP1 or an option that was not tried, such
            as CPU offload.
    """
    by = asked(args)
    if by is None:
        return
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            "DMTrainer runs under FSDP2 and not under FSDP1: set fsdp_config={'version': 2}, or "
            "accelerate launch --fsdp_version 2"
        )
    if plugin is None or not accelerator.is_fsdp2:
        raise ValueError(
            f"{by} asks for FSDP, and accelerate runs {accelerator.distributed_type.value} on {accelerator.device}, "
            f"where nothing is sharded: {_HOW}. On a CPU accelerate does not shard"
        )
    from torch.distributed.fsdp import CPUOffloadPolicy

    refused = {
        "cpu_offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "activation_checkpointing": plugin.activation_checkpointing,
        "ignored_modules": plugin.ignored_modules is not None,
        "auto_wrap_policy=SIZE_BASED_WRAP": "size_based" in getattr(plugin.auto_wrap_policy, "__name__", ""),
    }
    for name, found in refused.items():
        if found:
            why = "; take gradient_checkpointing=True of DMConfig" if name == "activation_checkpointing" else ""
            raise ValueError(f"{name} of FSDP was not tried with DMTrainer{why or '; leave it out'}")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision in {accelerator.mixed_precision} was not tried under FSDP; take bf16=True")


def loads_on_rank_0(accelerator: Any) -> bool:
    """Return whether only rank 0 has the weights of a model before it is sharded."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)


def shard(accelerator: Any, models: Sequence[nn.Module], kept_whole: Sequence[nn.Module]) -> None:
    """Shard models in place, as accelerate shards a model that it prepares.

    Args:
        accelerator: the accelerator, whose ``fsdp_plugin`` says how to shard.
        models: the models to shard.
        kept_whole: those of the models that are only sampled from. Their layers stay whole after a forward.

    Raises:
        RuntimeError: accelerate left one of them whole.
        ValueError: a model is quantised.
    """
    from accelerate.utils import fsdp2_prepare_model

    for model in models:
        if getattr(model, "hf_quantizer", None) is not None:
            raise ValueError("quantised models were not tried under FSDP; load the model in bfloat16 or float32")
        if fsdp2_prepare_model(accelerator, model) is not model or not sharding.is_sharded(model):
            raise RuntimeError(f"accelerate did not shard the {type(model).__name__}: it is another module, or whole")
    if not accelerator.state.fsdp_plugin.reshard_after_forward:
        kept_whole = models
    for model in kept_whole:
        sharding.keep_whole(model)
