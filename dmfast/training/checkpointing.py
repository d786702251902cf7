"""Write and read the checkpoints and the saved models of a run, whole or not at all, however its parameters are cut."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from ..kernels import warn_caller
from ..matcher import Matcher
from ..models import LanguageModel
from ..proposal import OfflineProposal
from ..targets import EBM
from ..tensors import address
from . import checkpoint, deepspeed, distributed_config, pickles, resume
from .card import model_card
from .data import Contexts
from .saving import save_plainly
from .stream import Stream
from .versions import remove_old_checkpoints


class TiedParameters:
    """The part of a trainer that does not report a parameter as missing if the checkpoint has it under a tied name."""

    model: nn.Module

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # a file holds tied parameters under one of their names only, and that one name loads them all
        named = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {address(p) for name, p in named.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if name not in named or address(named[name]) not in loaded]
        super()._issue_warnings_after_load(  # type: ignore[misc]
            load_result._replace(missing_keys=missing)
        )


class CheckpointingTrainer(TiedParameters, Trainer):  # type: ignore[misc]
    """The part of ``DMTrainer`` that writes to disk and reads from it, around transformers' own.

    Attributes:
        policy, proposal, matcher: the objects whose state a checkpoint holds in addition to transformers' files.
        target: the target, whose settings are compared with a checkpoint's.
    """

    policy: LanguageModel
    proposal: OfflineProposal[LanguageModel] | None
    matcher: Matcher
    target: EBM
    _rows: Contexts | Stream
    _is_spread: bool  # whether transformers spread the model over processes as it loaded it
    _staging: str | None = None  # the folder of a checkpoint that is being written
    _push_later: bool = False
    _random_state_of: str | None = None  # the checkpoint to go on from, until its random state is loaded
    _model_step: int | None = None  # the step of the model, if it is not the last step
    _changes: dict[str, tuple[Any, Any]]  # the settings that have changed since the checkpoint to go on from
    brings_optimizer: bool  # whether the optimiser is not made from the arguments

    def _load_best_model(self) -> None:
        pickles.refuse_code(Path(self.state.best_model_checkpoint))
        if self._is_spread:
            self.policy.load(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
        self._model_step = self.state.best_global_step

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or cast(str, super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        writes = bool(self.args.should_save)
        with checkpoint.staged(run_dir, name, writes, self.accelerator.wait_for_everyone) as staging:
            self._staging = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            best = self.state.best_global_step
            if best:
                folder = run_dir / f"checkpoint-{best}"
                self.state.best_model_checkpoint = str(folder) if folder.is_dir() or folder.name == name else None
            if writes:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
            if not self.args.save_only_model:
                state = self.state_dict() | deepspeed.mark(self.accelerator)
                if self._is_spread:
                    self._save_parts(staging / name, state["matcher"]["proposal"])
                checkpoint.save_state(state, staging / name, writes=writes, sharded=self._sharding)
        if self._push_later:
            self._push_later = False
            if writes and self.args.hub_strategy != "end":
                self._write_card(Path(self.args.output_dir))  # transformers then adds the model and pushes
            super()._push_from_checkpoint(str(run_dir / name))
        if writes:
            remove_old_checkpoints(self, run_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._push_later = True  # the checkpoint is not in its place yet

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # only once, because transformers loads the state again after get_batch_samples, where a scorer may have drawn
        if self._random_state_of is not None:
            self._random_state_of = None
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # dmfast's state comes first: it refuses what does not fit before anything has changed
        folder = Path(resume_from_checkpoint)
        self.load_state_dict(self._state_in(folder))
        if self._is_spread:
            self.policy.load(folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # transformers lets DeepSpeed load its own checkpoint here, and calls no _load_from_checkpoint
        state = self._state_in(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        found = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        deepspeed.begin(self.deepspeed, self.policy, self.proposal)
        if state is not None:
            self.load_state_dict(state)
        return found

    def resumable_state(self, folder: Path) -> dict[str, Any]:
        """Return dmfast's own state from a checkpoint, without shards of q, and change nothing.

        Raises:
            ValueError: the checkpoint can't be read, one of its files could run code, its run was sharded in another
                way, or a setting that its state depends on has changed.
        """
        pickles.refuse_code(folder)
        best = checkpoint.best_of(folder) if self.args.load_best_model_at_end else None
        if best is not None:
            pickles.refuse_code(best)
        state = checkpoint.load_state(folder, self.args.device)
        checkpoint.check_kind(state, folder, self._sharding)
        deepspeed.refuse_state(state, folder, self.accelerator)
        self._refuse_changes(state, folder)
        return state

    def _state_in(self, folder: Path) -> dict[str, Any]:
        """Return dmfast's part of a checkpoint of a run like this one, with q's parameters.

        Raises:
            ValueError: as ``resumable_state``.
        """
        state = self.resumable_state(folder)
        if not self._sharding or self.proposal is None or state["matcher"]["proposal"] is None:
            return state
        of_q = self.proposal.state_dict()["model"]
        if not self._is_spread:
            return checkpoint.load_shards(state, folder, of_q)
        parts = distributed_config.load_parts(folder, self.args.process_index, self.model)
        return checkpoint.with_proposal(state, distributed_config.proposal_of(parts, of_q))

    @property
    def _sharding(self) -> str | None:
        """The way in which the parameters are sharded, or None if they are whole."""
        if self._is_spread:
            return checkpoint.SPREAD
        return checkpoint.FSDP if self.is_fsdp_enabled else None

    def _save_parts(self, folder: Path, proposal: dict[str, Any] | None) -> None:
        q = None if proposal is None else proposal["model"]
        distributed_config.save_parts(folder, self.args.process_index, self.model, self.optimizer, q)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_spread:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:  # the optimiser's states are written with q's parameters
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self._load_optimizer_states(checkpoint)
        resume.set_hyperparameters(
            self.optimizer, self.lr_scheduler, fresh, self._changes, kept=self.brings_optimizer
        )  # fmt: skip

    def _load_optimizer_states(self, checkpoint: str) -> None:
        if not self._is_spread:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        parts = distributed_config.load_parts(folder, self.args.process_index, self.model)
        distributed_config.load_optimizer(self.optimizer, parts)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def state_dict(self) -> dict[str, Any]:
        """Return dmfast's part of a checkpoint: the matcher's state, the prompts that its Z belong to, the settings."""
        read = self._rows.read if isinstance(self._rows, Stream) else None
        return {
            "contexts": self._rows.digest,
            "matcher": self.matcher.state_dict(),
            "settings": resume.settings_of(self),
            "stream": read,
        }

    def _changes_since(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ from a checkpoint's state. A setting that it has not recorded is left out."""
        return resume.changed(resume.recorded_in(state), resume.settings_of(self))

    def _refuse_changes(self, state: dict[str, Any], folder: object) -> None:
        kind = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        resume.refuse(
            self._changes_since(state), folder, deepspeed=bool(self.is_deepspeed_enabled),
            scheduler="" if self.brings_optimizer else kind,
        )  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned.

        A warning says which settings differ and what follows from it.

        Raises:
            ValueError: the state is of an on-policy run and this run is offline, or the reverse; it is of another
                target; a setting that it depends on has changed (``training/resume.py``); or it has a format that this
                version of dmfast does not read.
            RuntimeError: the state is of another model. Nothing has changed then.
        """
        state = checkpoint.upgraded(state)
        changes, steered = self._changes_since(state), self.matcher.settings.steered is not None
        self._refuse_changes(state, "the checkpoint")
        matcher = resume.renewed(state["matcher"], changes, steered=steered)
        if state["contexts"] != self._rows.digest:
            warnings.warn("the checkpoint is of a run on other prompts: Z of each context starts anew", stacklevel=2)
            matcher = resume.without_z(matcher)
        self.matcher.load_state_dict(matcher)
        if isinstance(self._rows, Stream):
            self._rows.expect(None if self.args.ignore_data_skip else state.get("stream"))
        self._changes = changes
        said = resume.describe(changes, steered=steered)
        if said:
            warn_caller(said)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as transformers does. Under FSDP the model is always saved whole. All ranks call it."""
        whole = bool(self.is_deepspeed_enabled) and self.deepspeed is None  # training has not begun
        if whole or (self.is_fsdp_enabled and not _internal_call):  # here transformers fails, or may write nothing
            self._save(output_dir, None if whole else self.accelerator.get_state_dict(self.model))
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save = super()._save
        ends = self.policy.eos_token_ids
        save_plainly(model, folder, lambda: save(output_dir, state_dict), ends, writes=self.args.should_save)
        if self.args.should_save:
            self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        (folder / "README.md").write_text(model_card(self), encoding="utf-8")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of ``save_model`` into ``args.output_dir``."""
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir))
