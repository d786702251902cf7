"""Read a finished or a running job from the files that it has written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..estimators import Estimate
from ..metrics import logged_features

_SAMPLES = 20


@dataclass(frozen=True)
class Run:
    """Hold one run.

    Attributes:
        name: the name that tells the run from the other runs of a page.
        source: the file that the run was read from.
        settings: the settings of the run, flat, with dotted names.
        steps: the logs of training, in order. Each entry has ``step``.
        evaluations: the logs of evaluations, in order. Each entry has ``step``.
        before, after, ideal: ``phi/<feature>``, ``kl_policy_base``, ... of the base, of the policy at the end, and of
            p.
        swaps: the number of swaps of the proposal.
        seconds: the seconds of training; None if not known.
        verdict: whether the run came to its target, in words; empty if the file does not say.
        samples_before, samples_after: texts.
        prompts_before, prompts_after: the prompt of each of these texts, or None where there was none. Empty if the
            file does not say.
        machine: the machine of the run.
    """

    name: str
    source: Path
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    before: dict[str, Estimate]
    after: dict[str, Estimate]
    ideal: dict[str, Estimate]
    swaps: int
    seconds: float | None
    verdict: str = ""
    samples_before: list[str] = field(default_factory=list)
    samples_after: list[str] = field(default_factory=list)
    prompts_before: list[str | None] = field(default_factory=list)
    prompts_after: list[str | None] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> list[str]:
        """The names of the moments and of the monitored features."""
        return list(dict.fromkeys([*logged_features(self.steps[0]), *logged_features(self.after)]))

    @property
    def rewards(self) -> list[str]:
        """The names of the rewards, where there are several."""
        logged = dict.fromkeys(key for step in self.steps for key in step if key.startswith("rewards/"))
        return [key[len("rewards/") : -len("/mean")] for key in logged if key.endswith("/mean")]

    @property
    def asked(self) -> list[int]:
        """The k of pass@k, ascending."""
        return sorted(self.passed(self.after) or self.passed(self.before))

    @staticmethod
    def passed(measures: Mapping[str, Estimate]) -> dict[int, Estimate]:
        """Return pass@k by k, ascending, of ``before`` or ``after``; those that are finite."""
        found = {int(m[1]): e for name, e in measures.items() if (m := re.fullmatch(r"pass@(\d+)", name))}
        return {k: found[k] for k in sorted(found) if math.isfinite(found[k].value)}

    def front(self, k: int) -> list[tuple[Estimate, Estimate]]:
        """Return pass@k and pass@1 of each evaluation in order, with before and after where they are others."""
        of_evaluations = [_evaluated(entry) for entry in self.evaluations]
        found: list[tuple[Estimate, Estimate]] = []
        for each in (self.before, *of_evaluations, self.after):
            of_k = self.passed(each)
            if not {1, k} <= of_k.keys():
                continue
            pair = of_k[k], of_k[1]
            if not found or [e.value for e in found[-1]] != [e.value for e in pair]:
                found.append(pair)
        return found

    def series(self, key: str) -> tuple[list[float], list[float], list[float]]:
        """Return steps, finite values and standard errors that were logged as ``key``.

        A key ``eval_...`` is read from evaluations. An error is NaN if none was logged.
        """
        x, y, error = [], [], []
        for entry in self.evaluations if key.startswith("eval_") else self.steps:
            value = _number(entry.get(key))
            if math.isfinite(value):
                x.append(float(entry["step"]))
                y.append(value)
                error.append(_number(entry.get(f"{key}_stderr")))
        return x, y, error


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def read(paths: Sequence[str | Path]) -> list[Run]:
    """Read the runs in these folders, or in these ``log.json`` files.

    A folder comes from ``dmfast train``, ``dmfast demo`` or an example (with ``log.json``), or from ``DMTrainer`` or
    one of its checkpoints (with ``trainer_state.json``; with several checkpoints that of the newest is read).

    Raises:
        ValueError: there is no path, or no such folder; the folder has no file of a run; a file is half-written, is not
            of a run, or has no steps. The message names the file.
    """
    if not paths:
        raise ValueError("there is no run to report: name a folder with log.json or trainer_state.json")
    names = _names([Path(path) for path in paths])
    return [_read(Path(path), name) for path, name in zip(paths, names, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ, with a number where two paths are the same."""
    ends = [path.resolve().with_suffix("") if path.is_file() else path.resolve() for path in paths]
    parts = [(e.parent if p.is_file() and p.name == "log.json" else e).parts for p, e in zip(paths, ends, strict=True)]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]).lstrip("/") for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda p: int(re.sub(r"\D", "", p.name) or -1), reverse=True)
    for folder in (path, *checkpoints):
        for name in ("log.json", "trainer_state.json"):
            if (folder / name).is_file():
                return folder / name
    raise ValueError(
        f"{path} holds no run: neither log.json (of dmfast train and dmfast demo) nor trainer_state.json (of DMTrainer)"
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(
            f"{path} is not complete JSON ({error}): the run is writing it just now, or was ended while it did"
        ) from error


def _read(path: Path, name: str) -> Run:
    source = _file(path)
    log = _json(source)
    history = None if not isinstance(log, Mapping) else log.get("history", log.get("log_history"))
    if not isinstance(history, list) or not all(isinstance(h, Mapping) for h in history):
        raise ValueError(f"{source} is not of a run: it has no history")
    steps = [dict(h) for h in history if "kl_policy" in h and "step" in h]
    if not steps:
        raise ValueError(f"{source} has no steps: the run has logged nothing yet, or is not one of dmfast's")
    evaluations = [dict(h) for h in history if "eval_kl_policy_base" in h and "step" in h]
    swaps = log.get("swaps", steps[-1].get("swaps", sum(bool(h.get("swapped")) for h in steps)))
    common: dict[str, Any] = {"name": name, "source": source, "steps": steps, "evaluations": evaluations}
    if source.name == "trainer_state.json":
        return Run(**common, **_of_trainer(log, source), swaps=int(swaps))
    before, after = _estimates(log, "before", source), _estimates(log, "after", source)
    last = log.get("steps", steps[-1]["step"])
    return Run(
        **common | {"evaluations": _with_ends(evaluations, before, after, last)}, swaps=int(swaps),
        settings=_settings(log), seconds=log.get("seconds_training"), before=before, after=after,
        ideal=_estimates(log, "ideal", source), verdict=str(log.get("verdict") or ""), **_samples(log, source),
        machine=dict(log.get("machine", {})),
    )  # fmt: skip


def _with_ends(
    evaluations: list[dict[str, Any]], before: Mapping[str, Estimate], after: Mapping[str, Estimate], last: int
) -> list[dict[str, Any]]:
    """Return the evaluations with those before and after training, which ``dmfast train`` keeps apart."""

    def entry(step: int, found: Mapping[str, Estimate]) -> dict[str, Any]:
        values = {f"eval_{name}": estimate.value for name, estimate in found.items()}
        return {"step": step, **values, **{f"eval_{name}_stderr": e.stderr for name, e in found.items()}}

    at = {each["step"] for each in evaluations}
    first = [entry(0, before)] if before and 0 not in at else []
    return first + evaluations + ([entry(last, after)] if after and last not in at else [])


def _samples(log: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return the texts before and after, with their prompts: those of ``log.json``, else of ``samples.jsonl``."""
    texts = {f"samples_{when}": [str(text) for text in log.get(f"samples_{when}", [])] for when in ("before", "after")}
    of_all = log.get("recipe", {}).get("prompts") if isinstance(log.get("recipe"), Mapping) else None
    prompts = log.get("samples_prompts")
    if prompts is None and of_all is not None:
        rows = _rows(source.parent)
        if rows and rows[-1]["step"] == log.get("steps"):  # not what an earlier run has left
            return _of_rows(rows, rows[-1]["step"])
        prompts = of_all * _SAMPLES if isinstance(of_all, list) and len(of_all) == 1 else []
    shown = [None if prompt is None else _prompt(prompt) for prompt in prompts or []]
    return {
        **texts, **{f"prompts_{when}": shown[: len(texts[f"samples_{when}"])] for when in ("before", "after")}
    }  # fmt: skip


def _of_rows(rows: Sequence[Mapping[str, Any]], last: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for when, step in (("before", 0), ("after", last)):
        chosen = [row for row in rows if row["step"] == step and (when == "before" or step > 0)][:_SAMPLES]
        found[f"samples_{when}"] = [row["text"] for row in chosen]
        found[f"prompts_{when}"] = [row["prompt"] for row in chosen]
    return found


def _prompt(prompt: Any) -> str:
    """Return a prompt as text; of a chat, who says what."""
    if isinstance(prompt, list) and all(isinstance(each, Mapping) and "content" in each for each in prompt):
        return "\n".join(f"{each.get('role', '')}: {each['content']}" for each in prompt)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _of_trainer(log: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Read a run from transformers' state.

    The first and the last evaluation are before and after. The fields that the state lacks are empty.
    """
    history = log["log_history"]
    evaluations = [h for h in history if "eval_kl_policy_base" in h]
    first = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else {}
    trained = next((h["train_runtime"] for h in reversed(history) if "train_runtime" in h), None)
    end = max(h.get("step", 0) for h in history)
    rows = [row for row in _rows(source.parent) if row["step"] <= end]
    last = max((row["step"] for row in rows), default=0)
    return {
        "settings": {name: log[name] for name in ("max_steps", "train_batch_size", "num_train_epochs") if name in log},
        "before": _evaluated(first), "after": _evaluated(evaluations[-1] if evaluations else {}), "ideal": {},
        "seconds": trained, **_of_rows(rows, last),
    }  # fmt: skip


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the run's ``samples.jsonl``, which is beside its checkpoints."""
    for place in (folder, folder.parent):
        path = place / "samples.jsonl"
        if path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
            try:
                rows = [row for row in map(json.loads, lines) if row["evaluation"] == "eval"]
                return [
                    {
                        "step": int(row["step"]), "text": str(row["text"]),
                        "prompt": None if row.get("prompt") is None else _prompt(row["prompt"]),
                    }
                    for row in rows
                ]  # fmt: skip
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is not the samples of a run: {error!r}") from error
    return []


def _evaluated(entry: Mapping[str, Any]) -> dict[str, Estimate]:
    names = [name for name in entry if name.startswith("eval_") and not name.endswith(("_stderr", "_runtime"))]
    return {name[5:]: Estimate(_number(entry[name]), _number(entry.get(f"{name}_stderr"))) for name in names}


def _estimates(log: Mapping[str, Any], key: str, source: Path) -> dict[str, Estimate]:
    try:
        found = {name: Estimate(_number(e["value"]), _number(e["stderr"])) for name, e in log.get(key, {}).items()}
    except (TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{source}: {key!r} must hold estimates by name, each with value and stderr; it is of another version of "
            "dmfast, or of another program"
        ) from None
    return found


def _settings(log: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe or the command line, flat and without its output folder."""
    flat = _flat(log.get("recipe", log.get("args", {})))
    return {name: value for name, value in flat.items() if name not in ("train.output_dir", "out")}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= _flat(each, f"{name}.{key}" if name else str(key))
    return found
