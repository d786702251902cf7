"""Draw each prompt's pass rate from the base beforehand, and read it from the rows of a data set.

The pass rate of a prompt is the mean of b over n completions of the base. For a verifier that says yes or no it is k/n,
where k completions are right. If the target filters the base, the pass rate is an unbiased estimate of the prompt's Z.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models import LanguageModel
from ..samples import Samples
from ..seeds import seed_for
from .drawing import batch_within, drawn_in_parts

#: The columns of a data set for the mean of b, and for the number of completions that it is the mean of.
RATE, DRAWN = "pass_rate", "pass_rate_n"


class Filter(Protocol):
    """The parts of an ``EBM`` from which pass rates are drawn."""

    base: LanguageModel
    batch_size: int | None

    @property
    def is_filter(self) -> bool:
        """Whether it only filters the base."""
        ...

    def log_b(self, samples: Samples) -> Tensor:
        """Return (N,) fp64, the log of the product of the pointwise constraints."""
        ...


def fit_z(
    target: Filter, data: Any, n: int, *, max_new_tokens: int, temperature: float, seed: int | None,
    batch_size: int | None, drop_zero: bool, progress: bool | None,
) -> Any:  # fmt: skip
    """Return the data with the columns ``pass_rate`` and ``pass_rate_n``; see ``EBM.fit_z``."""
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a positive integer, the completions of each prompt, got {n!r}")
    if not target.is_filter:
        raise ValueError(
            f"a pass rate is Z only where the target filters the base, and {target} is not known to: every constraint "
            "must be 1 or less, and neither a Moment nor a Reward. Write the constraint as a Verifier (or as a Scorer "
            "with binary=True)"
        )
    rows = _rows(data)
    prompts = [row["prompt"] for row in rows]
    target.base.check_prompts(prompts, max_new_tokens)
    with torch.no_grad():
        rates = _rates(
            target, rows, n, max_new_tokens=max_new_tokens, temperature=temperature, progress=progress,
            seed=int(torch.randint(2**62, ())) if seed is None else seed_for(seed, "fit_z"),
            batch_size=batch_size or target.batch_size or batch_within(target.base, prompts, max_new_tokens),
            # prompts alone reach scorers as text, as in training
            has_rows=hasattr(data, "with_format") or isinstance(data[0], Mapping),
        )  # fmt: skip
    kept = [place for place, rate in enumerate(rates) if rate > 0 or not drop_zero]
    if not kept:
        raise ValueError(
            f"no prompt of {len(rows)} had a completion with b > 0 among {n}, so that drop_zero=True would leave none: "
            "draw more (n), or take other prompts"
        )
    _say_zeros(rates, n, drop_zero)
    if hasattr(data, "add_column"):  # a datasets.Dataset
        named = data.add_column(RATE, rates).add_column(DRAWN, [n] * len(rows))
        return named if len(kept) == len(rows) else named.select(kept)
    return [{**rows[place], RATE: rates[place], DRAWN: n} for place in kept]


def _rows(data: Any) -> list[Mapping[str, Any]]:
    """Return each row as a mapping with a prompt.

    Raises:
        TypeError: the data has no length.
        ValueError: the data is empty, a row has no prompt, or a row has one of the columns already.
    """
    if isinstance(data, (str, Mapping)) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            "data must be a list of prompts or of rows with a prompt, or a datasets.Dataset with the column 'prompt', "
            f"got {type(data).__name__}"
        )
    if len(data) == 0:
        raise ValueError("data is empty: pass rows with prompts")
    source = data.with_format(None) if hasattr(data, "with_format") else data
    rows = [source[i] for i in range(len(source))]
    rows = [dict(row) if isinstance(row, Mapping) else {"prompt": row} for row in rows]
    for i, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(f"row {i} of data has no column 'prompt', only {', '.join(map(str, row))}")
        if RATE in row or DRAWN in row:
            raise ValueError(
                f"row {i} of data has the column {RATE if RATE in row else DRAWN!r} already: remove it to draw anew"
            )
    return rows


def _rates(
    target: Filter, rows: Sequence[Mapping[str, Any]], n: int, *, max_new_tokens: int, temperature: float, seed: int,
    batch_size: int, progress: bool | None, has_rows: bool,
) -> list[float]:  # fmt: skip
    """Return the mean of b of each row. The rows are drawn in parts, so that only one part is in memory."""
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for part in drawn_in_parts(
        target.base, [row["prompt"] for row in rows], n, max_new_tokens=max_new_tokens, temperature=temperature,
        seed=seed, batch_size=batch_size, progress=progress, what="pass rates",
    ):  # fmt: skip
        samples = part.with_rows(rows if has_rows else None)
        sums.index_add_(0, samples.context_id.cpu(), target.log_b(samples).exp().cpu())
    found: list[float] = (sums / n).tolist()
    return found


def _say_zeros(rates: Sequence[float], n: int, dropped: bool) -> None:
    zeros = sum(rate == 0 for rate in rates)
    if not zeros:
        return
    done = (
        "and are left out"
        if dropped
        else "and are kept: their Z is unknown, not 0, and a right completion in a later step shows it"
    )
    warnings.warn(
        f"{zeros} of {len(rates)} prompts had no completion with b > 0 among {n} of the base, which says that Z of "
        f"such a prompt is below {3 / n:.2g} (with 95% confidence), {done}",
        stacklevel=4,
    )


def read(rows: Sequence[Mapping[str, Any]] | None, argument: str = "rows") -> Tensor:
    """Return the pass rate and its n of each row, (R, 2) fp64.

    Args:
        rows: rows with the columns ``pass_rate`` and ``pass_rate_n``.
        argument: the name of the rows in errors.

    Raises:
        ValueError: there are no rows, a row lacks a column, or has a value out of range.
    """
    how = f"z_from_rows=True reads the columns {RATE!r} and {DRAWN!r}, which EBM.fit_z gives to a data set"
    if rows is None:
        raise ValueError(f"{how}, and {argument} has prompts alone")
    found = []
    for i, row in enumerate(rows):
        missing = [name for name in (RATE, DRAWN) if name not in row]
        if missing:
            raise ValueError(f"{how}, and row {i} of {argument} has no {missing[0]!r}, only {', '.join(map(str, row))}")
        rate, drawn = (_number(row[name]) for name in (RATE, DRAWN))
        if not 0 <= rate <= 1:
            raise ValueError(f"{RATE!r} must be from 0 to 1, got {row[RATE]!r} in row {i} of {argument}")
        if not (drawn >= 1 and drawn == math.floor(drawn) < math.inf):
            raise ValueError(f"{DRAWN!r} must be an integer of 1 or more, got {row[DRAWN]!r} in row {i} of {argument}")
        found.append((rate, drawn))
    return torch.tensor(found, dtype=torch.float64).view(-1, 2)


def _number(value: Any) -> float:
    """Return a value as a number, also if it is a string, as in a text file. Any other value gives NaN."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
