"""Hook ``DMTrainer`` into transformers' loop: at the end of a step, at Ctrl-C, and to print log lines."""

from __future__ import annotations

import math
import re
import signal
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback
from transformers.utils import logging

from ..unseen import said

logger = logging.get_logger(__name__)


class StepEnd(TrainerCallback):  # type: ignore[misc]
    """A callback before and after ``optimizer.step()``, before anything logs, evaluates or saves this step."""

    def __init__(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._before, self._after = before, after

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call back when all gradients of the step are computed."""
        self._before()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call back when the policy has moved and the step is not yet counted."""
        self._after()


class EpochOrder(TrainerCallback):  # type: ignore[misc]
    """A callback that sets the epoch of the rows' order.

    Until transformers 5.16 a resumed run took the order of the first epoch, because its loader is wrapped in one that
    skips the rows that were seen.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Set the epoch before accelerate wraps the loader."""
        train_dataloader.set_epoch(int(state.epoch or 0))


class Intervals(TrainerCallback):  # type: ignore[misc]
    """A callback that logs, evaluates and saves at the intervals of the arguments, also in a run that goes on.

    Without it, a resumed run would keep the intervals that its checkpoint recorded.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the intervals."""
        state.compute_steps(args, state.max_steps)


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """A callback that ends training at Ctrl-C.

    The first Ctrl-C ends it after the current step, with a checkpoint. The second one ends it at once.
    """

    def __init__(self) -> None:
        self.asked = False  # whether this process has received Ctrl-C
        self.agreed = False  # whether the ranks have agreed on it at the end of the step
        self._saved = -1
        self._previous: Any = None
        self._installed = False

    def install(self) -> None:
        """Install the handler of Ctrl-C. Only the main thread may, so any other thread does nothing."""
        self.asked = self.agreed = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)
            self._installed = True

    def remove(self) -> None:
        """Restore the handler that Ctrl-C had before."""
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)
            self._installed = False

    def _ask(self, signum: int, frame: Any) -> None:
        if self.asked:
            self.remove()
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("Ctrl-C: training ends after this step, with a checkpoint. A second Ctrl-C ends it at once.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop and save if the ranks have agreed to."""
        if self.agreed:
            control.should_training_stop = True
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step of the checkpoint."""
        self._saved = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask again for the checkpoint that save_strategy="best" called off after an evaluation in the same step."""
        if self.agreed and self._saved != state.global_step:
            control.should_save = True


class _Manager(CheckpointManager):  # type: ignore[misc]
    """A manager without a sentinel file, because ``DMTrainer``'s checkpoints are either whole or absent."""

    def execute_jit_checkpoint(self) -> None:
        """Save a checkpoint now."""
        self.is_checkpoint_requested = False
        self.trainer._save_checkpoint(self.trainer.model, trial=None)


class JITCheckpoint(JITCheckpointCallback):  # type: ignore[misc]
    """A callback that saves a checkpoint at SIGTERM.

    At the end of a step it logs the step's line first, so that the checkpoint has the line.

    Several ranks save only at the end of a step, where they agree on it. Within a step, one of them would save alone.
    """

    def set_trainer(self, trainer: Any) -> None:
        """Take over SIGTERM."""
        self.trainer, self.agreed = trainer, False
        self.jit_manager = _Manager(trainer)
        self.jit_manager.setup_signal_handler()

    @property
    def asked(self) -> bool:
        """Whether this process has received SIGTERM."""
        return bool(self.jit_manager.is_checkpoint_requested)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save a checkpoint of the previous step if one is asked for, because this step is not done."""
        if args.world_size == 1:
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save a checkpoint of the previous step if one is asked for."""
        if args.world_size == 1:
            super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log, save and stop, in this order, if a checkpoint is asked for. There is no time for an evaluation."""
        if self.agreed or (args.world_size == 1 and self.asked):
            self.agreed = self.jit_manager.is_checkpoint_requested = False
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    on_epoch_end = on_step_end


def in_words(value: float, form: str = ".3f") -> str:
    """Return a number in this format, "unknown" for NaN, and 0 without a sign."""
    text = format(value, form)
    return "unknown" if math.isnan(value) else text.removeprefix("-") if not float(text) else text


def log_line(step: int, logs: Mapping[str, Any], shares: Collection[str] = ()) -> str:
    """Return one step, evaluation or end of training as a line.

    Args:
        step: the number of the step.
        logs: what was logged.
        shares: the names of the features that are 0 or 1, whose mean is the share of the sequences that have them.
    """
    evaluation = any(key.startswith("eval_") for key in logs)
    # the prefix is eval_, or eval_<name>_ for one of several eval sets
    known = (key.removesuffix("kl_policy_base") for key in logs if re.fullmatch("eval_(.+_)?kl_policy_base", key))
    prefix = next(known, "eval_") if evaluation else ""

    def number(key: str, form: str = ".3f") -> str:
        value = logs.get(prefix + key)
        return in_words(value, form) if isinstance(value, (int, float)) else ""

    def with_error(key: str) -> str:
        value, error = number(key), number(f"{key}_stderr")
        return f"{value} ± {error}" if error not in ("", "unknown") else value

    missing = {k.split("/", 1)[1]: v for k, v in logs.items() if k.startswith(f"{prefix}unseen/")}
    unknown = f"unknown: {said(missing)}" if missing else ""
    if not unknown and logs.get("z") == 0:
        unknown = "unknown: no sequence met all constraints"
    of = f" of {prefix[5:-1]}" if len(prefix) > 5 else ""
    parts = [f"step {step:4d}" + (f" evaluation{of}" if evaluation else "")]
    for key in logs:
        if key.startswith(f"{prefix}phi/") and not key.endswith("_stderr"):
            name = key.split("/", 1)[1]
            mean = with_error(f"phi/{name}") if evaluation else number(f"phi/{name}")
            parts.append(f"{'share' if name in shares else 'mean'} of {name} {mean}")
    of_k = [key.removeprefix(prefix) for key in logs if re.fullmatch(rf"{re.escape(prefix)}pass@\d+", key)]
    parts += [f"{key} {with_error(key)}" for key in dict.fromkeys([*of_k[:1], *of_k[-1:]])]
    for key, title in (("kl_policy", "KL(p‖π)"), ("kl_policy_base", "KL(π‖a)"), ("z", "Z"),
                       ("ess", "effective sequences"), ("swaps", "swaps"), ("runtime", "seconds")):  # fmt: skip
        if prefix + key in logs and not (key == "runtime" and not evaluation):
            form = {"z": "#.4g", "ess": ".0f", "swaps": ".0f", "runtime": ".1f"}.get(key)
            shown = number(key, form) if form else with_error(key)
            if key == "kl_policy" and unknown:
                shown = unknown
            if key == "ess" and "sequences" in logs and shown != "unknown":
                shown = f"{shown} of {logs['sequences']:.0f}"
            if key == "z" and "log_z_gap" in logs:
                gap = logs["log_z_gap"]
                shown += f" (log Z is {abs(gap):.2g} {'above' if gap > 0 else 'below'} the fit's: q stays)"
            parts.append(f"{title} {shown}")
    if "seconds_sampling" in logs:
        seconds = "  ".join(f"{what} {logs[f'seconds_{what}']:.2f}" for what in ("sampling", "scoring", "policy"))
        parts.append(f"seconds: {seconds}")
    if "train_runtime" in logs:
        return f"{parts[0]}  done after {logs['train_runtime']:.1f} seconds"
    if len(parts) == 1:
        parts += [f"{key} {value:.4g}" for key, value in logs.items() if isinstance(value, (int, float))]
    return "  ".join(parts)


class LogLine(TrainerCallback):  # type: ignore[misc]
    """A callback that prints one line per log where there is no progress bar. ``shares`` is as in ``log_line``."""

    def __init__(self, shares: Collection[str] = ()) -> None:
        self._shares = shares

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the line on rank 0."""
        if logs and state.is_world_process_zero:
            print(log_line(state.global_step, logs, self._shares), flush=True)


class Progress(ProgressCallback):  # type: ignore[misc]
    """transformers' progress bar, with the line of ``LogLine`` above it."""

    def __init__(self, shares: Collection[str] = ()) -> None:
        super().__init__()
        self._shares = shares

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line above the bar."""
        if logs and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(log_line(state.global_step, logs, self._shares))
