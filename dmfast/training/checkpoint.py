"""Write checkpoints that are either whole or absent.

The files are written to a folder beside the target, listed with their sizes, and moved into place at the end.

A checkpoint is transformers' folder with two more files: ``dmfast_state.pt`` (proposal, Z, lambda, estimators) and
``dmfast_manifest.json``, which lists every file with its size and so tells a truncated checkpoint from a whole one.
Under FSDP each rank writes its shards of the proposal into a folder beside them, ``dmfast_proposal``, by
``torch.distributed.checkpoint``, which another number of ranks can read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from ..kernels import warn_caller

STATE, MANIFEST, SHARDS = "dmfast_state.pt", "dmfast_manifest.json", "dmfast_proposal"
_STAGING = "_being-written"
FSDP, SPREAD = "FSDP", "a distributed_config"  # the ways in which the parameters of a run may be sharded


def write_manifest(folder: Path) -> None:
    """List the files of a finished checkpoint with their sizes in bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": sizes}, indent=1) + "\n")


def fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is whole."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not written by dmfast, or not to its end"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} can't be read"
    if STATE not in sizes:
        return f"it has no {STATE}: it was written with save_only_model=True"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
    return None


def _in_order(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    if not output_dir.is_dir():
        return []
    found = [p for p in output_dir.iterdir() if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def _asked(folder: Path | None, output_dir: Path, *, command: bool) -> str:
    """Return how to ask for a checkpoint, or for the newest one if ``folder`` is None."""
    if not command:
        return f"resume_from_checkpoint={True if folder is None else str(folder)!r}"
    if folder is None:
        return "--resume"
    return f"--resume {folder.name if folder.parent == output_dir else folder}"


def to_resume(wanted: str | bool, output_dir: Path, *, command: bool = False) -> Path:
    """Return the folder to resume from.

    Args:
        wanted: the folder's path, or its name in the run. True takes the newest checkpoint of the run.
        output_dir: the folder of the run.
        command: whether messages advise options of ``dmfast train``, and not arguments of ``DMTrainer.train``.

    Raises:
        ValueError: there is no checkpoint, or it is truncated; the message names the newest whole one.
    """
    checkpoints = _in_order(output_dir)
    if wanted is True:
        if not checkpoints:
            asked = _asked(None, output_dir, command=command)
            raise ValueError(f"{asked} takes the newest checkpoint, but there is no checkpoint in {output_dir}")
        folder = checkpoints[0]
        _warn_of_another_run(checkpoints, output_dir, command=command)
    else:
        folder = Path(str(wanted))
        if not folder.is_dir() and (output_dir / folder).is_dir():  # checkpoint-40 of the run
            folder = output_dir / folder
        checkpoints = checkpoints or _in_order(folder.parent)
    wrong = fault(folder)
    if wrong is None:
        return folder
    whole = next((p for p in checkpoints if p != folder and fault(p) is None), None)
    hint = (
        f"the newest whole one is {whole}: pass {_asked(whole, output_dir, command=command)}" if whole else
        "no other is whole"
    )  # fmt: skip
    raise ValueError(f"the checkpoint {folder} can't be resumed from: {wrong}; {hint}")


def _warn_of_another_run(checkpoints: list[Path], output_dir: Path, *, command: bool) -> None:
    """Warn if the first checkpoint, which has the highest step, was written before another one."""
    written = {folder: (folder / MANIFEST).stat().st_mtime for folder in checkpoints if (folder / MANIFEST).is_file()}
    last = max(written, key=lambda folder: written[folder], default=checkpoints[0])
    if checkpoints[0] in written and written[checkpoints[0]] < written[last]:
        warn_caller(
            f"the run goes on from {checkpoints[0]}, which has the highest step, although {last} was written later, "
            "probably by another run into the same folder; to go on with that, pass "
            f"{_asked(last, output_dir, command=command)}"
        )


def step_of(folder: Path) -> int | None:
    """Return the number of steps that a checkpoint's run had taken, or None if the checkpoint does not tell."""
    step = _trainer_state(folder).get("global_step")
    return step if isinstance(step, int) else None


def best_of(folder: Path) -> Path | None:
    """Return the best checkpoint so far of the run that wrote a checkpoint, or None if it is not there."""
    best = _trainer_state(folder).get("best_model_checkpoint")
    return Path(best) if isinstance(best, str) and Path(best).is_dir() else None


def _trainer_state(folder: Path) -> dict[str, Any]:
    """Return what transformers wrote of a run into a checkpoint, or {} if it can't be read."""
    try:
        found = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def warn_of_earlier_run(output_dir: Path, *, command: bool = False) -> None:
    """Warn if a run that starts anew finds checkpoints of another run in its folder.

    Args:
        output_dir, command: as in ``to_resume``.
    """
    found = _in_order(output_dir)
    if found:
        warn_caller(
            f"this run starts anew, and {output_dir} has {found[0].name} of an earlier one, from which "
            f"{_asked(None, output_dir, command=command)} would go on while its step is the highest; give each run an "
            "output_dir of its own, or remove the old checkpoints"
        )


@contextmanager
def staged(output_dir: Path, name: str, writes: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """Yield a folder for the files of the checkpoint ``name``.

    The folder becomes ``output_dir/name`` if the block ends without an error.

    Args:
        writes: whether this process makes, moves and removes folders (rank 0).
        barrier: waits for all ranks.

    Raises:
        OSError: a file could not be written. Earlier checkpoints are as they were.
    """
    from safetensors import SafetensorError

    staging, target = output_dir / f"{_STAGING}-{name}", output_dir / name
    try:
        if writes:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        barrier()
        yield staging
        barrier()
        if writes:
            write_manifest(staging / name)
            if target.exists():
                os.replace(target, staging / "replaced")
            os.replace(staging / name, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is a RuntimeError of torch.save
        kept = next((str(p) for p in _in_order(output_dir) if fault(p) is None), None)
        raise OSError(
            f"the checkpoint {target} could not be written: {error}. "
            + (f"Nothing of it is left; the previous one, {kept}, is whole" if kept else "There is no earlier one")
        ) from error
    finally:
        if writes:
            if (staging / "replaced").exists() and not target.exists():
                os.replace(staging / "replaced", target)
            shutil.rmtree(staging, ignore_errors=True)
    barrier()


def save_state(state: dict[str, Any], folder: Path, *, writes: bool, sharded: str | None) -> None:
    """Write dmfast's own state into a checkpoint. All ranks call it.

    Args:
        state: what ``DMTrainer.state_dict`` returned.
        folder: the checkpoint.
        writes: whether this process writes what all processes have.
        sharded: what has sharded the proposal's parameters. With ``FSDP`` each process writes its shards here. With any
            other name they are written already. None means that the parameters are whole.

    Raises:
        OSError: the state could not be written.
    """
    proposal = state["matcher"]["proposal"]
    if sharded == FSDP and proposal is not None:
        from torch.distributed import checkpoint

        try:
            checkpoint.save({"proposal": proposal["model"]}, checkpoint_id=folder / SHARDS)
        except checkpoint.CheckpointException as error:  # this class derives from BaseException
            raise OSError(f"{folder / SHARDS} could not be written: {error}") from error
    if sharded and proposal is not None:
        proposal = proposal | {"model": None}
    if writes:
        matcher = state["matcher"] | {"proposal": proposal}
        torch.save(state | {"matcher": matcher, "sharded": sharded}, folder / STATE)


def check_kind(state: dict[str, Any], folder: Path, sharded: str | None) -> None:
    """Check that a checkpoint is of a run that was sharded as this one is.

    Args:
        state: as ``load_state`` read it.
        folder: the checkpoint.
        sharded: as in ``save_state``.

    Raises:
        ValueError: the run of the checkpoint was sharded in another way.
    """
    found = state.get("sharded")
    found = FSDP if found is True else found or None  # older checkpoints say True for FSDP
    if found != sharded:
        of, this = ("without sharding" if each is None else f"under {each}" for each in (found, sharded))
        raise ValueError(
            f"the checkpoint {folder} is of a run {of}, and this run is {this}: optimiser and proposal are kept in "
            "another way. Go on as the run began, or train the saved model anew"
        )


def with_proposal(state: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the state with q's parameters in it."""
    proposal = state["matcher"]["proposal"] | {"model": tensors}
    return state | {"matcher": state["matcher"] | {"proposal": proposal}}


def load_shards(state: dict[str, Any], folder: Path, shards: dict[str, Any]) -> dict[str, Any]:
    """Return the state with the proposal's parameters as this rank's shards. All ranks call it.

    Args:
        state: the state of a run under FSDP, as ``load_state`` read it.
        folder: the checkpoint.
        shards: tensors like those of the proposal. They are overwritten.

    Raises:
        RuntimeError: the checkpoint is of another model.
    """
    from torch.distributed import checkpoint

    try:
        checkpoint.load({"proposal": shards}, checkpoint_id=folder / SHARDS)
    except (checkpoint.CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise RuntimeError(f"{folder / SHARDS} does not hold the parameters of this proposal: {error}") from error
    return with_proposal(state, shards)


def load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """Read the state that ``save_state`` wrote.

    Raises:
        ValueError: there is no such file, or it can't be read.
    """
    # under FSDP accelerate names the device cpu:0, which torch.load does not know
    where = torch.device("cpu") if device.type == "cpu" else device
    try:
        state: dict[str, Any] = torch.load(folder / STATE, map_location=where, weights_only=True)
    except Exception as error:
        raise ValueError(f"{folder / STATE} can't be read: {error}") from error
    return state


def upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's state in the format of this version of dmfast.

    Raises:
        ValueError: the state is of a version that this one does not know.
    """
    if "matcher" in state:
        return state
    carried = ("beta", "partitions", "scale", "returns", "zero_steps", "steps")
    kept = ("target", "proposal", "estimates", "q_is_base", "pool")
    missing = [key for key in (*carried, *kept, "contexts", "batch") if key not in state]
    if missing:
        raise ValueError(
            f"the checkpoint's {STATE} is of no format that this version of dmfast reads: it has no 'matcher', and for "
            f"the format of 0.1 it lacks {', '.join(missing)}"
        )
    batch = state["batch"]
    if batch is not None:
        samples = batch["samples"] | {"context_id": batch["context"]}
        log_base = torch.full_like(samples["log_prob"], torch.nan)  # a repeated batch does not need it
        batch = {key: batch[key] for key in ("inputs", "features", "advantage", "epoch", "beta")}
        batch |= {"samples": samples, "log_base": log_base}
    running = {key: state[key] for key in carried}
    matcher = {key: state[key] for key in kept}
    matcher |= {"format": 2, "running": running | {"lambda": state["target"]["lambda"]}, "batch": batch}
    return {"contexts": state["contexts"], "matcher": matcher}
