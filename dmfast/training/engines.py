"""What draws for a run from outside of it: an engine, which may run ahead, and how a run ends when it fails."""

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


def engine_of(args: DMConfig, policy: LanguageModel, rows: Contexts) -> Engine | None:
    """Return the engine that draws from q, connected or started; None: the proposal's own copy draws.

    Raises:
        ValueError, EngineError, ImportError: as ``dmfast.sampling.make``; the engine can't draw as the run asks, or the
            policy has an adapter under FSDP.
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
        # a push to the hub leaves out what begins with _
        options = {"folder": str(Path(args.output_dir) / "_q"), **options}
    engine = make(args.sampler, policy, options)
    engine.check(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, prompts=[prompt for _, prompt in rows],
    )  # fmt: skip
    return engine


def sampler_of(engine: Engine | None, args: DMConfig) -> Sampler | None:
    """Return what draws for the proposal: the engine, which may run ahead."""
    if engine is None or not args.sampler_ahead:
        return engine
    return AsyncSampler(engine, args.sampler_ahead, max_lag=args.sampler_max_lag)


def ended(error: EngineError, args: DMConfig, run: Path, step: int) -> EngineError:
    """Return the error with which a run ends whose engine has failed.

    Args:
        error: the failure.
        args: those of the run.
        run: the folder of the run.
        step: how many steps it has taken.
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
