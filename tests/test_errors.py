"""Test that bad input gets a clear error, before any kernel writes and whichever backend runs.

The error names what is wrong and where, however the call is made, and nothing that was passed in changes. What a row of
logits holds is found only while rows are read. Then the error names (sequence, position), and only logits that were
given away with ``inplace`` may have changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad as fwAD
from torch.fx.experimental.proxy_tensor import make_fx

import dmfast
from dmfast import Objective, eager, kernels
from dmfast.functional import sample_tokens
from dmfast.kernels import use_backend
from dmfast.objectives import OBJECTIVES, leave_one_out

HERE = torch.empty(0).device  # this is the GPU if the suite runs on one

INF, NAN = math.inf, math.nan
# scripts/ci/host_cuda.sh and interpreter.sh run the suite with "cuda" and "triton".
COMPILED = "triton" if kernels.forced == "triton" else "cuda" if kernels.CUDA.device_type == "cpu" else "cpu"
B, T, V = 3, 4, 11


@dataclass
class Call:
    """Hold a call of dm_loss or sequence_log_prob that is right until a test changes it."""

    logits: Tensor
    tokens: Any
    mask: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    scoring: bool = False  # whether sequence_log_prob is called

    def tensors(self) -> list[Tensor]:
        found = [self.logits, self.tokens, self.mask, *self.options.values()]
        return [x for x in found if isinstance(x, Tensor) and x.device.type != "meta"]

    def __call__(self) -> Any:
        if self.scoring:
            rows = {k: v for k, v in self.options.items() if k in ("temperature", "softcap", "cu_seqlens", "inplace")}
            return dmfast.sequence_log_prob(self.logits, self.tokens, self.mask, **rows)
        return dmfast.dm_loss(self.logits, self.tokens, self.mask, **self.options)


def good(packed: bool = False, **options: Any) -> Call:
    torch.manual_seed(0)
    logits, tokens = torch.randn(B, T, V), torch.randint(V, (B, T))
    terms = {name: torch.randn(B).double() - 9 for name in ("log_target", "log_proposal", "reward", "log_base")}
    given: dict[str, Any] = {**terms, "log_z": 0.1 * torch.randn(B).double(), **options}
    if packed:
        given["cu_seqlens"] = torch.tensor([0, 5, 5, B * T])
        return Call(logits.flatten(0, 1), tokens.flatten(), None, given)
    return Call(logits, tokens, None, given)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b)))


def refuses(call: Call, error: type[Exception] | tuple[type[Exception], ...], message: str) -> None:
    """Check a call on both backends, without grad and in place on a non-leaf. Nothing that was passed in changes."""
    start, options = call.logits, call.options
    for backend in (COMPILED, "eager"):
        for inplace in (False, True):
            call.options = {**options, "inplace": inplace}
            call.logits = _non_leaf(start) if inplace and isinstance(start, Tensor) else start
            before = [x.detach().clone() for x in call.tensors()]
            with use_backend(backend), pytest.raises(error, match=message):
                call()
            given_away = inplace and backend == "cuda"  # CUDA writes before the host can know of the error
            assert given_away or all(map(same, call.tensors(), before)), "an input changed"
    call.logits, call.options = start, options


class _NonLeaf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: None) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _non_leaf(x: Tensor) -> Tensor:
    """Return a tensor of the same memory and strides, with a history."""
    if not (x.is_floating_point() or x.is_complex()):
        return x
    return _NonLeaf.apply(x.detach().requires_grad_(), None)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scoring", [False, True])
def test_the_good_call_is_good(scoring: bool, packed: bool) -> None:
    call = good(packed)
    call.scoring = scoring
    assert call() is not None


# --- logits, tokens, mask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["gdc++", "dpg", "scoring"])
@pytest.mark.parametrize("token", [V, V + 1000, -1, -99, -101, 2**62, -(2**62)])
def test_token_out_of_range(token: int, how: str) -> None:
    call = good(objective=how)
    call.scoring = how == "scoring"
    call.tokens[1, 2] = token
    call.tokens[2, 0] = token
    refuses(call, ValueError, rf"tokens holds {token} at \(sequence 1, position 2\).*\[0, {V}\), or -100")


@pytest.mark.parametrize(("row", "sequence", "position"), [(0, 0, 0), (4, 0, 4), (5, 2, 0), (11, 2, 6)])
def test_token_out_of_range_packed(row: int, sequence: int, position: int) -> None:
    """Sequence 1 is empty."""
    call = good(packed=True)
    call.tokens[row] = V
    place = rf"\(sequence {sequence}, position {position}; packed row {row}\)"
    refuses(call, ValueError, f"tokens holds {V} at {place}")


def test_what_is_masked_is_not_looked_at() -> None:
    call = good()
    call.tokens[1, 2], call.tokens[0, 0] = V, -5
    call.mask = torch.ones(B, T, dtype=torch.bool)
    call.mask[1, 2] = call.mask[0, 0] = False
    call.logits[1, 2], call.logits[0, 0, 3] = NAN, INF
    for backend in (COMPILED, "eager"):
        with use_backend(backend):
            assert torch.isfinite(call().loss)


NOT_CONTIGUOUS = "last dimension of logits must be contiguous"
# Each case has what is changed, its new value, and the error.
SHAPES: dict[str, tuple[str, Callable[[Call], Any], type[Exception], str]] = {
    "too short": ("tokens", lambda c: c.tokens[:, :-1], ValueError, r"tokens must have .*\(3, 4\).*shift_labels"),
    "transposed": ("tokens", lambda c: c.tokens.t(), ValueError, "tokens must have the shape of logits without V"),
    "flat": ("tokens", lambda c: c.tokens.flatten(), ValueError, "tokens must have the shape of logits without V"),
    "too long": ("mask", lambda c: torch.ones(B, T + 1).bool(), ValueError, "mask must have the shape of logits"),
    "per sequence": ("mask", lambda c: torch.ones(B).bool(), ValueError, "mask must have the shape of logits"),
    "2-d": ("logits", lambda c: c.logits[0], ValueError, r"\(B, T, V\), or packed .* without cu_seqlens"),
    "4-d": ("logits", lambda c: c.logits[None], ValueError, r"logits must be \(B, T, V\)"),
    "no vocabulary": ("logits", lambda c: c.logits[:, :, :0], ValueError, "empty vocabulary"),
    "V first": ("logits", lambda c: torch.randn(B, V, T).transpose(1, 2), ValueError, NOT_CONTIGUOUS),
    "V strided": ("logits", lambda c: torch.randn(B, T, 2 * V)[:, :, ::2], ValueError, NOT_CONTIGUOUS),
    "V expanded": ("logits", lambda c: torch.randn(B, T, 1).expand(B, T, V), ValueError, NOT_CONTIGUOUS),
    "int": ("logits", lambda c: c.logits.int(), TypeError, "logits must be float32, bfloat16, float16 or float64"),
    "complex": ("logits", lambda c: c.logits.cfloat(), TypeError, "logits must be float32"),
    "fp8": ("logits", lambda c: c.logits.to(torch.float8_e4m3fn), TypeError, "logits must be float32"),
    "list": ("logits", lambda c: [1.0], TypeError, "logits must be float32"),
    "float tokens": ("tokens", lambda c: c.tokens.float(), TypeError, "tokens must be an integer tensor"),
    "bool tokens": ("tokens", lambda c: c.tokens.bool(), TypeError, "swap tokens and mask"),
    "complex tokens": ("tokens", lambda c: c.tokens.cfloat(), TypeError, "tokens must be an integer tensor"),
    "list of tokens": ("tokens", lambda c: c.tokens.tolist(), TypeError, "tokens must be an integer tensor"),
    "no tokens": ("tokens", lambda c: None, TypeError, "tokens must be an integer tensor"),
    "float mask": ("mask", lambda c: torch.ones(B, T), TypeError, "mask must be an integer or bool tensor"),
    "list as mask": ("mask", lambda c: [[True] * T] * B, TypeError, "mask must be an integer or bool tensor"),
    "meta tokens": ("tokens", lambda c: c.tokens.to("meta"), ValueError, f"tokens is on meta, logits on {HERE}"),
    "meta mask": ("mask", lambda c: torch.ones(B, T, device="meta").bool(), ValueError, "mask is on meta, logits on"),
}


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_dtypes_devices(name: str, scoring: bool) -> None:
    argument, change, error, message = SHAPES[name]
    call = good()
    call.scoring = scoring
    setattr(call, argument, change(call))
    refuses(call, error, message)


def test_rows_of_logits_for_packed_sequences() -> None:
    call = good(cu_seqlens=torch.tensor([0, 12]))
    refuses(call, ValueError, r"packed \(N, V\) with cu_seqlens; .* with cu_seqlens")


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 5, 5, 11], ValueError, "cu_seqlens must rise from 0 to N = 12.*ending at 11"),
        ([0, 5, 5, 13], ValueError, "must rise from 0 to N = 12"),
        ([0, 5, 5, 2**40], ValueError, "must rise from 0 to N = 12"),
        ([1, 5, 5, 12], ValueError, "must rise from 0 to N = 12"),
        ([-1, 5, 5, 12], ValueError, "must rise from 0 to N = 12"),
        ([0, 6, 5, 12], ValueError, "must rise from 0 to N = 12"),
        ([0, 13, 5, 12], ValueError, "must rise from 0 to N = 12"),
        ([0, -3, 5, 12], ValueError, "must rise from 0 to N = 12"),
        (torch.tensor([0.0, 5.0, 5.0, 12.0]), TypeError, "cu_seqlens must be int32 or int64"),
        (torch.tensor([0, 5, 5, 12], dtype=torch.int16), TypeError, "cu_seqlens must be int32 or int64"),
        (torch.tensor([[0, 5, 5, 12]]), ValueError, r"cu_seqlens must be \(B\+1,\)"),
        (torch.tensor(0), ValueError, r"cu_seqlens must be \(B\+1,\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"cu_seqlens must be \(B\+1,\)"),
        (torch.tensor([0, 5, 5, 12], device="meta"), ValueError, f"cu_seqlens is on meta, logits on {HERE}"),
        ((0, 5, 5, 12), TypeError, "cu_seqlens must be int32 or int64"),
    ],
)
def test_cu_seqlens(cu_seqlens: Any, error: type[Exception], message: str, scoring: bool) -> None:
    call = good(packed=True)
    call.scoring = scoring
    call.options["cu_seqlens"] = torch.tensor(cu_seqlens) if isinstance(cu_seqlens, list) else cu_seqlens
    refuses(call, error, message)


def test_cu_seqlens_of_no_sequence() -> None:
    """With [0] and rows, no sequence would own the rows."""
    call = Call(torch.randn(2, V), torch.zeros(2, dtype=torch.int64), None, {"cu_seqlens": torch.tensor([0])})
    call.scoring = True
    refuses(call, ValueError, "must rise from 0 to N = 2")


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, NAN, INF, -INF, "1", None, True, 1e-13, 1e13])
def test_temperature(value: Any, scoring: bool) -> None:
    call = good(temperature=value)
    call.scoring = scoring
    refuses(call, ValueError, "temperature must be a positive number")


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize("value", [0, 0.0, -30.0, NAN, INF, "30", True, 1e9])
def test_softcap(value: Any, scoring: bool) -> None:
    call = good(softcap=value)
    call.scoring = scoring
    refuses(call, ValueError, "softcap must be a positive number or None")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "batchmean"}, "reduction must be 'mean', 'sum' or 'none', got 'batchmean'"),
        ({"reduction": None}, "reduction must be"),
        (
            {"reduction": "sum", "num_sequences": 4},
            "what reduction='mean' divides by; got reduction='sum'",
        ),
        ({"reduction": "none", "num_sequences": 4}, "what reduction='mean' divides by; got reduction='none'"),
        *(
            ({name: x}, f"{name} must be a positive number, from 1e-30 to 1e30, or None")
            for name in ("num_sequences", "grad_scale")
            for x in (0, -1.0, NAN, INF, "4", True, 1e-46, 1e300)
        ),
        *(({"max_weight": x}, "max_weight must be a positive number or None") for x in (0, -2.0, NAN, "4")),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    refuses(good(**options), ValueError, message)
    refuses(good(objective="dpg", **options), ValueError, message)


@pytest.mark.parametrize("how", ["gdc++", "dpg", "scoring"])
def test_in_place_on_a_leaf(how: str) -> None:
    call = wide(how, packed=False)
    call.options["inplace"] = True
    call.logits.requires_grad_()
    before = call.logits.detach().clone()
    for backend in (COMPILED, "eager"):
        with use_backend(backend), pytest.raises(ValueError, match=r"inplace=True .* leaf"):
            call()
    assert same(call.logits, before)


# --- per-sequence inputs -------------------------------------------------------------------------------------------

# Each input has an objective that looks at it.
LOOKS_AT = {"log_target": "gdc++", "log_proposal": "gdc++", "log_z": "gdc++", "reward": "reinforce", "log_base": "kl"}


def objective_for(name: str) -> Any:
    return Objective("kl_control", beta=0.1) if LOOKS_AT[name] == "kl" else LOOKS_AT[name]


@pytest.mark.parametrize("name", LOOKS_AT)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x.long(), TypeError, "must be a floating-point tensor"),
        (lambda x: x > 0, TypeError, "must be a floating-point tensor"),
        (lambda x: x.cfloat(), TypeError, "must be a floating-point tensor"),
        (lambda x: x.tolist(), TypeError, "must be a floating-point tensor"),
        (lambda x: True, TypeError, "must be a floating-point tensor"),
        (lambda x: x[:-1], ValueError, r"must have one value per sequence, \(3,\)"),
        (lambda x: x[:1], ValueError, r"must have one value per sequence, \(3,\)"),
        (lambda x: x[:, None], ValueError, r"must have one value per sequence, \(3,\)"),
        (lambda x: x.expand(T, B), ValueError, r"must have one value per sequence, \(3,\)"),
        (lambda x: x.to("meta"), ValueError, f"is on meta, logits on {HERE}"),
    ],
)
def test_dtype_and_shape_of_inputs(
    name: str, change: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    call = good(objective=objective_for(name))
    call.options[name] = change(call.options[name])
    if name == "reward" and getattr(call.options[name], "dtype", None) in (torch.int64, torch.bool):
        return  # test_rewards_of_any_dtype_and_a_baseline_of_no_dimension has these cases
    refuses(call, error, f"{name} {message}")


@pytest.mark.parametrize("backend", [COMPILED, "eager"])
def test_rewards_of_any_dtype_and_a_baseline_of_no_dimension(backend: str) -> None:
    def loss(reward: Tensor, baseline: Any) -> float:
        call = good(objective=Objective("reinforce", baseline=baseline))
        call.options["reward"] = reward
        with use_backend(backend):
            return float(call().loss)

    right = torch.tensor([True, False, True])
    wanted = loss(right.double(), 0.3)
    assert wanted != loss(right.double(), 0.0)
    for reward in (right, right.int(), right.to(torch.uint8)):
        for baseline in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((B,), 0.3, dtype=torch.float64)):
            assert loss(reward, baseline) == wanted


@pytest.mark.parametrize("name", ["log_target", "log_proposal", "reward", "log_base"])
def test_only_log_z_may_be_a_number(name: str) -> None:
    call = good(objective=objective_for(name))
    for value in (0.5, torch.tensor(0.5)):
        call.options[name] = value
        refuses(call, (TypeError, ValueError), f"{name} must")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in LOOKS_AT for value in (NAN, INF)),
        ("log_proposal", -INF), ("reward", -INF), ("log_base", -INF),
    ],
)  # fmt: skip
def test_values_of_inputs(name: str, value: float, dtype: torch.dtype, own: bool) -> None:
    """The error names the first of several sequences, also under an objective of one's own."""
    objective = (lambda terms: torch.ones(B).double()) if own else objective_for(name)
    call = good(objective=objective)
    call.options[name] = call.options[name].to(dtype)
    call.options[name][1:] = value
    refuses(call, ValueError, f"{name} holds {value} at sequence 1")


def test_values_that_cancel() -> None:
    """An input may hold both -inf and +inf, or finite values whose sum is not finite."""
    call = good()
    call.options["log_target"] = torch.tensor([-INF, INF, 0.0]).double()
    refuses(call, ValueError, "log_target holds inf at sequence 1")
    call = good(objective="reinforce")
    call.options["reward"] = torch.tensor([1e308, 1e308, NAN], dtype=torch.float64)
    refuses(call, ValueError, "reward holds nan at sequence 2")
    call.options["reward"] = torch.tensor([-1e300, 1e300, 1.0], dtype=torch.float64)
    refuses(call, ValueError, "weight A of sequence 0")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_log_z_as_a_number(value: float) -> None:
    call = good(log_z=value)
    if value == -INF:
        assert int(call().n_empty) == B
    else:
        refuses(call, ValueError, f"log_z holds {value} at sequence 0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["log_target", "log_proposal", "log_z", "log_base"])
def test_log_probabilities_in_16_bits(name: str, dtype: torch.dtype) -> None:
    refuses(
        good(**{name: torch.full((B,), -9.0).to(dtype)}),
        TypeError,
        rf"{name} must be float32 or float64, got .*16 .*off by up to 2 nats",
    )


def test_a_reward_in_16_bits() -> None:
    """A reward model in bfloat16 gives such rewards, and their values are taken as they are."""
    call = good(reward=torch.tensor([0.5, 1.0, -2.0, 0.0])[:B].to(torch.bfloat16), objective="reinforce")
    assert call().weight.dtype == torch.float64


# --- objectives ----------------------------------------------------------------------------------------------------

NEEDS = {
    **dict.fromkeys(sorted(dmfast.objectives.TARGET_OBJECTIVES), ("log_target", "log_z")),
    "reinforce": ("reward",),
    "reinforce_p": ("log_target",),
    "kl_control": ("reward", "log_base"),
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "kl_control": {"beta": 0.1}, "reinforce_p": {"log_scale": -9.0}, "alpha": {"alpha": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_missing_input(name: str) -> None:
    """Each input that the objective needs must be given, and log_proposal unless on-policy."""
    objective = Objective(name, **PARAMETERS.get(name, {}))
    only = {"log_proposal": good().options["log_proposal"], **{k: good().options[k] for k in NEEDS[name]}}
    full = good()
    full.options = {**only, "objective": objective}
    assert full().weight.shape == (B,)
    for missing in NEEDS[name]:
        call = good()
        call.options = {**only, "objective": objective, missing: None}
        refuses(call, ValueError, rf"objective '{name.replace('+', '[+]')}' needs .*{missing}")
    call.options = {**only, "objective": objective, "log_proposal": None}
    refuses(call, ValueError, rf"objective '{name.replace('+', '[+]')}' needs log_proposal.*on_policy=True")
    call.options["on_policy"] = True
    assert call().weight.shape == (B,)


@pytest.mark.parametrize("name", ["gdc", "GDC++", "", "kl"])
def test_an_unknown_objective(name: str) -> None:
    """The message lists every objective there is."""
    listed = ", ".join(OBJECTIVES).replace("+", "[+]")
    refuses(good(objective=name), ValueError, rf"unknown objective '{name.replace('+', '[+]')}'; dmfast has {listed}")


@pytest.mark.parametrize("objective", [None, 3, ["dpg"], torch.ones(B)])
def test_what_is_no_objective(objective: Any) -> None:
    refuses(good(objective=objective), TypeError, "objective must be one of dpg, .*, a dmfast.Objective or a function")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "unknown objective 'nope'; dmfast has dpg, "),
        (("gdc++", 0.5), "'gdc\\+\\+' is 'dpg' with the constant baseline 1"),
        (("dpg", "loo"), "baseline must be None, a number"),
        (("dpg", [0.5]), r"baseline must be None, a number, .*got \[0.5\]"),
        (("dpg", NAN), "baseline must be finite"),
        (("dpg", INF), "baseline must be finite"),
        (("reinforce", None, False), "normalize=False multiplies A by Z, which objective 'reinforce' does not have"),
        (("kl_control", None, False, 0.1), "normalize=False"),
        (("kl_control",), "'kl_control' needs beta"),
        (("kl_control", None, True, NAN), "beta must be a number that is finite"),
        (("dpg", None, True, 0.1), "'dpg' does not take beta"),
        (("reinforce_p",), "'reinforce_p' needs log_scale"),
        (("reinforce_p", None, True, None, INF), "log_scale must be a number that is finite"),
        (("reinforce_p", None, True, 0.1, -3.0), "'reinforce_p' does not take beta"),
        (("js", None, True, None, -3.0), "'js' does not take log_scale"),
        (("alpha",), "'alpha' needs alpha, got None"),
        (("dpg", None, True, None, None, 0.5), "'dpg' does not take alpha, got 0.5"),
        (("alpha", None, True, 0.1, None, 0.5), "'alpha' does not take beta"),
        (("alpha", None, True, None, None, NAN), "alpha must be a number that is finite, got nan"),
        (("alpha", None, True, None, None, -INF), "alpha must be a number that is finite, got -inf"),
        (("alpha", None, True, None, None, "half"), "alpha must be a number that is finite, got 'half'"),
        (("alpha", None, True, None, None, True), "alpha must be a number that is finite, got True"),
        (("alpha", None, True, None, None, 1.0, False), "normalize_alpha=False .* alpha below 1; .* with alpha=1.0"),
        (("alpha", None, True, None, None, 2, False), "normalize_alpha=False .* alpha below 1; .* with alpha=2"),
        (("dpg", None, True, None, None, None, False), "normalize_alpha=False .*; got objective 'dpg'"),
    ],
)
def test_parameters_of_an_objective(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(*arguments)


def test_an_objective_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Objective("dpg").baseline = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", ["reverse_kl", "reverse_chi2"])
def test_infinite_returns(name: str) -> None:
    """The error names the objectives that allow P = 0. max_weight bounds the returns, and n_clipped counts them."""
    call = good(objective=name)
    call.options["log_target"][1:] = -INF
    allowed = "dpg, gdc[+][+], js, tv, chi2, alpha with alpha=0, reinforce, reinforce_p, kl_control$"
    message = rf"objective '{name}' is infinite where P\(x\) = 0, .*sequence 1 .*max_weight.*one of {allowed}"
    refuses(call, ValueError, message)
    call.options["max_weight"] = 2.0
    out = call()
    assert out.weight[1:].tolist() == [-2.0, -2.0] and int(out.n_clipped) >= 2


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("objective", ["gdc++", "dpg", "js", "own"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_weight_beyond_fp32(packed: bool, objective: str, on_policy: bool) -> None:
    """The message names the sequence and max_weight, and it comes before a row is overwritten."""
    call = good(packed, objective=objective, on_policy=on_policy)
    if objective == "own":
        call.options["objective"] = lambda terms: torch.tensor([1.0, -1e39, NAN]).double()
    call.options["log_proposal"][1:] = -120.0
    if on_policy:
        call.options["log_target"] += 400
    first = 0 if on_policy and objective in ("gdc++", "dpg") else 1
    if on_policy and objective == "js":
        first, call.options["log_target"] = 1, torch.tensor([-9.0, 1e39, 1e39], dtype=torch.float64)
    refuses(call, ValueError, f"the weight A of sequence {first} is .*max_weight")


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_numbers_at_the_end_of_their_range(objective: str) -> None:
    """Gradients are finite there, and a softcap that bounds no logit changes nothing."""
    plain = good(objective=objective)()
    for options in ({"temperature": 1e-12}, {"temperature": 1e12}, {"softcap": 1e8}, {"grad_scale": 1e30}):
        call = good(objective=objective, max_weight=10.0, **options)
        call.logits = call.logits.requires_grad_()
        out = call()
        (out.loss * options.get("grad_scale", 1.0)).backward()
        assert bool(call.logits.grad.isfinite().all()), options  # type: ignore[union-attr]
        if "softcap" in options:
            torch.testing.assert_close(out.log_prob, plain.log_prob, rtol=0, atol=1e-6)


def test_numbers_of_numpy() -> None:
    numbers = {
        "temperature": 2.0,
        "softcap": 5.0,
        "num_sequences": 4,
        "grad_scale": 0.5,
        "max_weight": 3.0,
        "log_z": 0.5,
    }
    types = (np.float32, np.float64, np.int64, np.float16, np.float32, np.float32)
    given = {name: kind(x) for (name, x), kind in zip(numbers.items(), types, strict=True)}
    for call in (good(objective="dpg", **given), good(objective="gdc++", **given)):
        found, wanted = call(), good(objective=call.options["objective"], **numbers)()
        assert torch.equal(found.loss, wanted.loss) and torch.equal(found.log_prob, wanted.log_prob)


@pytest.mark.parametrize("value", ["no", None, 1, 0.0])
def test_on_policy_is_a_bool(value: Any) -> None:
    refuses(good(on_policy=value), TypeError, "on_policy must be True or False")


def test_a_view_whose_memory_holds_the_negative() -> None:
    call = good()
    wanted = call()
    for name in ("log_target", "log_proposal"):
        x = call.options[name]
        call.options[name] = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert call.options[name].is_neg() and torch.equal(call.options[name], x)
    assert torch.equal(call().weight, wanted.weight)


@pytest.mark.parametrize("scoring", [False, True])
def test_logits_without_memory(scoring: bool) -> None:
    """Without this check a kernel would read at address 0."""
    call = good()
    call.scoring = scoring
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call.logits, call.tokens = mode.from_tensor(call.logits), mode.from_tensor(call.tokens)
        with pytest.raises(TypeError, match="logits is a FakeTensor and has no memory"):
            call()


@pytest.mark.parametrize("weight", [3.5e38, -3.5e38, 1e300, NAN, INF, -INF])
def test_own_weights_beyond_fp32(weight: float) -> None:
    call = good(objective=lambda terms: torch.tensor([0.0, 3.4e38, weight]).double())
    message = "the weight A of sequence 2 is " + ("NaN: the objective has no value" if math.isnan(weight) else "")
    refuses(call, ValueError, message)


def test_leave_one_out() -> None:
    """Leave-one-out needs several sequences, returns that are known, and for contexts their ids."""
    loo, context = (Objective("reinforce", baseline=f"leave_one_out{x}") for x in ("", "_context"))
    call = good(objective=loo)
    call.logits, call.tokens = call.logits[:1], call.tokens[:1]
    call.options = {k: v[:1] if isinstance(v, Tensor) else v for k, v in call.options.items()}
    refuses(call, ValueError, "a mean over the sequences of a prompt needs two or more; sequence 0 is alone")
    refuses(
        good(objective=context, context_id=torch.tensor([5, 7, 5])),
        ValueError,
        r"needs two or more of each; sequence 1 \(context_id 7\) is alone",
    )
    refuses(good(objective=context), ValueError, r"'leave_one_out_context' needs context_id \(B,\)")
    with pytest.raises(ValueError, match="sequence 0"):
        leave_one_out(torch.ones(1))
    for name in ("reverse_kl", "js", "tv", "chi2", "reverse_chi2", "alpha", "kl_control"):
        objective = Objective(name, baseline="leave_one_out", **PARAMETERS.get(name, {}))
        message = rf"known before the forward; with objective '{name}'.*on_policy=True and log_proposal"
        refuses(good(objective=objective), ValueError, message)
        refuses(good(objective=objective, on_policy=True, log_proposal=None), ValueError, message)
        assert good(objective=objective, on_policy=True)().weight.shape == (B,)
    objective = Objective("dpg", baseline="leave_one_out")
    refuses(good(objective=objective, on_policy=True, log_proposal=None), ValueError, "needs returns that are known")
    far = torch.tensor([-9.0, -1e4, -9.0], dtype=torch.float64)
    message = "the return of sequence 1 is inf, over which leave-one-out baselines average"
    refuses(good(objective=objective, log_proposal=far), ValueError, message)


@pytest.mark.parametrize(
    "context_id",
    [
        torch.ones(B),
        torch.ones(B).bool(),
        torch.ones(B).cfloat(),
        torch.ones(B + 1).long(),
        torch.ones(B, 1).long(),
        [1, 1, 1],
        torch.tensor(1),
    ],
)
def test_context_id(context_id: Any) -> None:
    refuses(good(context_id=context_id), ValueError, r"context_id must be an integer tensor \(3,\)")


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (torch.ones(B + 1), r"a baseline tensor must be \(3,\)"),
        (torch.tensor([0.0, NAN, 1.0]), "baseline holds nan at sequence 1"),
        (torch.tensor([0.0, 1.0, -INF]), "baseline holds -inf at sequence 2"),
    ],
)
def test_baseline_tensors(baseline: Tensor, message: str) -> None:
    refuses(good(objective=Objective("dpg", baseline=baseline)), ValueError, message)


# --- rows of logits ------------------------------------------------------------------------------------------------

# the NaN that x86 makes of inf - inf has its sign bit set
NEGATIVE_NAN = {
    torch.float32: torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32),
    torch.bfloat16: torch.tensor(-0x40, dtype=torch.int16).view(torch.bfloat16),
    torch.float16: torch.tensor(-0x200, dtype=torch.int16).view(torch.float16),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["gdc++", "dpg", "own", "scoring"])
@pytest.mark.parametrize("value", [NAN, INF, "-nan", "-nan among -inf", "+inf and -inf"])
def test_bad_rows(value: Any, how: str, dtype: torch.dtype, inplace: bool) -> None:
    """The error names the first row of several, whatever the threads. Without inplace nothing changes."""
    for backend in (COMPILED, "eager"):
        for packed in (False, True):
            for column in (0, 7, 1200):
                call = wide(how, packed, dtype)
                rows = call.logits if packed else call.logits.flatten(0, 1)
                for row in (6, 7, 10):
                    if "-inf" in str(value):  # the rest of the block of 512 columns is -inf
                        rows[row, column // 512 * 512 : column // 512 * 512 + 512] = -INF
                    rows[row, column] = (
                        INF if "+inf" in str(value) else NEGATIVE_NAN[dtype] if "-nan" in str(value) else value
                    )
                call.tokens.view(-1)[[6, 7, 10]] = 1290
                before = call.logits.clone()
                call.options["inplace"] = inplace
                call.logits = _non_leaf(call.logits)
                place = r"sequence 2, position 1; packed row 6" if packed else r"sequence 1, position 2"
                with use_backend(backend), pytest.raises(ValueError, match=rf"NaN or \+inf at \({place}\)"):
                    call()
                if not inplace:
                    assert same(call.logits, before)


def wide(how: str, packed: bool, dtype: torch.dtype = torch.float32) -> Call:
    """Return a call with V = 1300, which a kernel reads in several blocks."""
    call = good(packed, objective=how)
    if how == "own":
        call.options["objective"] = lambda terms: torch.ones(B).double()
    call.scoring = how == "scoring"
    call.logits = torch.randn(*call.tokens.shape, 1300).to(dtype)
    return call


@pytest.mark.parametrize("how", ["gdc++", "dpg", "own", "scoring"])
@pytest.mark.parametrize("rest", ["finite", "-inf"])
def test_a_label_of_probability_zero(rest: str, how: str) -> None:
    """The label's logit is -inf, in a row that has others or in one that has none."""
    for backend in (COMPILED, "eager"):
        call = wide(how, packed=False)
        for i, t in ((1, 2), (1, 3), (2, 0)):
            call.tokens[i, t] = 777
            call.logits[i, t, 777 if rest == "finite" else slice(None)] = -INF
        before = call.logits.clone()
        with (
            use_backend(backend),
            pytest.raises(
                ValueError, match=r"logit of token 777 at \(sequence 1, position 2\) is -inf: .* probability 0"
            ),
        ):
            call()
        assert same(call.logits, before)


def test_the_first_of_different_faults() -> None:
    """The first fault is reported, whether it is a label of -inf or a row with NaN."""
    call = wide("gdc++", packed=False)
    call.logits[0, 3, int(call.tokens[0, 3])] = -INF
    call.logits[1, 0, 5] = NAN
    with pytest.raises(ValueError, match=r"\(sequence 0, position 3\) is -inf"):
        call()
    call.logits[0, 2, 5] = NAN
    with pytest.raises(ValueError, match=r"NaN or \+inf at \(sequence 0, position 2\)"):
        call()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_bad_row_with_any_number_of_threads(threads: int) -> None:
    logits = torch.randn(4, 64, 300)
    logits[1:, 17:, 250] = NAN
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(10):
            with pytest.raises(ValueError, match=r"\(sequence 1, position 17\)"):
                dmfast.sequence_log_prob(logits, torch.zeros(4, 64, dtype=torch.int64))
    finally:
        torch.set_num_threads(before)


def test_a_bad_row_counts_where_the_weight_is_zero() -> None:
    """log pi is reported for every sequence, so its row must be right."""
    call = good(objective="dpg")
    call.options["log_target"][1] = -INF
    call.logits[1, 2, 3] = NAN
    for backend in (COMPILED, "eager"):
        with (
            use_backend(backend),
            pytest.raises(ValueError, match=r"NaN or \+inf at \(sequence 1, position 2\)"),
        ):
            call()


def test_an_infinite_return_stays_in_its_own_context() -> None:
    """0 * inf must not make NaN in the other contexts, or the message would name one of their sequences."""
    values = torch.tensor([1.0, INF, 3.0, 5.0, 7.0, 9.0]).double()
    context = torch.tensor([0, 1, 0, 1, 1, 0])
    found = leave_one_out(values, context)
    assert found.tolist() == [6.0, 6.0, 5.0, INF, INF, 2.0]
    assert leave_one_out(values[:4]).tolist() == [INF, 3.0, INF, INF]
    far = torch.tensor([-9.0, -9.0, -1e4], dtype=torch.float64)
    objective = Objective("dpg", baseline="leave_one_out_context")
    call = good(objective=objective, log_proposal=far, context_id=torch.tensor([1, 0, 0]))
    call.logits, call.tokens = call.logits.repeat(2, 1, 1), call.tokens.repeat(2, 1)
    call.options = {k: v.repeat(2) if isinstance(v, Tensor) and v.dim() else v for k, v in call.options.items()}
    call.options["log_proposal"][-1] = -9.0
    refuses(call, ValueError, "the return of sequence 2 is inf, over which leave-one-out baselines average")


WATCHED: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "vmap": lambda f, z: torch.func.vmap(f)(z[None]),
    "grad": lambda f, z: torch.func.grad(lambda x: f(x).sum())(z),
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (z,)),
    "functionalize": lambda f, z: torch.func.functionalize(f)(z),
    "make_fx": lambda f, z: make_fx(f)(z),
    "torch.jit.trace": lambda f, z: torch.jit.trace(f, (z,), check_trace=False),
}


@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize("how", WATCHED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_follows_operations_on_tensors_is_refused(how: str, grad_mode: bool) -> None:
    """These tools would see nothing of what a kernel does.

    Without an error, functionalize ended in a segfault, tracers gave memory that nobody had written, and vmap and grad
    ended in torch's inner errors.
    """
    call = good()
    terms = {k: v for k, v in call.options.items() if isinstance(v, (Tensor, float))}
    hidden, weight = torch.randn(*call.logits.shape[:2], 8), torch.randn(call.logits.shape[-1], 8)
    functions: list[tuple[Callable[[Tensor], Any], Tensor]] = [
        (lambda z: dmfast.dm_loss(z, call.tokens, **terms).loss, call.logits),
        (lambda z: dmfast.sequence_log_prob(z, call.tokens), call.logits),
        (lambda h: dmfast.linear_dm_loss(h, weight, call.tokens, **terms).loss, hidden),
        (lambda z: sample_tokens(z, seed=1)[1], call.logits[0]),
    ]
    message = (
        r"dmfast's kernels can't run within .*(torch\.func|make_fx|jit\.trace).*(or torch\.export|call it outside)"
    )
    for function, x in functions:
        with torch.set_grad_enabled(grad_mode), pytest.raises(RuntimeError, match=message):
            WATCHED[how](function, x)


def test_a_dual_number_is_refused() -> None:
    call = good()
    with fwAD.dual_level():
        dual = fwAD.make_dual(call.logits, torch.ones_like(call.logits))
        with torch.no_grad(), pytest.raises(RuntimeError, match="forward-mode AD, where logits is a dual number"):
            dmfast.sequence_log_prob(dual, call.tokens)
        dmfast.sequence_log_prob(call.logits, call.tokens)  # a tensor without a tangent is not a dual number


def test_the_inputs_of_the_linear_losses_are_named() -> None:
    call = good()
    hidden, head = torch.randn(*call.logits.shape[:2], 8), torch.randn(call.logits.shape[-1], 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(TypeError, match=r"^weight is a FakeTensor"):
        dmfast.linear_sequence_log_prob(hidden, mode.from_tensor(head), call.tokens)
    with fwAD.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="where hidden is a dual number"):
        dmfast.linear_sequence_log_prob(fwAD.make_dual(hidden, hidden), head, call.tokens)
    with pytest.raises(TypeError, match=r"^hidden is on the device meta, where it has no values"):
        dmfast.linear_sequence_log_prob(hidden.to("meta"), head.to("meta"), call.tokens.to("meta"))


def test_vmap_is_refused_in_plain_torch_too() -> None:
    """The checks of values would end in torch's inner error about control flow."""
    call = good()
    hidden, head = torch.randn(*call.logits.shape[:2], 8), torch.randn(call.logits.shape[-1], 8)
    with pytest.raises(RuntimeError, match=r"can't run within torch\.func\.vmap, even in plain torch: call it outside"):
        torch.func.vmap(lambda z: eager.sequence_log_prob(z, call.tokens))(call.logits[None])
    with pytest.raises(RuntimeError, match=r"can't run within torch\.func\.vmap"):
        torch.func.vmap(torch.func.grad(lambda h: eager.linear_sequence_log_prob(h, head, call.tokens).sum()))(
            hidden[None]
        )


def test_the_eager_backend_takes_transforms() -> None:
    call = good()
    terms = {k: v for k, v in call.options.items() if isinstance(v, (Tensor, float))}
    found = torch.func.grad(lambda z: eager.dm_loss(z, call.tokens, **terms).loss)(call.logits)
    leaf = call.logits.clone().requires_grad_()
    dmfast.dm_loss(leaf, call.tokens, **terms).loss.backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7), (0, 0, 7)])
def test_an_empty_array_of_numpy_is_contiguous(shape: tuple[int, ...]) -> None:
    """Its strides are 0, and the ``.contiguous()`` that the message once advised leaves it as it is."""
    logits = torch.from_numpy(np.zeros(shape, np.float32))
    assert logits.stride() == (0, 0, 0) and logits.is_contiguous()
    for x in (logits, logits.clone().requires_grad_() * 1.0):
        out = dmfast.sequence_log_prob(x, torch.zeros(shape[:2], dtype=torch.int64), inplace=x.requires_grad)
        assert out.tolist() == [0.0] * shape[0]
    assert sample_tokens(torch.from_numpy(np.zeros((0, 7), np.float32)), seed=1)[0].shape == (0,)


def test_the_linear_losses_speak_of_hidden_states() -> None:
    hidden, head, tokens = torch.randn(2, 3, 4), torch.randn(7, 4), torch.zeros(2, 3, dtype=torch.int64)
    terms = {"log_target": torch.zeros(2), "log_proposal": torch.zeros(2), "log_z": 0.0}
    with pytest.raises(ValueError, match="tokens must have the shape of hidden without D"):
        dmfast.linear_dm_loss(hidden, head, tokens[:, :2], **terms)
    with pytest.raises(ValueError, match="log_target is on meta, hidden on cpu"):
        dmfast.linear_dm_loss(hidden, head, tokens, **{**terms, "log_target": torch.zeros(2, device="meta")})
    with pytest.raises(ValueError, match="weight has an empty vocabulary"):
        dmfast.linear_dm_loss(hidden, head[:0], tokens, **terms)


FREED: dict[str, Callable[[Tensor], Tensor]] = {
    "freed": lambda x: (x.untyped_storage().resize_(0), x)[1],
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
}


@pytest.mark.parametrize("which", ["logits", "tokens", "draws"])
@pytest.mark.parametrize("how", FREED)
def test_storage_that_is_gone(how: str, which: str) -> None:
    """FSDP and offloading leave tensors without memory behind, which would end in a segfault."""
    call = good()
    if which == "draws":
        run: Callable[[], Any] = partial(sample_tokens, FREED[how](call.logits[0].clone()), seed=1)
    else:
        setattr(call, which, FREED[how](getattr(call, which).clone()))
        run = call
    with pytest.raises(TypeError, match="no memory that a kernel could read"):
        run()


def test_storage_that_goes_before_backward() -> None:
    call = good()
    z = (call.logits.clone().requires_grad_() * 1.0)  # fmt: skip
    call.logits = z
    loss = call().loss
    z.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="no memory that a kernel could read"):
        loss.backward()


def test_logits_that_are_a_negative_view() -> None:
    call = good()
    wanted = dmfast.sequence_log_prob(-call.logits, call.tokens)
    assert torch.equal(dmfast.sequence_log_prob(torch._neg_view(call.logits), call.tokens), wanted)
    tokens, log_prob = sample_tokens(torch._neg_view(call.logits[0]), seed=3)
    expected, expected_log_prob = sample_tokens(-call.logits[0], seed=3)
    assert torch.equal(tokens, expected) and torch.equal(log_prob, expected_log_prob)


def test_logits_on_meta() -> None:
    with pytest.raises(TypeError, match="logits is on the device meta"):
        dmfast.sequence_log_prob(
            torch.empty(2, 3, 5, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta")
        )


@pytest.mark.parametrize("value", [0.0, -2.0, NAN, INF])
@pytest.mark.parametrize("function", [dmfast.dm_loss, eager.dm_loss])
def test_a_tensor_of_num_sequences_that_can_not_be(function: Callable[..., Any], value: float) -> None:
    call = good()
    with pytest.raises(ValueError, match="num_sequences must be a positive number"):
        function(call.logits, call.tokens, **{**call.options, "num_sequences": torch.tensor(value)})


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_a_dual_number_is_refused_by_the_linear_losses(name: str) -> None:
    inputs = {"hidden": torch.randn(2, 3, 4), "weight": torch.randn(7, 4)}
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with fwAD.dual_level():
        inputs[name] = fwAD.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(RuntimeError, match="forward-mode AD"):
            dmfast.linear_sequence_log_prob(**inputs, tokens=tokens)
