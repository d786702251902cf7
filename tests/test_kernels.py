"""Test the compiled kernels (backend ``cpu``) against the oracle ``dmfast.eager`` in fp64 on the same stored logits.

The formula of ``csrc/objective.h`` is compared with its twin ``dmfast.objectives.weigh`` and with the table of the
design, worked in 50 digits (mpmath).

log pi and log-sum-exp must be within the error that the design states. Everything that is made of log pi (ratios,
weights, loss, counts) must be within 1e-11 of what the oracle makes of the same log pi. Gradients must be within one
rounding of their dtype of the oracle's, given the same weights, and without bias. Every case has NaN in the rows that
are not scored and in the gaps between strided rows. Neither may be read, and the gaps may not be written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dmfast
from dmfast import Objective, eager, objectives
from dmfast.functional import DMLossOutput
from dmfast.kernels import checks, extension, select
from dmfast.kernels.batch import CLIPPED, LOG_RATIO, LOG_TARGET_RATIO, LOSS, WEIGHT, Batch, Scores
from dmfast.kernels.eager import gradient, logits_of, score, sequence_of_rows
from dmfast.kernels.form import denominator, form_loss
from dmfast.objectives import OBJECTIVES

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}
# ROUNDING is the relative error of one rounding to nearest. SMALLEST is half of the smallest number that a dtype holds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
# fp16 differs from bf16 only in how a number is read and written, which vocabularies and special logits show
two_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
inplaces = pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])


def forward(batch: Batch, entropy: bool = False) -> Scores:
    """Return the scores that the backend for these logits gives."""
    return select(batch.logits).forward(batch, None, entropy)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.dtype])


# --- cases ------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    base: Tensor  # the storage, which is NaN wherever no scored logit lies
    cut: Callable[[Tensor], Tensor]  # it returns the logits, which are a view of the storage
    tokens: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        return self.cut(self.base)

    def batch(self, temperature: float = 1.0, softcap: float | None = None) -> Batch:
        return checks.make_batch(self.logits, self.tokens, self.mask, self.cu_seqlens, temperature, softcap)

    def rows_of(self, per_sequence: Tensor) -> Tensor:
        """Return (B,) values spread over rows, in the shape of logits with V = 1."""
        return per_sequence[sequence_of_rows(self.batch())].reshape(*self.tokens.shape, 1)


# For B sequences of T tokens, a layout has the shape of the storage, and how the logits are cut from it.
LAYOUTS: dict[str, tuple[Callable[[int, int, int], tuple[int, ...]], Callable[[Tensor], Tensor]]] = {
    "contiguous": (lambda b, t, v: (b, t, v), lambda x: x[:]),
    "batch_strided": (lambda b, t, v: (2 * b, t, v), lambda x: x[::2]),
    "time_strided": (lambda b, t, v: (b, 2 * t, v), lambda x: x[:, ::2]),
    "transposed": (lambda b, t, v: (t, b, v), lambda x: x.transpose(0, 1)),
    "sliced": (lambda b, t, v: (b, t + 1, v), lambda x: x[:, :-1]),
    "unaligned": (lambda b, t, v: (b, t, v + 3), lambda x: x[:, :, 1:-2]),
}
PACKED = {"packed32": (torch.int32, 1), "packed64": (torch.int64, 1), "packed_strided": (torch.int64, 2)}


def make_case(
    layout: str,
    dtype: torch.dtype = torch.float32,
    v: int = 127,
    b: int = 4,
    t: int = 6,
    seed: int = 0,
    values: Callable[[tuple[int, ...]], Tensor] | None = None,
    unscored: str = "mixed",
) -> Case:
    """Return random logits and labels, of which some are not scored if ``unscored`` is ``mixed``.

    The mask leaves out some, -100 leaves out others, and one sequence is left out as a whole. With ``none``, all are
    scored.

    Packed layouts have b + 4 sequences. The first, the last and one between are empty, and one has a single token.
    """
    torch.manual_seed(seed)
    if layout in PACKED:
        lengths = [0, 1, *(max(t - i, 0) for i in range(b - 1)), 0, t, 0] if b else []
        cu_dtype, step = PACKED[layout]
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)]).to(cu_dtype)
        shape: tuple[int, ...] = (sum(lengths),)
        size: tuple[int, ...] = (sum(lengths) * step, v)

        def cut(x: Tensor) -> Tensor:
            return x[::step]

    else:
        to_size, cut = LAYOUTS[layout]
        shape, size, cu_seqlens = (b, t), to_size(b, t, v), None
    values = values or (lambda s: 3 * torch.randn(s))
    tokens = torch.randint(v, shape)
    logits = values((*shape, v))
    finite = logits.gather(-1, tokens[..., None])[..., 0] > -INF
    tokens = torch.where(finite, tokens, logits.argmax(-1))
    mask = None
    if unscored == "mixed":
        tokens = tokens.masked_fill(torch.rand(shape) < 0.15, -100)
        mask = torch.rand(shape) > 0.2
        if layout not in PACKED and b > 1:
            mask[1] = False
    scored = (tokens != -100) & (mask if mask is not None else True)
    base = torch.full(size, NAN, dtype=dtype)
    cut(base).copy_(torch.where(scored[..., None], logits.double(), NAN))
    return Case(base, cut, tokens, mask, cu_seqlens)


def make_terms(case: Case, seed: int = 0, zeros: bool = True, **rows: float | None) -> dict[str, Tensor]:
    """Return each per-sequence input, near the policy's log pi. With ``zeros`` some P are 0, and all P of a context."""
    torch.manual_seed(1000 + seed)
    log_pi = eager.sequence_log_prob(case.logits.double(), case.tokens, case.mask, cu_seqlens=case.cu_seqlens, **rows)
    b = log_pi.shape[0]
    log_target, log_z = log_pi + torch.randn(b).double(), 0.4 * torch.randn(b).double() + 0.2
    if zeros and b > 1:
        log_target[0] = log_target[-1] = log_z[-1] = -INF
    reward = torch.randn(b).double()
    reward[: b // 3] = 0.0
    return {
        "log_target": log_target,
        "log_proposal": log_pi + 0.5 * torch.randn(b).double(),
        "log_z": log_z,
        "reward": reward,
        "log_base": log_pi + torch.randn(b).double(),
        "context_id": torch.arange(b) % max(b // 2, 1),
    }


# --- the comparison ---------------------------------------------------------------------------------------------


def assert_within(actual: Tensor, expected: Tensor, error: Tensor | float, what: str) -> None:
    same = (actual == expected) | ((actual - expected).abs() <= error)
    assert bool(same.all()), (
        f"{what}: {int((~same).sum())} of {same.numel()} off, by up to "
        f"{float((actual - expected)[~same].abs().max()):.3e}: {actual[~same][:3].tolist()} for "
        f"{expected[~same][:3].tolist()}"
    )


def assert_made_of(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Assert that what follows from the same log pi differs in the last digits only."""
    assert (actual is None) == (expected is None), what
    if actual is not None and expected is not None:
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m: f"{what}: {m}")


def run(case: Case, inplace: bool, grad: Tensor | None, **options: object) -> tuple[DMLossOutput, Tensor]:
    """Return the loss and its gradient, through views of a non-leaf tensor."""
    leaf = case.base.clone().requires_grad_()
    stored = leaf.clone()
    out = dmfast.dm_loss(
        case.cut(stored), case.tokens, case.mask, cu_seqlens=case.cu_seqlens, inplace=inplace, **options
    )
    out.loss.backward(grad)
    if inplace:
        stored = stored.detach().clone()
        case.cut(stored).fill_(NAN)
        assert bool(stored.isnan().all()), "written between the rows"
    else:
        assert torch.equal(bits(stored.detach()), bits(case.base)), "the logits changed"
    assert leaf.grad is not None
    return out, case.cut(leaf.grad)


def check(
    case: Case,
    *,
    inplace: bool = False,
    grad: Tensor | None = None,
    roundings: int = 1,
    enlarged: float = 1.0,
    **options: object,
) -> DMLossOutput:
    """Compare one call of dm_loss and its backward with the oracle.

    A gradient may be rounded more than once, and its first rounding may be enlarged. This is so where known weights
    meet another grad_output than the expected one.
    """
    out, dz = run(case, inplace, grad, **options)
    rows = {k: options[k] for k in ("temperature", "softcap") if k in options}
    batch = case.batch(**rows)
    wide = case.logits.double().requires_grad_()
    data = (wide, case.tokens, case.mask)

    # log pi may differ from fp64 by 1e-6 nats for each scored row.
    truth = eager.dm_loss(*data, cu_seqlens=case.cu_seqlens, **options)
    scored = (batch.labels != -100).double()
    n_rows = torch.zeros(batch.n_sequences).double().index_add(0, sequence_of_rows(batch), scored)
    assert_within(out.log_prob, truth.log_prob, 1e-6 * n_rows + 1e-15 * truth.log_prob.abs(), "log_prob")
    if truth.entropy is not None:
        assert_within(out.entropy, truth.entropy, 3e-6 * n_rows, "entropy")
    for name in ("weight", "loss"):
        torch.testing.assert_close(getattr(out, name), getattr(truth, name), rtol=1e-4, atol=1e-4)

    # Everything that is made of log pi is compared for the same log pi.
    reduction = options.get("reduction", "mean")
    divide_by = denominator(batch, reduction, options.get("num_sequences"))
    terms = checks.make_terms(batch, **{k: options.get(k, default) for k, default in TERMS.items()})
    share = torch.where(batch.labels == -100, 0.0, options.get("token_weight", torch.ones(case.tokens.shape)).flatten())
    weighted = torch.zeros(batch.n_sequences).double()
    weighted.index_add_(0, sequence_of_rows(batch), share * out.token_log_prob.flatten())
    made = form_loss(batch, out.log_prob.new_empty(2, 0), out.log_prob, out.entropy, terms, divide_by, False,
                     weighted=weighted)  # fmt: skip
    columns = {"log_ratio": LOG_RATIO, "log_target_ratio": LOG_TARGET_RATIO, "weight": WEIGHT}
    for name, column in columns.items():
        if getattr(out, name) is not None:
            assert_made_of(getattr(out, name), made.sequences[column], name)
    assert_made_of(out.loss, made.sequences[LOSS] if reduction == "none" else made.total, "loss")
    assert int(out.n_clipped) == int(made.sequences[CLIPPED].sum())
    for name in ("log_ratio", "log_target_ratio", "n_empty"):
        assert (getattr(out, name) is None) == (getattr(truth, name) is None), name
    assert int(out.n_empty) == int(truth.n_empty)

    # The gradient is compared for the same weights.
    frozen = eager.dm_loss(*data, cu_seqlens=case.cu_seqlens, **{**options, "objective": lambda _: out.weight})
    (expected,) = torch.autograd.grad(frozen.loss, wide, grad)
    factor = torch.ones(()) if grad is None else grad
    coefficient = case.rows_of((out.weight * factor * batch.scale / divide_by).abs().expand(batch.n_sequences))
    coefficient = coefficient * share.abs().reshape(coefficient.shape)
    bonus = of_bonus(case, batch, terms.entropy_coefficient, factor / divide_by)
    assert_gradient(dz, expected, case, coefficient, roundings, enlarged, bool(rows.get("softcap")), bonus)
    return out


def of_bonus(case: Case, batch: Batch, coefficient: float, factor: Tensor) -> Tensor | None:
    """Return by how much the entropy's part of the gradient may be off, in the shape of the logits.

    It is made of parts that cancel, namely fp32 terms and an H that may be off by 3e-6. A p below 2^-126 is 0, and its
    log is around -100.
    """
    if not coefficient:
        return None
    log_p = logits_of(batch).detach().log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.where(p > 0, 0.0)).sum(-1, keepdim=True)
    parts = (p * (log_p.where(p > 0, 0.0).abs() + entropy + 1.0)).reshape(case.logits.shape)
    error = 4e-6 * parts + 100 * 2.0**-125
    return error * case.rows_of((coefficient * factor * batch.scale).abs().expand(batch.n_sequences))


# These options make up the weight, with the values that they have if they are not given.
TERMS = {
    "objective": "gdc++", "on_policy": False, "max_weight": None, "context_id": None, "log_proposal": None,
    "log_target": None, "log_z": None, "reward": None, "log_base": None, "entropy_coefficient": 0.0,
}  # fmt: skip


def assert_gradient(
    dz: Tensor, expected: Tensor, case: Case, coefficient: Tensor, roundings: int, enlarged: float, cap: bool,
    bonus: Tensor | None = None,
) -> None:  # fmt: skip
    """Check |dz - expected| against the rounding of the dtype. Truncation is off by twice as much and fails."""
    dtype = dz.dtype
    relative = (1 + ROUNDING[dtype]) ** roundings - 1 + 1e-5
    # A probability below 2^-126 is 0. Near 1, 1 - tanh^2 has an error of 1e-14 in the oracle too.
    error = relative * expected.abs() + roundings * enlarged * SMALLEST[dtype]
    error = error + coefficient * (1e-13 if cap else 2.0**-125)
    # The label's column is coefficient * (1 - p), where p comes from a log-sum-exp that may be off by 1e-6.
    label = torch.zeros_like(error).scatter_(-1, case.tokens.clamp(min=0)[..., None], 1.0)
    error = error + 1e-6 * coefficient * label
    if bonus is not None:
        error = error + bonus
    assert_within(dz.double(), expected, error, "gradient")
    scored = case.batch().labels.reshape(case.tokens.shape) != -100
    zero = torch.zeros_like(coefficient, dtype=torch.bool) if bonus is not None else coefficient == 0
    nothing = (~scored[..., None] | zero | (case.logits == -INF)).expand_as(dz)
    assert bool((dz[nothing] == 0).all()), "a row that is not scored, a weight of 0 or a -inf logit has a gradient"


# --- the rows: vocabularies, dtypes, layouts --------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("layout", [*LAYOUTS, *PACKED])
@pytest.mark.parametrize("v", [1, 2, 7, 31, 127, 1000, 4096, 32003, 50257])
def test_vocabularies_dtypes_layouts(v: int, layout: str, dtype: torch.dtype) -> None:
    case = make_case(layout, dtype, v, *((4, 6) if v < 4096 else (3, 3)))
    terms = make_terms(case)
    check(case, inplace=False, return_entropy=True, **terms)
    check(case, inplace=True, objective="dpg", **terms)
    if v < 4096:
        check(case, inplace=True, **terms)
        check(case, inplace=False, objective="dpg", **terms)


@dtypes
@inplaces
@pytest.mark.parametrize("temperature", [0.3, 1, 1.7])
@pytest.mark.parametrize("softcap", [None, 5, 30.0])
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_temperature_and_softcap(
    objective: str, softcap: float | None, temperature: float, inplace: bool, dtype: torch.dtype
) -> None:
    for v, layout in ((700, "sliced"), (1031, "packed64")):
        case = make_case(layout, dtype, v, values=lambda s: 8 * torch.randn(s))
        rows = {"temperature": temperature, "softcap": softcap}
        check(case, inplace=inplace, return_entropy=True, objective=objective, **rows, **make_terms(case, **rows))


def only_one(shape: tuple[int, ...]) -> Tensor:
    x = torch.full(shape, -INF)
    return x.scatter_(-1, torch.randint(shape[-1], (*shape[:-1], 1)), torch.randn(*shape[:-1], 1))


def without(first: int, last: int) -> Callable[[tuple[int, ...]], Tensor]:
    def values(shape: tuple[int, ...]) -> Tensor:
        x = 3 * torch.randn(shape)
        x[..., first:last] = -INF
        return x

    return values


SPECIAL: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "one finite logit": only_one,
    "first block -inf": without(0, 512),
    "middle block -inf": without(512, 1024),
    "all but the last block -inf": without(0, 1024),
    "scattered -inf": lambda s: (3 * torch.randn(s)).masked_fill(torch.rand(s) < 0.5, -INF),
    "+-1e4": lambda s: torch.where(torch.rand(s) < 0.5, 1e4, -1e4),
    "around 1e4": lambda s: 1e4 + 20 * torch.randn(s),
    "around -1e4": lambda s: -1e4 + 20 * torch.randn(s),
    "rising": lambda s: torch.linspace(-90, 90, s[-1]).expand(s),
    "falling": lambda s: torch.linspace(90, -90, s[-1]).expand(s),
    "all equal": lambda s: torch.full(s, -7.25),
    "-0 and 0": lambda s: torch.where(torch.rand(s) < 0.5, -0.0, 0.0),
    "tiny": lambda s: 1e-7 * torch.randn(s),
}


@dtypes
@inplaces
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_logits(name: str, temperature: float, inplace: bool, dtype: torch.dtype) -> None:
    case = make_case("sliced", dtype, 1300, values=SPECIAL[name])
    terms = make_terms(case, temperature=temperature)
    for objective in ("gdc++", "dpg"):
        check(case, inplace=inplace, temperature=temperature, objective=objective, return_entropy=True, **terms)


@dtypes
@pytest.mark.parametrize("name", [name for name in SPECIAL if "-inf" in name or "1e4" in name])
def test_special_logits_under_a_softcap(name: str, dtype: torch.dtype) -> None:
    """The value of cap(-inf) must not depend on which block of the row the logit lies in."""
    case = make_case("contiguous", dtype, 1300, values=SPECIAL[name])
    rows = {"temperature": 0.7, "softcap": 5.0}
    check(case, **rows, **make_terms(case, **rows))


@dtypes
@pytest.mark.parametrize("v", [7, 600, 5000])
@pytest.mark.parametrize("margin", [3, 10, 20, 30])
def test_label_gradient_where_p_is_near_1(margin: int, v: int, dtype: torch.dtype) -> None:
    """The factor 1 - p keeps its digits although p rounds to 1."""
    logits = torch.zeros(1, v, v).to(dtype)
    logits[0].diagonal().fill_(margin)
    logits = logits[:, :: max(1, v // 10)]
    tokens = logits.argmax(-1)
    logits = logits.clone().requires_grad_()
    dmfast.sequence_log_prob(logits, tokens).sum().backward()
    assert logits.grad is not None
    label = logits.grad.double().gather(-1, tokens[..., None])
    rest = (v - 1) * math.exp(-margin)
    exact = torch.full_like(label, rest / (1 + rest))
    # 1 - p comes from a sum in fp64 in which the label is 1, so that each of up to 500 additions rounds to 1e-16.
    assert_within(label, exact, (1e-5 + ROUNDING[dtype]) * exact + SMALLEST[dtype] + 1e-13, "1 - p")


@dtypes
@pytest.mark.parametrize("first", [-0.3, 2.7])
def test_label_gradient_where_a_later_block_dominates(first: float, dtype: torch.dtype) -> None:
    """The factor 1 - p keeps its digits also if the largest logit so far is lower and stays the reference."""
    logits = torch.full((1, 1, 1200), -30.0)
    logits[..., 0], logits[..., 700] = first, first + 6.5
    logits = logits.to(dtype).requires_grad_()
    dmfast.sequence_log_prob(logits, torch.full((1, 1), 700)).sum().backward()
    assert logits.grad is not None
    p = torch.softmax(logits.detach().double(), -1)
    exact = p.sum(-1) - p[..., 700]
    assert_within(logits.grad[..., 700].double(), exact, (1e-5 + ROUNDING[dtype]) * exact, "1 - p")


# --- the objectives -----------------------------------------------------------------------------------------------

PARAMETERS = {"kl_control": {"beta": 0.1}, "reinforce_p": {"log_scale": -20.0}, "alpha": {"alpha": 0.6}}
MODES = {"off-policy": (False, True), "on-policy": (True, False), "on-policy, log q stored": (True, True)}


def allows_leave_one_out(name: str, mode: str) -> bool:
    return name.startswith("reinforce") or mode == "on-policy, log q stored" or (name, mode) == ("dpg", "off-policy")


@two_dtypes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name: str, mode: str, dtype: torch.dtype) -> None:
    """Each objective is tried with every baseline it takes, with and without Z, bounded and not, in place and not."""
    on_policy, stored = MODES[mode]
    case = make_case("sliced", dtype, 31, b=6)
    baselines: list[object] = [None]
    if name != "gdc++":
        baselines += [0.7, torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0, 3.0])]
        if allows_leave_one_out(name, mode):
            baselines += ["leave_one_out", "leave_one_out_context"]
    normalizes = [True, False] if name in objectives.TARGET_OBJECTIVES else [True]
    for i, (baseline, normalize, bound) in enumerate(itertools.product(baselines, normalizes, [None, 0.6])):
        # With an infinite return, the mean of the others would not be finite.
        infinite = Objective(name, **PARAMETERS.get(name, {})).infinite_at_zero
        zeros = not infinite or (bound is not None and not isinstance(baseline, str))
        terms = make_terms(case, seed=i, zeros=zeros)
        if not stored:
            del terms["log_proposal"]
        parameters = (
            {"log_scale": float(terms["log_target"].max())} if name == "reinforce_p" else PARAMETERS.get(name, {})
        )
        objective = Objective(name, baseline=baseline, normalize=normalize, **parameters)
        out = check(case, inplace=i % 2 == 1, objective=objective, on_policy=on_policy, max_weight=bound, **terms)
        if bound is not None:
            assert int(out.n_clipped) == int((out.weight.abs() == bound).sum())
        if on_policy:
            assert out.log_ratio is not None and bool((out.log_ratio == 0).all())
        if name in objectives.TARGET_OBJECTIVES:
            empty = terms["log_z"] == -INF
            assert int(out.n_empty) == int(empty.sum()) and bool((out.weight[empty] == 0).all())


def test_objectives_are_tried_where_weights_have_both_signs_zeros_and_are_clipped() -> None:
    case = make_case("sliced", v=31, b=6)
    out = check(case, **make_terms(case))
    assert bool((out.weight > 0).any()) and bool((out.weight < 0).any()) and bool((out.weight == 0).any())
    assert int(check(case, objective="chi2", max_weight=0.6, **make_terms(case)).n_clipped) > 0
    out = check(case, objective="reinforce", **make_terms(case))
    assert bool((out.weight > 0).any()) and bool((out.weight < 0).any()) and bool((out.weight == 0).any())


@two_dtypes
@pytest.mark.parametrize("log_z", [0.3, torch.tensor(0.3), torch.tensor([0.3]).double(), torch.tensor(-INF), -INF])
def test_forms_of_log_z(log_z: object, dtype: torch.dtype) -> None:
    case = make_case("contiguous", dtype, 31, b=1, unscored="none")
    terms = {**make_terms(case), "log_z": log_z}
    if float(log_z) == -INF:  # type: ignore[arg-type]
        terms["log_target"] = torch.full((1,), -INF)
    for objective in ("gdc++", "dpg"):
        out = check(case, objective=objective, **terms)
        assert int(out.n_empty) == int(float(log_z) == -INF)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_proposal_out_of_hand_is_bounded_by_max_weight(name: str) -> None:
    """With log q = -1e4 every ratio overflows, and the bounded weight has the sign of the exact one."""
    case = make_case("contiguous", v=31, b=6, unscored="none")
    terms = make_terms(case, zeros=False)
    terms["log_proposal"][1:4] = -1e4
    terms["reward"] = torch.tensor([1.0, 2.0, -2.0, 1.0, -1.0, 0.5])
    objective = Objective(name, **PARAMETERS.get(name, {}))
    out = check(case, objective=objective, max_weight=4.0, **terms)
    exact = [exact_weight(objective, False, out.log_prob[i], terms, i)[0] for i in range(6)]
    assert out.weight[1:4].tolist() == [4.0 if exact[i] > 0 else -4.0 for i in range(1, 4)]


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
@pytest.mark.parametrize("weight", [3e38, -3e38, 1e-38, 1e-44])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_weights_at_the_edges_of_fp32(softcap: float | None, weight: float, objective: str) -> None:
    """Divided by the temperature, the weights leave fp32. The gradient is right where fp32 holds it, and never NaN."""
    if objective == "dpg" and weight < 0:
        objective = Objective("dpg", baseline=1.0)  # type: ignore[assignment]
    logits = torch.tensor([[[0.0, -2.0, -INF, -9.0, 1.0]]])
    log_weight = torch.tensor([math.log(abs(weight))], dtype=torch.float64)
    terms = {
        "log_target": torch.tensor([-INF]).double() if weight < 0 else log_weight,
        "log_proposal": -log_weight - 0.3 if weight < 0 else torch.zeros(1).double(),
        "log_z": 0.0,
    }
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    call = {"tokens": torch.tensor([[0]]), "temperature": 0.3, "softcap": softcap, **terms}
    out = dmfast.dm_loss(x, objective=objective, **call)  # type: ignore[arg-type]
    out.loss.backward()
    eager.dm_loss(y, objective=lambda _: out.weight, **call).loss.backward()  # type: ignore[arg-type]
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad.float(), rtol=1e-5, atol=1e-45)


# --- how a loss is reduced and its gradient scaled ---------------------------------------------------------------


@two_dtypes
@inplaces
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [None, 2.0, 0.37, -1.3, 0.0])
def test_reductions_and_upstream_gradients(
    upstream: float | None, reduction: str, objective: str, inplace: bool, dtype: torch.dtype
) -> None:
    case = make_case("time_strided", dtype, 513, b=5)
    terms = make_terms(case)
    grad = None if upstream is None else torch.tensor(upstream).double()
    if reduction == "none":
        grad = torch.randn(5).double() * (1.0 if upstream is None else upstream)
    # With known weights the gradient was rounded before this grad_output was known, and is then multiplied by it.
    one_pass = objective == "dpg" and reduction != "none" and dtype != torch.float16
    check(case, inplace=inplace, grad=grad, roundings=2 if one_pass and upstream else 1,
          objective=objective, reduction=reduction, **terms)  # fmt: skip


@two_dtypes
@inplaces
@pytest.mark.parametrize("objective", ["gdc++", "dpg", "on-policy"])
@pytest.mark.parametrize("grad_scale", [None, 0.25, 1024.0, 3.7])
@pytest.mark.parametrize("num_sequences", [None, 64, 2.5])
def test_num_sequences_and_grad_scale(
    num_sequences: float | None, grad_scale: float | None, objective: str, inplace: bool, dtype: torch.dtype
) -> None:
    """With the grad_output that was announced, the gradient of a known weight is rounded once, in fp16 too."""
    case = make_case("packed32", dtype, 257)
    terms = make_terms(case, zeros=objective != "on-policy")
    how = {"objective": "reverse_kl", "on_policy": True} if objective == "on-policy" else {"objective": objective}
    grad = None if grad_scale is None else torch.tensor(grad_scale).double()
    check(case, inplace=inplace, grad=grad, num_sequences=num_sequences, grad_scale=grad_scale, **how, **terms)
    if grad_scale is not None:  # the result is right also if another grad_output comes
        check(case, inplace=inplace, grad=torch.tensor(0.9).double(), roundings=2, enlarged=max(1, 0.9 / grad_scale),
              num_sequences=num_sequences, grad_scale=grad_scale, **how, **terms)  # fmt: skip


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_nearest(dtype: torch.dtype, objective: str) -> None:
    """The mean of the rounding error is 0; truncation would leave -0.7 half-ulps."""
    case = make_case("contiguous", dtype, 20011, b=3, t=3, unscored="none")
    options = {"objective": objective, "grad_scale": 1000.0, "temperature": 1.3}
    terms = make_terms(case, temperature=1.3)
    grad = torch.tensor(1000.0).double()
    out, dz = run(case, False, grad, **options, **terms)
    wide = case.logits.double().requires_grad_()
    frozen = eager.dm_loss(wide, case.tokens, objective=lambda _: out.weight, **terms, temperature=1.3)
    (expected,) = torch.autograd.grad(frozen.loss, wide, grad)
    assert_rounded_to_nearest(dz, expected)


def assert_rounded_to_nearest(dz: Tensor, expected: Tensor) -> None:
    dtype = dz.dtype
    rounded = expected.to(dtype)
    steps = (bits(dz).int() - bits(rounded).int()).abs()
    assert int(steps.max()) <= 1 and float((steps > 0).double().mean()) < 1e-3
    size, index = expected.abs().flatten().unique(return_inverse=True)
    error = ((dz.abs().double() - expected.abs()) / (expected.abs() * ROUNDING[dtype])).flatten()
    error = torch.zeros_like(size).index_reduce(0, index, error, "mean", include_self=False)
    error = error[size > 2.0**-14]  # these are normal numbers in fp16 too
    assert error.numel() > 2000
    assert abs(float(error.mean())) < 4 * 0.45 / math.sqrt(error.numel())


# --- a gradient narrower than its logits --------------------------------------------------------------------------

narrow_dtypes = pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])


def write_narrow(
    case: Case,
    dtype: torch.dtype,
    known: bool,
    aligned: bool,
    factor: float = 0.5,
    zeros: bool = True,
    **rows: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of fp32 logits in 16 bits, the oracle's given the same weights, and A * factor.

    The rows of the gradient lie as those of the logits do, or one element beside an aligned place.
    """
    batch = case.batch(**rows)
    given = {**make_terms(case, zeros=zeros, **rows), "objective": "dpg" if known else "gdc++"}
    terms = checks.make_terms(batch, **{**TERMS, **given})
    if aligned:
        storage = torch.full(case.base.shape, NAN, dtype=dtype)
        dz = case.cut(storage)
    else:
        storage = torch.full((case.logits.numel() + 1,), NAN, dtype=dtype)
        dz = storage[1:].view(case.logits.shape)
    backend, before = select(batch.logits), case.base.clone()
    if known:
        scores = backend.forward_backward(batch, terms, False, 1.0, factor, dz)
    else:
        scores = backend.forward(batch, terms, False)
        backend.backward(batch, scores.lse, scores.weight, factor, dz)
    found = dz.clone()
    dz.fill_(NAN)
    assert bool(storage.isnan().all()), "written between the rows"
    assert torch.equal(bits(case.base), bits(before)), "the logits changed"
    wide = batch._replace(logits=case.logits.double())
    weight = scores.weight * factor
    return found, gradient(wide, score(wide).lse, weight).reshape(found.shape), weight


def check_narrow(case: Case, dtype: torch.dtype, known: bool, aligned: bool, **rows: float | None) -> None:
    dz, expected, weight = write_narrow(case, dtype, known, aligned, **rows)
    assert dz.dtype == dtype
    coefficient = case.rows_of((weight * case.batch(**rows).scale).abs())
    assert_gradient(dz, expected, case, coefficient, 1, 1.0, bool(rows.get("softcap")), None)


@narrow_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "unaligned", "packed64"])
@pytest.mark.parametrize("v", [1, 7, 31, 127, 1000, 4099])
def test_narrow_gradients(v: int, layout: str, dtype: torch.dtype) -> None:
    case = make_case(layout, torch.float32, v)
    for known, aligned in itertools.product((False, True), (False, True)):
        check_narrow(case, dtype, known, aligned)


@narrow_dtypes
@pytest.mark.parametrize("name", ["scattered -inf", "one finite logit", "first block -inf", "+-1e4", "rising"])
def test_narrow_gradients_of_special_logits(name: str, dtype: torch.dtype) -> None:
    case = make_case("sliced", torch.float32, 1300, values=SPECIAL[name])
    for known, rows in itertools.product(
        (False, True), ({"temperature": 1.7, "softcap": None}, {"temperature": 0.7, "softcap": 5.0})
    ):
        check_narrow(case, dtype, known, True, **rows)


@pytest.mark.parametrize("known", [False, True], ids=["weight of pi", "known weight"])
@narrow_dtypes
def test_narrow_gradients_are_rounded_to_nearest(dtype: torch.dtype, known: bool) -> None:
    case = make_case("contiguous", torch.float32, 20011, b=3, t=3, unscored="none")
    dz, expected, _ = write_narrow(case, dtype, known, True, factor=1000.0, zeros=False)
    assert_rounded_to_nearest(dz, expected)


@narrow_dtypes
def test_narrow_gradients_of_a_shard(dtype: torch.dtype) -> None:
    """It is that of the softmax over the whole vocabulary, less 1 where the label is in the shard."""
    case = make_case("contiguous", torch.float32, 600, unscored="none")
    whole = case.batch()
    lse, weight = forward(whole).lse, torch.randn(4).double()
    for first, last in ((0, 301), (301, 600)):
        part = case.logits[..., first:last].clone()
        batch = whole._replace(logits=part, vocab_start=first, whole_vocab=600)
        dz = torch.full_like(part, NAN, dtype=dtype)
        select(part).backward(batch, lse, weight, 1.0, dz)
        exact = gradient(batch._replace(logits=part.double()), lse, weight).reshape(part.shape)
        error = (ROUNDING[dtype] + 1e-5) * exact.abs() + SMALLEST[dtype]
        assert_within(dz.double(), exact, error + 2e-6 * weight.abs()[:, None, None] * (exact < 0), "gradient")


@narrow_dtypes
def test_narrow_gradients_with_a_grad_output(dtype: torch.dtype) -> None:
    """The host may not know the factor, the gradient may be there already, or it may be scaled afterwards."""
    case = make_case("sliced", torch.float32, 131)
    batch, weight = case.batch(), torch.randn(4).double()
    backend, lse = select(batch.logits), forward(case.batch()).lse
    dz = torch.full(case.logits.shape, NAN, dtype=dtype)
    three = torch.tensor(3.0).double()
    backend.backward(batch, lse, weight, 0.5, dz, three, 3.0)
    assert bool(dz.isnan().all())
    backend.backward(batch, lse, weight, 0.5, dz, three, 2.0)
    again = torch.empty_like(dz)
    backend.backward(batch, lse, weight, 1.5, again)
    assert torch.equal(dz, again)
    backend.scale(batch, dz, 2.0, torch.tensor(-1.0).double())
    assert torch.equal(dz, -2 * again)
    backend.scale(batch, dz, 2.0, torch.tensor(0.0).double())
    scored = batch.labels.reshape(case.tokens.shape) != -100
    assert not dz[scored].any()


@pytest.mark.parametrize("known", [False, True], ids=["backward", "forward_backward"])
def test_where_a_gradient_may_not_be_written(known: bool) -> None:
    case = make_case("contiguous", torch.float32, 32, b=2, t=3)
    batch = case.batch()
    terms = checks.make_terms(batch, **{**TERMS, **make_terms(case), "objective": "dpg"})
    backend = select(batch.logits)

    def write(batch: Batch, dz: Tensor) -> None:
        if known:
            backend.forward_backward(batch, terms, False, 1.0, 1.0, dz)
        else:
            backend.backward(batch, torch.zeros(6).double(), torch.ones(2).double(), 1.0, dz)

    for first in (0, 32):  # dz is the first or the second half of a row, which holds 64 numbers of 16 bits
        with pytest.raises(ValueError, match=r"dz \(torch.bfloat16\) lies in the memory of the logits"):
            write(batch, case.base.view(torch.bfloat16)[..., first : first + 32])
    with pytest.raises(TypeError, match=r"dz must be torch.float32, torch.bfloat16 or torch.float16 for logits"):
        write(batch, torch.empty(2, 3, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"dz must have the shape of the logits, \(2, 3, 32\), got \(6, 32\)"):
        write(batch, torch.empty(6, 32))
    half = batch._replace(logits=case.logits.nan_to_num(0.0).half())
    with pytest.raises(TypeError, match=r"dz must be torch.float16 for logits of torch.float16, got torch.float32"):
        write(half, torch.empty(2, 3, 32))


# --- shapes without rows, labels of other kinds ------------------------------------------------------------------


@two_dtypes
@inplaces
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("b", "t"), [(0, 4), (0, 0), (3, 0), (1, 1), (3, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "packed32"])
def test_empty_and_short(
    layout: str, b: int, t: int, reduction: str, objective: str, inplace: bool, dtype: torch.dtype
) -> None:
    case = make_case(layout, dtype, 31, b, t)
    n = case.batch().n_sequences
    grad = torch.randn(n).double() if reduction == "none" else None
    out = check(case, inplace=inplace, grad=grad, objective=objective, reduction=reduction, return_entropy=True,
                **make_terms(case, zeros=False))  # fmt: skip
    assert out.loss.shape == ((n,) if reduction == "none" else ())
    if n == 0 and reduction != "none":
        assert float(out.loss) == 0.0
    if t == 0:
        assert (out.log_prob.abs().sum() == 0) or layout == "packed32"


def test_thousands_of_sequences() -> None:
    """Their losses are added up in an order of the kernels' own, to a few roundings."""
    torch.manual_seed(0)
    b = 3001
    logits, tokens = torch.randn(b, 1, 5), torch.randint(5, (b, 1))
    out = dmfast.dm_loss(logits, tokens, log_target=torch.randn(b), log_proposal=torch.randn(b) - 2, log_z=0.0)
    exact = math.fsum((-out.weight * out.log_prob).tolist()) / b
    assert abs(out.loss.item() - exact) < 1e-14 * b * float((out.weight * out.log_prob).abs().max())


@dtypes
def test_nothing_scored_at_all(dtype: torch.dtype) -> None:
    case = make_case("contiguous", dtype, 31, b=2)
    case.base.fill_(NAN)
    case.mask = torch.zeros(2, 6, dtype=torch.bool)
    for objective in ("gdc++", "dpg"):
        out = check(case, objective=objective, return_entropy=True, **make_terms(case, zeros=False))
        assert bool((out.log_prob == 0).all()) and float(out.loss) == 0.0


@pytest.mark.parametrize("token_dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_dtypes_of_tokens_and_mask(token_dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    """All forms give the same bits. What a masked position holds does not matter, and any integer but 0 is True."""
    case = make_case("contiguous")
    assert case.mask is not None
    terms = make_terms(case)
    out, dz = run(case, False, None, **terms)
    tokens = torch.where(case.mask, case.tokens, 32000).to(token_dtype)
    mask = case.mask.to(mask_dtype) * (1 if mask_dtype == torch.bool else 3)
    out2, dz2 = run(Case(case.base, case.cut, tokens.t().contiguous().t(), mask), False, None, **terms)
    assert torch.equal(out.loss, out2.loss) and torch.equal(dz, dz2)


@dtypes
@inplaces
def test_offsets_beyond_32_bits(inplace: bool, dtype: torch.dtype) -> None:
    """The two sequences are 2^31 + 6 elements apart.

    The memory between them is never touched, so it costs none. They have the alignment that they have side by side,
    because the last bits of CUDA's sums depend on it.
    """
    v, gap = 7, 2**31 + 6
    small = make_case("contiguous", dtype, v, b=2, t=2, unscored="none")
    base = torch.empty(gap + 2 * v, dtype=dtype)
    logits = base.as_strided((2, 2, v), (gap, v, 1))
    logits.copy_(small.base)
    terms = make_terms(small, zeros=False)
    for objective in ("dpg", "gdc++"):
        truth, dz = run(small, False, None, objective=objective, **terms)
        logits.copy_(small.base)
        leaf = logits.detach().requires_grad_()
        used = _Alias.apply(leaf)
        out = dmfast.dm_loss(used, small.tokens, objective=objective, inplace=inplace, **terms)
        out.loss.backward()
        assert torch.equal(out.log_prob, truth.log_prob)
        assert leaf.grad is not None and torch.equal(leaf.grad, dz)


class _Alias(torch.autograd.Function):
    """Make a non-leaf over the same memory, which clone() would copy."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clone()


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
def test_a_sequence_of_1024_tokens(dtype: torch.dtype) -> None:
    """log pi is within 1e-4 nats of fp64. The log-sum-exp of a row is within 1e-6, and in the mean within 5e-8."""
    torch.manual_seed(0)
    logits = torch.empty(1, 1024, 50257, dtype=dtype)
    for chunk in logits.split(128, dim=1):
        chunk.copy_(3 * torch.randn(chunk.shape))
    tokens = torch.randint(50257, (1, 1024))
    scores = forward(checks.make_batch(logits, tokens, None, None, 1.0, None), True)
    log_prob, entropy, lse = 0.0, 0.0, []
    for z, y in zip(logits.split(64, dim=1), tokens.split(64, dim=1), strict=True):
        truth = score(checks.make_batch(z.double(), y, None, None, 1.0, None), True)
        log_prob, entropy = log_prob + float(truth.log_prob), entropy + float(truth.entropy)
        lse.append(truth.lse)
    error = scores.lse - torch.cat(lse)
    assert abs(float(scores.log_prob) - log_prob) < 1e-4
    assert float(error.abs().max()) < 1e-6 and abs(float(error.mean())) < 5e-8
    assert scores.entropy is not None and abs(float(scores.entropy) - entropy) < 1e-3


@dtypes
@pytest.mark.parametrize("v", [31, 1000, 50257])
@pytest.mark.parametrize(
    "values",
    [
        *(lambda s, w=w: (w * torch.randn(s)).clamp(-100, 100) for w in (0.1, 1.0, 10.0, 30.0)),
        lambda s: 200 * torch.rand(s) - 100,
        lambda s: 95 + 0.5 * torch.randn(s),
        lambda s: -100 + 0.5 * torch.randn(s).abs(),
        lambda s: -torch.log(torch.arange(1, s[-1] + 1.0)) + 0.01 * torch.randn(s),
        lambda s: torch.full(s, -8.0).index_fill_(-1, torch.tensor(s[-1] // 2), 9.0) + 0.1 * torch.randn(s),
        # The reference rises in every block, or in one block only, far from where it was.
        lambda s: torch.linspace(-90, 90, s[-1]) + 0.1 * torch.randn(s),
        lambda s: torch.where(torch.arange(s[-1]) < s[-1] - 3, -60.0, 8.0) + torch.randn(s),
        # One term dominates its block, the sum of the earlier blocks dominates that term, and thousands of terms are
        # too small for fp32 beside either.
        lambda s: torch.where(torch.arange(s[-1]) % 500 == 7, 0.0, -16.5) + 0.1 * torch.randn(s),
    ],
    ids=[
        "randn/10",
        "randn",
        "10randn",
        "30randn",
        "uniform",
        "high",
        "low",
        "Zipf",
        "peaked",
        "rising",
        "late",
        "spiky",
    ],
)
def test_log_sum_exp(values: Callable[[tuple[int, ...]], Tensor], v: int, dtype: torch.dtype) -> None:
    case = make_case("contiguous", dtype, v, b=4, t=max(16, min(500, 400_000 // v)), values=values, unscored="none")
    error = forward(case.batch()).lse - torch.logsumexp(case.logits.double(), -1).flatten()
    assert float(error.abs().max()) < 1e-6
    # The mean of n rows may be off by its own standard error.
    assert abs(float(error.mean())) < 5e-8 + 4 * float(error.std()) / math.sqrt(error.numel())


@dtypes
@pytest.mark.parametrize(("temperature", "softcap"), [(0.3, None), (1.7, None), (1.0, 30.0), (0.3, 5.0), (0.9, 50.0)])
def test_log_sum_exp_scaled_or_capped(temperature: float, softcap: float | None, dtype: torch.dtype) -> None:
    case = make_case("contiguous", dtype, 20000, b=1, t=40, values=lambda s: 8 * torch.randn(s), unscored="none")
    truth = score(case.batch(temperature, softcap))
    error = forward(case.batch(temperature, softcap)).lse - truth.lse
    assert float(error.abs().max()) < 1e-6 and abs(float(error.mean())) < 1e-7


# --- determinism --------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "packed64"])
def test_same_bits_whatever_the_threads(layout: str, dtype: torch.dtype) -> None:
    case = make_case(layout, dtype, 4099, b=5, t=9)
    terms = make_terms(case)

    def everything(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        found = []
        for objective, inplace in itertools.product(("gdc++", "dpg"), (False, True)):
            out, dz = run(case, inplace, torch.tensor(1.7).double(), objective=objective, return_entropy=True, **terms)
            found += [out.loss, out.log_prob, out.log_ratio, out.log_target_ratio, out.weight, out.entropy, dz]
        return [bits(x.detach()) for x in found]

    before = torch.get_num_threads()
    try:
        first = everything(1)
        assert torch.equal(first[6], first[13]), "in place gives other bits"
        for threads in (1, 2, 2, 3, 7):
            assert all(map(torch.equal, first, everything(threads))), threads
    finally:
        torch.set_num_threads(before)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    """log pi and gradient have the same bits alone, in a batch, and packed."""
    case = make_case("contiguous", v=1031, b=5, t=7, unscored="none")
    whole = dmfast.sequence_log_prob(case.base, case.tokens)
    packed = dmfast.sequence_log_prob(case.base.flatten(0, 1), case.tokens.flatten(), cu_seqlens=torch.arange(6) * 7)
    alone = [dmfast.sequence_log_prob(case.base[i : i + 1], case.tokens[i : i + 1]) for i in range(5)]
    assert torch.equal(bits(whole), bits(packed)) and torch.equal(bits(whole), bits(torch.cat(alone)))


# --- hypothesis ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from([*LAYOUTS, *PACKED]),
    dtype=st.sampled_from(DTYPES),
    v=st.integers(1, 600) | st.sampled_from([511, 512, 513, 1024, 1537]),
    b=st.integers(0, 5),
    t=st.integers(0, 7),
    seed=st.integers(0, 2**16),
    width=st.sampled_from([0.0, 1.0, 5.0, 40.0]),
    unscored=st.sampled_from(["mixed", "none"]),
    temperature=st.floats(0.2, 5.0),
    softcap=st.none() | st.floats(2.0, 60.0),
    name=st.sampled_from(OBJECTIVES),
    mode=st.sampled_from(list(MODES)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    inplace=st.booleans(),
    entropy=st.booleans(),
)
def test_any_shape(
    layout, dtype, v, b, t, seed, width, unscored, temperature, softcap, name, mode, reduction, inplace, entropy
):  # type: ignore[no-untyped-def]
    case = make_case(layout, dtype, v, b, t, seed, lambda s: width * torch.randn(s), unscored)
    rows = {"temperature": temperature, "softcap": softcap}
    terms = make_terms(case, seed, **rows)
    on_policy, stored = MODES[mode]
    if not stored:
        del terms["log_proposal"]
    n = case.batch().n_sequences
    grad = torch.randn(n).double() if reduction == "none" else None
    parameters = (
        {"log_scale": float(terms["log_base"].max()) if n else 0.0}
        if name == "reinforce_p"
        else PARAMETERS.get(name, {})
    )
    check(case, inplace=inplace, grad=grad, objective=Objective(name, **parameters), on_policy=on_policy,
          max_weight=50.0, reduction=reduction, return_entropy=entropy, **rows, **terms)  # fmt: skip


# --- the formula --------------------------------------------------------------------------------------------------

mpmath.mp.dps = 50


def exact_weight(
    objective: Objective, on_policy: bool, log_prob: float, terms: dict[str, Tensor], i: int = 0
) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Return A by the table of the design in 50 digits, and the sum of the absolute values of its parts.

    A is rho * (r - baseline), times Z unless normalised. P = 0 takes the limit, which is +-inf if it is infinite.
    """
    value = {k: mpmath.mpf(float(v[i])) for k, v in terms.items() if k != "context_id"}
    log_q = value["log_proposal"]
    log_pi = log_q if on_policy else mpmath.mpf(float(log_prob))
    log_p, log_z = value["log_target"], value["log_z"]
    if log_z == -INF:
        if objective.name in objectives.TARGET_OBJECTIVES:
            return mpmath.mpf(0), mpmath.mpf(0)
        log_z = mpmath.mpf(0)  # no formula below uses it
    rho = mpmath.exp(log_pi - log_q)
    baseline = mpmath.mpf(1) if objective.name == "gdc++" else value.get("baseline", mpmath.mpf(0))
    zero = log_p == -INF
    log_t = mpmath.inf if zero else log_pi - (log_p - log_z)
    t = mpmath.inf if zero else mpmath.exp(log_t)
    one_over_t = mpmath.mpf(0) if zero else 1 / t
    kind = objective.name
    if kind in ("dpg", "gdc++"):
        r = [one_over_t]
    elif kind == "reverse_kl":
        r = [-log_t, mpmath.mpf(-1)]
    elif kind == "js":
        r = [mpmath.log1p(one_over_t), -mpmath.log(2)]
    elif kind == "tv":
        r = [-mpmath.sign(log_t) / 2]
    elif kind == "chi2":
        r = [one_over_t**2, mpmath.mpf(-1)]
    elif kind == "reverse_chi2":
        r = [mpmath.mpf(2), -2 * t]
    elif kind == "alpha":
        power = 1 - mpmath.mpf(objective.alpha)
        factor = 1 if power == 0 or not objective.normalize_alpha else 1 / power
        log_return = -log_t if power == 0 else -power * log_t  # log (p/pi)^(1 - alpha)
        gain = log_return if power == 0 else mpmath.expm1(log_return)
        if objective.max_return is not None and gain > objective.max_return:
            r = [factor * mpmath.mpf(objective.max_return)]
        elif power == 0 or abs(log_return) < 1:
            r = [factor * gain]
        else:
            r = [factor * mpmath.exp(log_return), mpmath.mpf(-factor)]
    elif kind == "reinforce":
        r = [value["reward"]]
    elif kind == "reinforce_p":
        r = [mpmath.mpf(0) if zero else mpmath.exp(log_p - mpmath.mpf(objective.log_scale))]
    else:
        beta = mpmath.mpf(objective.beta)
        r = [value["reward"], -beta * log_pi, beta * value["log_base"]]
    scale = rho if objective.normalize else rho * mpmath.exp(log_z)
    parts = [x * scale for x in (*r, -baseline)]
    # The parts to subtract are added first. fsum drops what is 2^340 times smaller than the rest, even where the rest
    # then cancels to 0.
    return mpmath.fsum([parts[0], mpmath.fsum(parts[1:])]), mpmath.fsum(map(abs, parts))


def formula(
    how: str, objective: Objective, on_policy: bool, log_prob: float, terms: dict[str, Tensor], bound: float
) -> float:
    """Return A of the one sequence in ``terms``, by csrc/objective.h or by dmfast.objectives."""
    return float(formulas(how, objective, on_policy, torch.tensor([log_prob]).double(), terms, bound)[0])


def formulas(
    how: str, objective: Objective, on_policy: bool, log_prob: Tensor, terms: dict[str, Tensor], bound: float
) -> Tensor:
    """Return A of each sequence in ``terms``, by csrc/objective.h or by dmfast.objectives."""
    given = {k: v for k, v in terms.items() if k != "context_id"}
    baseline = given.pop("baseline")
    if objective.name == "gdc++":
        baseline = torch.ones_like(baseline)
    all_terms = objectives.Terms.of(objective, on_policy, bound, baseline=baseline, **given)
    if how == "Python":
        return objectives.clip(objectives.weigh(all_terms.with_log_prob(log_prob)), bound)[0]
    columns = [given[k].tolist() for k in ("log_proposal", "log_target", "log_z", "reward", "log_base")]
    rows = zip(log_prob.tolist(), *columns, baseline.tolist(), strict=True)
    return torch.tensor([extension.weigh(all_terms, *row)[2] for row in rows], dtype=torch.float64)


def one(**values: float) -> dict[str, Tensor]:
    return {k: torch.tensor([v]).double() for k, v in values.items()}


normalized = pytest.mark.parametrize(
    ("name", "normalize"),
    [(name, z) for name in OBJECTIVES for z in (True, False) if z or name in objectives.TARGET_OBJECTIVES],
)


def make_objective(name: str, normalize: bool) -> Objective:
    parameters = {"kl_control": {"beta": 0.3}, "reinforce_p": {"log_scale": -19.5}, "alpha": {"alpha": 0.6}}
    return Objective(name, normalize=normalize, **parameters.get(name, {}))


@pytest.mark.parametrize("on_policy", [False, True])
@normalized
def test_the_formula_in_cpp_and_python_is_the_table(name: str, normalize: bool, on_policy: bool) -> None:
    """They agree at ratios of every size that fp64 holds, and with P = 0."""
    torch.manual_seed(0)
    objective = make_objective(name, normalize)
    for i in range(150):
        a, b, c, d, e, f = (3.0 ** (i % 5) * torch.randn(6)).tolist()
        terms = one(log_proposal=-20 + a, log_target=-20 + b, log_z=c, reward=d, log_base=-20 + e,
                    baseline=0.0 if i % 3 == 0 else f)  # fmt: skip
        if i % 7 == 0 and not objective.infinite_at_zero:
            terms["log_target"][0] = -INF
        exact, size = exact_weight(objective, on_policy, -20.0, terms)
        for how in ("C++", "Python"):
            weight = formula(how, objective, on_policy, -20.0, terms, INF)
            assert abs(weight - exact) <= 1e-12 * size + 1e-300, (how, i)


def extremes() -> tuple[Tensor, dict[str, Tensor]]:
    """Return log pi and the other terms of 540 sequences."""
    grid = itertools.product(
        [-11500.0, -20.0, 0.0],  # log pi
        [-11500.0, -20.25, 0.0],  # log q
        [-INF, -11500.0, -19.0, 0.0, 700.0],  # log P
        [-INF, -900.0, 0.5, 800.0],  # log Z
        [(0.0, 0.0), (0.0, 1.0), (2.0, -3.5)],  # reward, baseline
    )
    rows = torch.tensor([(pi, q, p, z, *rewards) for pi, q, p, z, rewards in grid], dtype=torch.float64)
    names = ("log_proposal", "log_target", "log_z", "reward", "baseline")
    terms = dict(zip(names, rows[:, 1:].T.contiguous(), strict=True))
    return rows[:, 0], terms | {"log_base": torch.full((len(rows),), -12.5, dtype=torch.float64)}


@pytest.mark.parametrize("on_policy", [False, True])
@normalized
def test_the_formula_at_extremes(name: str, normalize: bool, on_policy: bool) -> None:
    check_extremes(make_objective(name, normalize), on_policy)


def check_extremes(objective: Objective, on_policy: bool) -> None:
    """Check A for P = 0, Z = 0 and ratios of e^+-11500.

    A is right where fp32 holds it. Beyond, it is nothing that fp32 holds, so that the error names the sequence. With
    max_weight it is the bound with A's sign, and never NaN.
    """
    largest = torch.finfo(torch.float32).max
    wrong = []
    log_prob, terms = extremes()
    bounds = (INF, 4.0)
    found = {(how, bound): formulas(how, objective, on_policy, log_prob, terms, bound).tolist()
             for how, bound in itertools.product(("C++", "Python"), bounds)}  # fmt: skip
    for i, pi in enumerate(log_prob.tolist()):
        exact, size = exact_weight(objective, on_policy, pi, terms, i)
        error = size * 1e-11 + 1e-300 if mpmath.isfinite(size) else 0
        for (how, bound), weights in found.items():
            weight = weights[i]
            expected = max(min(exact, bound), -bound)
            if abs(expected) > largest:
                right = not abs(weight) <= largest
            else:
                right = weight == expected or abs(weight - expected) <= error
            if not right:
                inputs = {"log_prob": pi} | {k: float(v[i]) for k, v in terms.items()}
                wrong.append(f"{how}, bound {bound}: {weight} for {mpmath.nstr(expected, 6)} at {inputs}")
    if wrong:
        pytest.fail(f"{len(wrong)} wrong: " + "; ".join(wrong[:: max(len(wrong) // 4, 1)]))
