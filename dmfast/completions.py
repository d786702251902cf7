"""Make ``Samples`` of sequences that came from elsewhere, such as a file or another engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .objectives import KINDS, Objective
from .prompts import PromptEncoder, token_ids
from .samples import Prompt, Samples, check_temperature


def samples_of(
    encoder: PromptEncoder,
    eos_token_ids: Sequence[int],
    prompts: Sequence[Prompt] | Tensor | None,
    completions: Sequence[str | Sequence[int] | Tensor],
    *,
    append_eos: bool | Sequence[bool],
    eos_token_id: int | None,
    log_prob: Sequence[float] | Tensor | None,
    score_mask: Sequence[Sequence[bool] | Tensor] | None,
    temperature: float,
    rows: Sequence[Mapping[str, Any]] | None,
    device: torch.device,
) -> Samples:
    """Return the ``Samples`` that ``LanguageModel.samples_of`` makes of its arguments.

    Raises:
        TypeError, ValueError: as in ``LanguageModel.samples_of``.
    """
    if isinstance(completions, (str, Mapping)) or not hasattr(completions, "__len__"):
        raise TypeError(f"completions must be a list of strings or of lists of token ids, got {completions!r:.100}")
    n = len(completions)
    if n == 0:
        raise ValueError("completions is empty: pass at least one completion")
    check_temperature(temperature)
    starts = list(encoder(prompts)) * (n if prompts is None else 1)
    if len(starts) != n:
        raise ValueError(f"prompts and completions pair up one to one, got {len(starts)} prompts and {n} completions")
    of_ids = "log_prob" if log_prob is not None else "score_mask"
    if (log_prob is not None or score_mask is not None) and any(isinstance(each, str) for each in completions):
        raise ValueError(
            f"{of_ids} belongs to the token ids that were drawn, and a text that is tokenized anew may have others: "
            f"with {of_ids} pass completions as lists of token ids"
        )
    ends = set(eos_token_ids)
    given_end = (
        [eos_token_ids[0]] if eos_token_id is None else token_ids(eos_token_id, "eos_token_id must be a token id")
    )
    if len(given_end) != 1 or given_end[0] not in ends:
        raise ValueError(
            f"eos_token_id must be a token that ends a sequence, one of {sorted(ends)}, got {eos_token_id!r}"
        )
    end = given_end[0]
    ids = [encoder.completion(completion, f"completion {i}") for i, completion in enumerate(completions)]
    drawn = _drawn(score_mask, ids)
    appends = [end if flag else None for flag in _flags(append_eos, n)]
    tails = [_ended(ids[i], drawn[i], i, ends, appends[i], log_prob is not None) for i in range(n)]
    scored = [flags + [True] * (len(tail) - len(flags)) for flags, tail in zip(drawn, tails, strict=True)]
    left, left_mask = encoder.left_padded(starts, device)
    width = max(len(tail) for tail in tails)
    right = torch.tensor([tail + [encoder.pad_token_id] * (width - len(tail)) for tail in tails], device=device)
    right_mask = torch.tensor([[1] * len(tail) + [0] * (width - len(tail)) for tail in tails], device=device)
    right_scored = torch.tensor([flags + [False] * (width - len(flags)) for flags in scored], device=device)
    contexts: dict[tuple[int, ...], int] = {}
    context_id = [contexts.setdefault(tuple(ids), len(contexts)) for ids in starts]
    return Samples(
        tokens=torch.cat([left, right], 1),
        attention_mask=torch.cat([left_mask, right_mask], 1),
        score_mask=torch.cat([torch.zeros_like(left_mask).bool(), right_scored], 1),
        prompt_len=left.shape[1],
        log_prob=_log_q(log_prob, n).to(device),
        context_id=torch.tensor(context_id, device=device),
        temperature=temperature,
        tokenizer=encoder.tokenizer,
        pad_token_id=encoder.pad_token_id,
        rows=rows,
        has_log_prob=log_prob is not None,
        eos_token_ids=tuple(eos_token_ids),
    )


def _flags(append_eos: Any, n: int) -> list[bool]:
    flags = append_eos.tolist() if hasattr(append_eos, "tolist") else append_eos
    flags = [flags] * n if isinstance(flags, bool) else flags
    if not isinstance(flags, (list, tuple)) or len(flags) != n or not all(isinstance(flag, bool) for flag in flags):
        raise TypeError(
            f"append_eos must be True, False or one of them for each of {n} completions, got {flags!r:.100}"
        )
    return list(flags)


def _drawn(score_mask: Any, ids: Sequence[Sequence[int]]) -> list[list[bool]]:
    """Return, for each token of each completion, whether it was drawn."""
    if score_mask is None:
        return [[True] * len(each) for each in ids]
    if isinstance(score_mask, (str, Mapping)) or not hasattr(score_mask, "__len__") or len(score_mask) != len(ids):
        raise ValueError(
            f"score_mask must hold bools for each of {len(ids)} completions, True on tokens that were drawn, got "
            f"{score_mask!r:.100}"
        )
    found = []
    for i, (given, each) in enumerate(zip(score_mask, ids, strict=True)):
        flags = given.tolist() if hasattr(given, "tolist") else given
        right = isinstance(flags, (list, tuple)) and all(isinstance(flag, bool) for flag in flags)
        if not right or len(flags) != len(each):
            raise ValueError(
                f"score_mask of completion {i} must be {len(each)} bools, one for each of its token ids, True where it "
                f"was drawn and False on context, got {flags!r:.100}"
            )
        if each and not any(flags):
            raise ValueError(
                f"completion {i} has no token that was drawn, by its score_mask: there is nothing to score"
            )
        found.append(list(flags))
    return found


def _ended(ids: list[int], drawn: list[bool], i: int, ends: set[int], end: int | None, has_log_prob: bool) -> list[int]:
    """Return a continuation up to and with its EOS. Where it has none and log q is unknown, ``end`` is added.

    A drawn turn ends at its first EOS. Only context may follow there.
    """
    for place, token in enumerate(ids[:-1]):
        if token in ends and drawn[place] and drawn[place + 1]:
            raise ValueError(
                f"completion {i} goes on after its end: token {place} of {len(ids)}, {token}, ends a sequence. Cut it "
                "there, padding too. If the model's sequences end elsewhere, pass eos_token_id to LanguageModel. If "
                "context follows a turn there, mark it by score_mask"
            )
    if end is not None and ids and not drawn[-1]:
        raise ValueError(
            f"completion {i} ends in context, by its score_mask, after which append_eos would put an EOS that was not "
            "drawn there: pass append_eos=False for it, or cut the context off"
        )
    if end is not None and (not ids or ids[-1] not in ends):
        if has_log_prob:
            raise ValueError(
                f"completion {i} does not end in EOS, and append_eos would put token {end} after it, which log_prob "
                "does not cover. Where EOS was drawn, pass it among the ids; where the completion was cut at a length, "
                "pass append_eos=False for it"
            )
        ids = [*ids, end]
    if not ids:
        raise ValueError(
            f"completion {i} has no tokens, so there is nothing to score; if it ended at once, it consists of its EOS"
        )
    return ids


def _log_q(log_prob: Any, n: int) -> Tensor:
    """Return log q in nats, (N,) fp64, NaN where it was not given."""
    if log_prob is None:
        return torch.full((n,), torch.nan, dtype=torch.float64)
    try:
        # without a dtype torch would make fp32 of Python's floats
        given = log_prob if hasattr(log_prob, "dtype") else torch.tensor(log_prob, dtype=torch.float64)
        values = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"log_prob must be a list of {n} numbers, or a tensor or array of them, log q(x) of each completion in "
            f"nats; got {log_prob!r:.100}"
        ) from error
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"log_prob must be float32 or float64, got {values.dtype}: in 16 bits a log-probability of -1,000 is off "
            "by up to 2 nats"
        )
    if values.shape != (n,):
        raise ValueError(
            f"log_prob must have one number for each of {n} completions, log q(x) of the whole sequence in nats, got "
            f"the shape {tuple(values.shape)}"
        )
    bad = ~(values.isfinite() & (values <= 1e-4))  # rounding may leave a little above 0
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"log_prob must be the logarithm of a probability, finite and not above 0, got {float(values[row])} for "
            f"completion {row}"
        )
    return values.double()


def check_unknown_proposal(options: Mapping[str, Any]) -> None:
    """Check that a loss of samples without log q does not use it.

    Args:
        options: the options of ``LanguageModel.loss``.

    Raises:
        ValueError: the weights of the loss would depend on log q.
    """
    given, on_policy = options.get("log_proposal"), bool(options.get("on_policy", False))
    if given is not None and not (isinstance(given, Tensor) and bool(given.isnan().any())):
        return  # the caller has scored the sequences meanwhile
    objective: str | Objective | Callable[..., Tensor] = options.get("objective", "gdc++")
    name = objective.name if isinstance(objective, Objective) else objective
    if isinstance(name, str):
        # on_policy=True makes rho 1, so that A is the return of the sample alone
        fits = given is None and on_policy and name in KINDS and KINDS[name].return_of == "sample"
    else:
        fits = given is None and not on_policy
    if not fits:
        shown = repr(name) if isinstance(name, str) else "of your own"
        raise ValueError(
            f"the objective {shown} with on_policy={on_policy} weighs sequences by log q(x), which these samples don't "
            "have: LanguageModel.samples_of got no log_prob. Give it there, or train by likelihood, A = reward: "
            "loss(samples, objective='reinforce', on_policy=True, reward=torch.ones(len(samples)))"
        )
