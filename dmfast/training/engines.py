"""Make the engine that draws for a run, which may run ahead, and the error that ends a run when its engine fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ..families import without_adapters
from ..models import LanguageModel
from ..sampling import AsyncSampler, EngineError, Sampler, make
from ..sampling.engine import Engine
from . import fsdp
from .config import DMConfig
from .data import Contexts
from .stream import Stream


def engine_of(args: DMConfig, policy: LanguageModel, rows: Contexts | Stream) -> Engine | None:
    """Return the engine that draws from q, connected or started, or None if the proposal's own copy draws.

    Raises:
        ValueError, EngineError, ImportError: as ``dmfast.sampling.make``; also if the engine can't draw as the run
            asks, or the policy has an adapter under FSDP.
    """
    if args.sampler == "model":
        return None
    if fsdp.asked(args) is not None and without_adapters(policy.model) is not policy.model:
        raise ValueError(
            f"sampler={args.sampler!r} gets an adapter merged into its base, which was not tried under FSDP: train the "
            "whole model, or without FSDP"
        )
    options: dict[str, Any] = dict(cast("dict[str, Any]", args.sampler_options) or {})
    if args.sampler != "vllm":
        # the name begins with _ because a push to the hub leaves such names out
        options = {"folder": str(Path(args.output_dir) / "_q"), **options}
    engine = make(args.sampler, policy, options)
    prompts = rows.first or None if isinstance(rows, Stream) else [prompt for _, prompt in rows]
    engine.check(max_new_tokens=args.max_new_tokens, temperature=args.temperature, prompts=prompts)
    return engine


def sampler_of(engine: Engine | None, args: DMConfig) -> Sampler | None:
    """Return the sampler of the proposal: the engine, or an ``AsyncSampler`` around it that runs ahead."""
    if engine is None or not args.sampler_ahead:
        return engine
    return AsyncSampler(engine, args.sampler_ahead, max_lag=args.sampler_max_lag)


def ended(error: EngineError, args: DMConfig, run: Path, step: int) -> EngineError:
    """Return the error that ends a run whose engine has failed. It says how to go on.

    Args:
        error: the failure of the engine.
        args: the arguments of the run.
        run: the folder of the run.
        step: the number of steps that the run has taken.
    """
    if step == 0:
        return EngineError(f"{error}. The run has not taken a step yet")
    if args.save_only_model:
        return EngineError(
            f"{error}. The run ends after step {step}; with save_only_model=True {run / f'checkpoint-{step}'} holds "
            "the policy alone, from which no run goes on"
        )
    return EngineError(
        f"{error}. The run ends after step {step}, and {run / f'checkpoint-{step}'} holds all of it, q too: when an "
        "engine runs again, go on with resume_from_checkpoint=True (dmfast train --resume)"
    )
