"""Write samples before training beside those after it, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .marks import name, short
from .runs import Run

_Texts = dict[str | None, list[str]]
_SAMPLES = 8  # of a column
_LONG = 200  # a prompt with more characters is folded, and its end is shown
_UNKNOWN = "(one of several prompts; the log does not say which)"


def samples(runs: Sequence[Run]) -> str:
    """Return HTML with a part for each prompt, in which before and after are columns."""
    columns: list[tuple[str, _Texts]] = []
    before = [_by_prompt(run, run.samples_before, run.prompts_before) for run in runs]
    of_one = len({str(each) for each in before if each}) == 1
    for i, run in enumerate(runs):
        whose = "" if len(runs) == 1 else f": {name(i, run, len(runs))}"
        if before[i] and before[i] not in before[:i]:  # runs from one base have it alike
            same = [short(k, other) for k, other in enumerate(runs) if before[k] == before[i]]
            columns.append(("before" if of_one else f"before: {', '.join(same)}", before[i]))
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


def _by_prompt(run: Run, texts: Sequence[str], prompts: Sequence[str | None]) -> _Texts:
    several = run.settings.get("prompts") is not None
    found: _Texts = {}
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
