"""Write samples before training beside those after it, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .marks import name
from .runs import Run

_SAMPLES = 8  # of a column
_LONG = 200  # a prompt with more characters is folded, and its end is shown
_UNKNOWN = "(one of several prompts; the log does not say which)"


def samples(runs: Sequence[Run]) -> str:
    """Return HTML with a part for each prompt, in which before and after are columns."""
    before = [_by_prompt(run, run.samples_before, run.prompts_before) for run in runs]
    shared = next((each for each in before if each), {})
    one = all(each == shared for each in before if each)  # runs from one base
    columns = [("before", shared)] if one and shared else []
    for i, run in enumerate(runs):
        whose = "" if len(runs) == 1 else f": {name(i, run, len(runs))}"
        if before[i] and not one:
            columns.append((f"before{whose}", before[i]))
        if run.samples_after:
            columns.append((f"after{whose}", _by_prompt(run, run.samples_after, run.prompts_after)))
    if not columns:
        return ""
    parts = []
    for prompt in dict.fromkeys(prompt for _, found in columns for prompt in found):
        shown = "".join(
            f"<div><h4>{title}</h4><ol>{_items(found[prompt])}</ol></div>"
            for title, found in columns
            if prompt in found
        )
        parts.append(f'<section class="samples">{_head(prompt)}<div class="columns">{shown}</div></section>')
    return f"<h2>Samples</h2>{''.join(parts)}"


def _by_prompt(run: Run, texts: Sequence[str], prompts: Sequence[str | None]) -> dict[str | None, list[str]]:
    several = run.settings.get("prompts") is not None
    found: dict[str | None, list[str]] = {}
    for i, text in enumerate(texts):
        prompt = prompts[i] if i < len(prompts) else _UNKNOWN if several else None
        found.setdefault(prompt, []).append(text)
    return {prompt: found[prompt][:_SAMPLES] for prompt in found}


def _items(texts: Sequence[str]) -> str:
    return "".join(f"<li>{escape(text.strip())}</li>" for text in texts)


def _head(prompt: str | None) -> str:
    if prompt is None:
        return ""
    text = f'<span class="text">{escape(prompt)}</span>'
    if len(prompt) > _LONG:
        text = f"<details><summary>…{escape(prompt[-_LONG // 2 :])}</summary>{text}</details>"
    return f'<div class="prompt"><b>Prompt</b> {text}</div>'
