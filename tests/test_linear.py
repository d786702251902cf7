"""Test linear_dm_loss and linear_sequence_log_prob against the eager twin in fp64, which forms all logits.

The tests vary options, dtypes, chunk boundaries and what is frozen, and run inside autograd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import dmfast
from dmfast import Objective, eager, functional
from dmfast.functional import DMLossOutput
from dmfast.kernels import linear, products, use_backend
from dmfast.objectives import OBJECTIVES

INF = math.inf
V, D = 53, 8
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Chunks have one row, end in the midst of sequences, have whole sequences, or have everything at once.
CHUNKS = [1, 3, 7, 13, 1000]
chunks = pytest.mark.parametrize("rows", CHUNKS)


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tokens: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    terms: dict[str, Tensor]

    def inputs(self, wide: bool) -> list[Tensor | None]:
        """Return leaves of hidden, weight, bias."""
        tensors = (self.hidden, self.weight, self.bias)
        return [None if x is None else (x.double() if wide else x.clone()).requires_grad_() for x in tensors]

    def chunk_bytes(self, rows: int) -> int:
        return rows * linear.row_stride(V) * 4  # 16-bit hidden states have fp32 logits


def make(
    layout: str = "padded", dtype: torch.dtype = torch.float32, bias: bool = True, unscored: bool = True, seed: int = 0
) -> Case:
    torch.manual_seed(seed)
    if layout == "packed":
        lengths = [0, 1, 5, 0, 0, 9, 3, 0]
        shape: tuple[int, ...] = (sum(lengths),)
        cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        b = len(lengths)
    else:
        shape, cu, b = (5, 6), None, 5
    hidden = torch.randn(*shape, D).to(dtype)
    if layout == "transposed":
        hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    weight, b_ = torch.randn(V, D).to(dtype), torch.randn(V).to(dtype)
    tokens, mask = torch.randint(V, shape), None
    if unscored:
        tokens = tokens.masked_fill(torch.rand(shape) < 0.2, -100)
        mask = torch.rand(shape) > 0.2
        if layout != "packed":
            mask[2] = False
    noise = torch.randn(6, b).double()
    wide = None if not bias else b_.double()
    log_pi = eager.linear_sequence_log_prob(hidden.double(), weight.double(), tokens, mask, bias=wide, cu_seqlens=cu)
    terms = {
        "log_target": log_pi + noise[0], "log_proposal": log_pi + noise[1] / 2, "log_z": noise[2] / 3,
        "reward": noise[3], "log_base": log_pi + noise[4], "context_id": torch.arange(b) % 2,
    }  # fmt: skip
    terms["log_target"][0] = -INF
    return Case(hidden, weight, b_ if bias else None, tokens, mask, cu, terms)


def close(actual: Tensor | None, expected: Tensor | None, tolerance: float, what: str) -> None:
    assert (actual is None) == (expected is None), what
    if actual is None or expected is None or expected.numel() == 0:
        return
    scale = expected.double().abs().max().clamp(min=1e-30)
    finite = expected.isfinite()
    assert torch.equal(actual.double()[~finite], expected.double()[~finite]), what
    error = (actual.double() - expected.double())[finite].abs().max() if finite.any() else torch.zeros(())
    assert error <= tolerance * (scale if scale.isfinite() else 1.0), (
        f"{what}: off by {float(error):.2e} of {float(scale):.2e}"
    )


FIELDS = ("loss", "log_prob", "log_ratio", "log_target_ratio", "weight", "n_clipped", "entropy")


def check(case: Case, rows: int, grad: Tensor | None = None, **options: object) -> DMLossOutput:
    """Compare values and all three gradients, twice, because a second backward computes its own."""
    common = {**case.terms, **options, "cu_seqlens": case.cu_seqlens}
    data = (case.tokens, case.mask)
    mine, truth = case.inputs(False), case.inputs(True)
    out = dmfast.linear_dm_loss(mine[0], mine[1], *data, bias=mine[2], chunk_bytes=case.chunk_bytes(rows), **common)
    expected = eager.linear_dm_loss(truth[0], truth[1], *data, bias=truth[2], **common)
    tolerance = TOLERANCE[case.hidden.dtype]
    for name in FIELDS:
        close(getattr(out, name), getattr(expected, name), tolerance, name)
    assert out.loss.dtype == torch.float64 and bool(out.scored.all())
    wide_leaves, leaves = [x for x in truth if x is not None], [x for x in mine if x is not None]
    wanted = torch.autograd.grad(expected.loss, wide_leaves, grad)
    first = torch.autograd.grad(out.loss, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(out.loss, leaves, grad)
    for name, x, g, g2, e in zip(("hidden", "weight", "bias"), leaves, first, again, wanted, strict=False):
        assert g.dtype == x.dtype and g.shape == x.shape
        close(g, e, tolerance, f"gradient of {name}")
        close(g2, e, tolerance, f"second gradient of {name}")
    if case.mask is not None:
        unscored = ~case.mask | (case.tokens == -100)
        assert bool((first[0][unscored] == 0).all())
    return out


@chunks
@pytest.mark.parametrize("layout", ["padded", "packed", "transposed"])
@pytest.mark.parametrize("unscored", [True, False], ids=["masked", "all rows"])
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_layouts_and_chunks(layout: str, unscored: bool, objective: str, rows: int) -> None:
    case = make(layout, bias=rows % 2 == 1, unscored=unscored)
    check(case, rows, objective=objective, return_entropy=True)


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("logits_dtype", ["float32", "same"])
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_dtypes(dtype: torch.dtype, logits_dtype: str, objective: str, rows: int) -> None:
    """Values are those of fp64 logits, or of the logits that nn.Linear would round to the dtype.

    Gradients are off by roundings of the dtype.
    """
    case = make(dtype=dtype)
    h, w, b = case.inputs(False)
    options = {**case.terms, "objective": objective, "max_weight": 5.0}
    if logits_dtype == "same":
        logits = nn.functional.linear(case.hidden, case.weight, case.bias)
    else:
        logits = nn.functional.linear(case.hidden.double(), case.weight.double(), case.bias.double()).float()
    expected = dmfast.dm_loss(logits, case.tokens, case.mask, **options)
    for scale in (None, 4.0):
        out = dmfast.linear_dm_loss(
            h, w, case.tokens, case.mask, bias=b, grad_scale=scale, chunk_bytes=case.chunk_bytes(rows),
            logits_dtype=logits_dtype, **options,
        )  # fmt: skip
        for name in FIELDS:
            # The sums over D are others than torch's, so some are rounded the other way.
            close(getattr(out, name), getattr(expected, name), 1e-4 if logits_dtype == "float32" else 3e-2, name)
        truth = case.inputs(True)
        frozen = {**options, "objective": lambda _: expected.weight}
        wide = eager.linear_dm_loss(truth[0], truth[1], case.tokens, case.mask, bias=truth[2], **frozen)
        grad = torch.tensor(scale or 1.0).double()
        found = torch.autograd.grad(out.loss, [h, w, b], grad)
        for g, e in zip(found, torch.autograd.grad(wide.loss, truth, grad), strict=True):
            assert g.dtype == dtype
            close(g, e, TOLERANCE[dtype], "gradient")


WAYS = {
    "same": products.Ways("native", "native", "widened"),
    "a CPU": products.Ways("widened", "widened", "widened"),
    "a CPU with bf16 instructions, a GPU without products into fp32": products.Ways("widened", "native", "widened"),
}


@pytest.mark.parametrize("where", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("length", "spread"), [(1024, 2.0), (1024, 6.0), (48, 6.0)])
def test_log_prob_of_16_bit_states_is_within_a_thousandth_of_fp64(
    dtype: torch.dtype, where: str, length: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for 1,024 tokens, and in proportion for fewer. Rounded logits are off by more.

    Gradients are no worse than those of nn.Linear's logits in fp32.
    """
    torch.manual_seed(1)
    vocab, dim = 4999, 32
    hidden, weight = torch.randn(1, length, dim).to(dtype), (torch.randn(vocab, dim) * spread / dim**0.5).to(dtype)
    bias = torch.randn(vocab).to(dtype)
    tokens = torch.randint(vocab, (1, length))
    monkeypatch.setattr(products, "ways", lambda *_: WAYS[where])
    logits_dtype = "same" if where == "same" else "float32"

    def graded(
        inputs: tuple[Tensor, ...], log_prob: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        found = log_prob(*leaves)
        return found.detach(), list(torch.autograd.grad(found.sum() / length, leaves))

    def plain(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return eager.sequence_log_prob(nn.functional.linear(h, w, b).to(torch.promote_types(h.dtype, torch.float32)),
                                       tokens)  # fmt: skip

    def fused(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return dmfast.linear_sequence_log_prob(h, w, tokens, bias=b, logits_dtype=logits_dtype)

    inputs = (hidden, weight, bias)
    truth, exact = graded(tuple(x.double() for x in inputs), plain)
    found, ours = graded(inputs, fused)
    error = float((found - truth).abs().max()) * 1024 / length
    if where == "same":
        assert error > 1e-3  # this is why logits are in fp32
        return
    assert error < 1e-3
    for mine, theirs, e in zip(ours, graded(inputs, plain)[1], exact, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - e).norm() <= 1.1 * (theirs.double() - e).norm()


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_log_prob_at_the_size_of_a_model(dtype: torch.dtype, precision: str) -> None:
    """It holds where rounding adds up, in 1,024 tokens of D 576 with large logits, at any fp32 precision of torch."""
    torch.manual_seed(5)
    weight = (torch.randn(20011, 576) * 5.7 / 24).to(dtype)
    hidden, tokens = torch.randn(1, 1024, 576).to(dtype), torch.randint(20011, (1, 1024))
    exact = eager.linear_sequence_log_prob(hidden.double(), weight.double(), tokens)
    torch.set_float32_matmul_precision(precision)
    try:
        found = dmfast.linear_sequence_log_prob(hidden, weight, tokens)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (found - exact).abs() < 1e-3


@pytest.fixture
def settings() -> Iterator[None]:
    """Restore the way in which torch multiplies fp32 matrices, after the test."""
    yield
    torch.set_float32_matmul_precision("highest")
    for each in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        if hasattr(each, "fp32_precision"):
            each.fp32_precision = "none"


def set_new(parent: bool) -> None:
    for each in [torch.backends] if parent else [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]:
        each.fp32_precision = "tf32"


SET: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "fp32_precision": lambda: set_new(False),
    "fp32_precision of all": lambda: set_new(True),
}


def fp32_settings() -> dict[str, object]:
    read: dict[str, Callable[[], object]] = {
        "cuda": lambda: torch.backends.cuda.matmul.fp32_precision,
        "mkldnn": lambda: torch.backends.mkldnn.matmul.fp32_precision,
        "allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
        "precision": torch.get_float32_matmul_precision,
    }
    found: dict[str, object] = {}
    for name, get in read.items():
        try:
            found[name] = get()
        # Other versions of torch lack it, and torch itself refuses mixed settings.
        except (AttributeError, RuntimeError) as error:
            found[name] = type(error)
    return found


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("how", SET)
@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_the_switch_to_ieee_products_is_put_back(device: str, how: str) -> None:
    """It is put back after an error too, and a setting that was inherited is inherited again."""
    if "fp32_precision" in how and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has one setting for all devices")
    SET[how]()
    before = fp32_settings()
    name = "cuda" if device == "cuda" else "mkldnn"
    inside: dict[str, object] = {}

    def fail() -> None:
        with products.ieee(torch.device(device)):
            inside.update(fp32_settings())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside[name] == "ieee" or inside["precision"] == "highest"
    assert fp32_settings() == before
    if how == "fp32_precision of all":
        torch.backends.fp32_precision = "ieee"
        assert fp32_settings()[name] == "ieee"


@pytest.mark.usefixtures("settings")
def test_the_switch_of_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_SETTINGS", {"cuda": object()})
    torch.set_float32_matmul_precision("medium")
    with products.ieee(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("logits_dtype", ["float32", "same"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fp32_products_of_the_head_are_ieee_unless_same(
    logits_dtype: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are the products of the gradients, in a backward that comes later, and of the logits to sample from."""
    case = make()
    h, w, _ = case.inputs(False)
    seen: dict[str, set[object]] = {}
    name = "cuda" if h.device.type == "cuda" else "mkldnn"
    name = name if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "precision"

    def watched(product: str) -> Callable[..., object]:
        plain = getattr(products, product)

        def call(*args: object) -> object:
            seen.setdefault(product, set()).add(fp32_settings()[name])
            return plain(*args)

        return call

    for product in ("multiply", "multiply_back", "add_product"):
        monkeypatch.setattr(products, product, watched(product))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return dmfast.linear_dm_loss(h, w, case.tokens, case.mask, logits_dtype=logits_dtype,
                                     chunk_bytes=case.chunk_bytes(7), reduction="none", **case.terms).loss  # fmt: skip

    torch.set_float32_matmul_precision("medium")
    before = fp32_settings()
    found = torch.compile(loss, backend="aot_eager")(h, w) if compiled else loss(h, w)
    found.sum().backward()
    assert fp32_settings() == before
    exact = "highest" if name == "precision" else "ieee"
    wanted = exact if logits_dtype == "float32" else before[name]
    assert seen == {key: {wanted} for key in ("multiply", "multiply_back", "add_product")}
    seen.clear()
    functional.linear_logits(h[0], w)
    assert seen == {"multiply": {exact}}


DEVICES = {  # the values are the capability, whether torch is ROCm's, and whether it has mm(out_dtype=)
    "sm_75": ((7, 5), False, True),
    "sm_80": ((8, 0), False, True),
    "sm_90": ((9, 0), False, True),
    "old torch": ((9, 0), False, False),
    "ROCm": ((9, 4), True, True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("where", DEVICES)
def test_products_into_fp32_where_device_and_torch_have_them(
    where: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability, rocm, has = DEVICES[where]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", "6.4" if rocm else None)
    monkeypatch.setattr(products, "_HAS_OUT_DTYPE", has)
    device = torch.device("cuda", 5)
    products._has_fp32_output.cache_clear()
    found = products.ways(device, dtype, torch.float32), products.ways(device, dtype, dtype)
    products._has_fp32_output.cache_clear()
    way = "fp32 output" if where in ("sm_80", "sm_90") else "widened"
    assert found == (products.Ways(way, "native", way), products.Ways("native", "native", way))
    assert products.ways(device, torch.float32, torch.float32) == products.Ways("native", "native", "native")


@pytest.mark.parametrize("adds", [False, True], ids=["to 2.10", "from 2.11"])
def test_dw_is_added_up_where_a_product_gives_fp32(adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch 2.11 on, addmm adds it up. Before, mm and a sum do, because addmm(out_dtype=) fails there.

    A CPU has neither function, so the test replaces both.
    """
    called: list[str] = []

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        called.append("mm")
        product = a.to(out_dtype) @ b.to(out_dtype)
        return product if out is None else out.copy_(product)

    def addmm(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, beta: int, out: Tensor) -> Tensor:
        called.append("addmm")
        product = a.to(out_dtype) @ b.to(out_dtype)
        return out.copy_(product if beta == 0 else beta * total + product)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(products, "_ADDS_IN_FP32", adds)
    dz, h = torch.randn(300, 7).bfloat16(), torch.randn(300, 5).bfloat16()
    total = torch.full((7, 5), torch.nan)
    products.add_product("fp32 output", total, dz, h, True)
    products.add_product("fp32 output", total, dz, h, False)
    torch.testing.assert_close(total.double(), 2 * (dz.double().t() @ h.double()), rtol=0, atol=2e-4)
    assert called == (["addmm", "addmm"] if adds else ["mm", "mm"])
    logits = torch.empty(300, 7)
    products.multiply("fp32 output", h, total.bfloat16(), torch.ones(7).bfloat16(), logits)
    torch.testing.assert_close(logits.double(), h.double() @ total.bfloat16().double().t() + 1, rtol=1e-5, atol=1e-4)


def test_eager_logits_are_fp32_under_autocast_too() -> None:
    h, w, tokens = torch.randn(2, 6, 16), torch.randn(501, 16) * 2, torch.randint(501, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        found = eager.linear_sequence_log_prob(h, w, tokens)
    exact = eager.linear_sequence_log_prob(h.bfloat16().double(), w.bfloat16().double(), tokens)
    close(found, exact, 1e-5, "log_prob")


def test_a_forbidden_token_stays_forbidden() -> None:
    hidden, weight = torch.rand(2, 3, 8).bfloat16() + 1, torch.randn(300, 8).bfloat16()
    weight[7] = -INF
    tokens = torch.randint(10, 300, (2, 3))
    found = dmfast.linear_sequence_log_prob(hidden, weight, tokens)
    rest = [i for i in range(300) if i != 7]
    close(found, dmfast.linear_sequence_log_prob(hidden, weight[rest], tokens - 1), 1e-5, "log_prob")


PARAMETERS = {"reinforce_p": {"log_scale": -25.0}, "kl_control": {"beta": 0.3}, "alpha": {"alpha": 0.5}}


@pytest.mark.parametrize("rows", [2, 8, 1000])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name: str, on_policy: bool, rows: int) -> None:
    check(make(), rows, objective=Objective(name, **PARAMETERS.get(name, {})), on_policy=on_policy, max_weight=20.0)


@pytest.mark.parametrize("rows", [2, 8, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"softcap": 4.0, "temperature": 1.5},
        {"reduction": "sum"},
        {"num_sequences": 13},
        {"max_weight": 0.1},
        {"grad_scale": 0.25},
        {"objective": lambda t: (t.log_target_ratio - t.log_ratio).clamp(-2, 2)},
        {"objective": Objective("dpg", baseline="leave_one_out")},
        {"objective": Objective("reinforce", baseline="leave_one_out_context"), "on_policy": True},
        {"objective": Objective("dpg", baseline=torch.arange(5.0))},
        {"objective": Objective("chi2", normalize=False), "max_weight": 3.0},
    ],
    ids=", ".join,
)
def test_options(options: dict[str, object], rows: int) -> None:
    case = make()
    check(case, rows, **options)
    check(case, rows, grad=torch.tensor(-1.7).double(), **options)


@pytest.mark.parametrize("rows", [2, 8, 1000])
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_a_loss_per_sequence(objective: str, rows: int) -> None:
    case = make()
    check(case, rows, objective=objective, reduction="none", grad=torch.randn(5).double())


@chunks
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sequence_log_prob(layout: str, rows: int) -> None:
    case = make(layout)
    mine, truth = case.inputs(False), case.inputs(True)
    data = {"cu_seqlens": case.cu_seqlens, "temperature": 1.3, "softcap": 20.0}
    log_pi = dmfast.linear_sequence_log_prob(
        mine[0], mine[1], case.tokens, case.mask, bias=mine[2], chunk_bytes=case.chunk_bytes(rows), **data
    )
    expected = eager.linear_sequence_log_prob(truth[0], truth[1], case.tokens, case.mask, bias=truth[2], **data)
    close(log_pi, expected, 1e-6, "log_prob")
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(log_pi, mine, grad)
    for g, e in zip(found, torch.autograd.grad(expected, truth, grad), strict=True):
        close(g, e, 2e-5, "gradient")
    with torch.no_grad():
        again = dmfast.linear_sequence_log_prob(
            mine[0], mine[1], case.tokens, case.mask, bias=mine[2], chunk_bytes=case.chunk_bytes(rows), **data
        )
    assert torch.equal(again, log_pi.detach()) and not again.requires_grad


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 4)])
def test_nothing_scored(shape: tuple[int, int]) -> None:
    hidden, weight = torch.randn(*shape, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    tokens = torch.full(shape, -100)
    terms = {name: torch.zeros(shape[0]) for name in ("log_target", "log_proposal")}
    out = dmfast.linear_dm_loss(hidden, weight, tokens, log_z=0.0, **terms)
    assert float(out.loss.detach()) == 0.0 and out.log_prob.tolist() == [0.0] * shape[0]
    out.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()
    assert dmfast.linear_sequence_log_prob(hidden, weight, tokens).shape == (shape[0],)


# --- what is computed -------------------------------------------------------------------------------------------


class Counter:
    """Collect the matrix products, as (rows, columns, depth), through torch's dispatcher."""

    def __enter__(self) -> list[tuple[int, ...]]:
        from torch.utils._python_dispatch import TorchDispatchMode

        found: list[tuple[int, ...]] = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                name = func.overloadpacket.__name__
                if name in ("mm", "addmm", "addmm_"):
                    a, b = args[-2:]
                    found.append((a.shape[0], b.shape[1], a.shape[1]))
                return func(*args, **(kwargs or {}))

        self.mode = Mode()
        self.mode.__enter__()
        return found

    def __exit__(self, *error: object) -> None:
        self.mode.__exit__(*error)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_three_products_two_with_a_frozen_head_one_for_scoring(objective: str, bias: bool) -> None:
    case = make(bias=bias)
    scored = int(((case.tokens != -100) & case.mask).sum())
    assert 0 < scored < case.tokens.numel()

    def products(hidden: bool, weight: bool, rows: int = 1000) -> list[tuple[int, ...]]:
        h, w, b = case.inputs(False)
        h.requires_grad_(hidden), w.requires_grad_(weight)
        if b is not None:
            b.requires_grad_(weight)
        with Counter() as found:
            out = dmfast.linear_dm_loss(
                h,
                w,
                case.tokens,
                case.mask,
                bias=b,
                objective=objective,
                chunk_bytes=case.chunk_bytes(rows),
                **case.terms,
            )
            if out.loss.requires_grad:
                out.loss.backward()
        assert (h.grad is not None, w.grad is not None) == (hidden, weight)
        return found

    forward, to_hidden, to_weight = (scored, V, D), (scored, D, V), (V, D, scored)
    assert products(True, True) == [forward, to_hidden, to_weight]
    assert products(True, False) == [forward, to_hidden]
    assert products(False, True) == [forward, to_weight]
    assert products(False, False) == [forward]
    # Chunks are whole sequences here, and no logit is computed twice.
    chunked = products(True, True, rows=6)
    assert len(chunked) % 3 == 0 and len(chunked) > 3
    assert sum(m for m, n, k in chunked if (n, k) == (V, D)) == scored
    # With chunks of one row, the logits are computed twice.
    assert sum(m for m, n, k in products(True, True, rows=1) if (n, k) == (V, D)) > scored


def centred_log_ratio(terms: dmfast.Terms) -> torch.Tensor:
    assert terms.log_prob is not None and terms.log_target is not None
    gap = terms.log_prob - torch.where(terms.log_target == -INF, -9.0, terms.log_target)
    return terms.group_mean(gap) - gap + terms.at_draw(lambda whole: whole.group_mean(whole.log_proposal))


@pytest.mark.parametrize("kind", ["whole_contexts", "per_sequence", None])
def test_three_products_for_a_function_of_log_pi_where_what_goes_together_fits(kind: str | None) -> None:
    case = make()
    context = (torch.arange(len(case.tokens)) // 2).clamp(max=1)
    terms = case.terms | {"context_id": context}
    scored = ((case.tokens != -100) & case.mask).sum(1)

    def own(terms: dmfast.Terms) -> torch.Tensor:
        if kind != "per_sequence":
            return centred_log_ratio(terms)
        assert terms.log_prob is not None
        return terms.log_prob + terms.at_draw(lambda whole: whole.group_mean(whole.log_proposal))

    if kind:
        setattr(own, kind, True)

    def found(rows: int | None, **options: object) -> tuple[list[int], list[torch.Tensor]]:
        h, w, b = case.inputs(False)
        with Counter() as products:
            size = None if rows is None else case.chunk_bytes(rows)
            out = dmfast.linear_dm_loss(h, w, case.tokens, case.mask, bias=b, objective=own,
                                        chunk_bytes=size, entropy_coefficient=0.1, **terms, **options)  # fmt: skip
            out.loss.sum().backward()
        return [m for m, n, k in products if (n, k) == (V, D)], [out.weight, h.grad, w.grad, b.grad]

    forwards, expected = found(None, reduction="none")
    assert sum(forwards) == 2 * int(scored.sum())  # backward computes the logits again
    expected = [expected[0], *(gradient / len(case.tokens) for gradient in expected[1:])]
    of_context = int(torch.stack([scored[context == c].sum() for c in context.unique()]).max())
    enough = {"whole_contexts": of_context, "per_sequence": int(scored.max()), None: int(scored.sum())}[kind]
    for rows, times in ((enough, 1), (1, 2)):
        forwards, values = found(rows)
        assert sum(forwards) == times * int(scored.sum())
        for value, wanted in zip(values, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    assert kind is None or len(found(enough)[0]) > 1  # the call was cut into chunks
    h, w, _ = case.inputs(False)
    out = dmfast.linear_dm_loss(h, w, case.tokens, case.mask, objective=own, **terms)
    (out.loss / 2).backward(retain_graph=True)  # this is another grad_output than was expected
    first = h.grad.clone()
    out.loss.backward()
    torch.testing.assert_close(h.grad, 3 * first)


def test_the_largest_tensor_is_the_buffer() -> None:
    case = make(unscored=False)
    made = []

    class Watch(linear._Products):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            made.append(tuple(self.buffer.shape))

    for rows, expected in ((1, 1), (7, 6), (13, 12), (1000, 30)):
        with patch.object(linear, "_Products", Watch):
            dmfast.linear_sequence_log_prob(
                case.hidden, case.weight, case.tokens, chunk_bytes=case.chunk_bytes(rows) + 100
            )
        assert made.pop() == (expected, V)


# --- inside PyTorch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_an_embedding_and_accumulated_microbatches(tied: bool) -> None:
    """A tied weight gets both of its gradients; two microbatches add up to the whole step."""
    case = make(bias=False)
    ids = torch.randint(V, (5, 6))

    def gradients(loss: str) -> list[Tensor]:
        torch.manual_seed(3)
        embedding, inner, head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=False)
        if tied:
            head.weight = embedding.weight
        modules = nn.ModuleList([embedding, inner, head])
        for part in (slice(0, 5),) if loss != "halves" else (slice(0, 2), slice(2, 5)):
            hidden = inner(embedding(ids[part])).tanh()
            options = {
                **{k: v[part] for k, v in case.terms.items()}, "mask": case.mask[part], "num_sequences": 5,
            }  # fmt: skip
            if loss == "logits":
                out = dmfast.dm_loss(head(hidden), case.tokens[part], **options)
            else:
                out = dmfast.linear_dm_loss(hidden, head.weight, case.tokens[part], **options)
            out.loss.backward()
        return [p.grad for p in modules.parameters()]

    expected = gradients("logits")
    for loss in ("linear", "halves"):
        for g, e in zip(gradients(loss), expected, strict=True):
            close(g, e, 1e-5, loss)


def test_double_backward_is_refused_and_changed_inputs_are_found() -> None:
    case = make()
    h, w, b = case.inputs(False)
    out = dmfast.linear_dm_loss(h, w, case.tokens, case.mask, bias=b, **case.terms)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(out.loss, [h], create_graph=True)
    log_pi = dmfast.linear_sequence_log_prob(h * 1, w, case.tokens, case.mask, bias=b)
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_pi.sum().backward()


@pytest.mark.filterwarnings("ignore:.*lower precision")
def test_autocast_multiplies_as_a_linear_layer_does() -> None:
    case = make()
    h, w, b = case.inputs(False)
    with torch.autocast(h.device.type, torch.bfloat16):
        out = dmfast.linear_dm_loss(h, w, case.tokens, case.mask, bias=b, **case.terms)
        logits = nn.functional.linear(h, w, b)
        assert logits.dtype == torch.bfloat16
        expected = dmfast.dm_loss(logits, case.tokens, case.mask, **case.terms)
    half = [x.to(torch.bfloat16).double() for x in (h, w, b)]
    exact = eager.linear_sequence_log_prob(half[0], half[1], case.tokens, case.mask, bias=half[2])
    close(out.log_prob, exact, 1e-5, "log_prob")
    close(out.log_prob, expected.log_prob, 1e-3, "log_prob")
    close(out.weight, expected.weight, 3e-2, "weight")
    found = torch.autograd.grad(out.loss, [h, w, b])
    for x, g, e in zip((h, w, b), found, torch.autograd.grad(expected.loss, [h, w, b]), strict=True):
        assert g.dtype == x.dtype == torch.float32
        close(g, e, 2e-2, "gradient")


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_under_compile(objective: str) -> None:
    case = make()
    h, w, b = case.inputs(False)

    @torch.compile(backend="aot_eager")
    def step(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = dmfast.linear_dm_loss(
            2 * h, w, case.tokens, case.mask, bias=b, objective=objective, chunk_bytes=case.chunk_bytes(7), **case.terms
        )
        return 3 * out.loss

    expected = (
        3 * dmfast.linear_dm_loss(2 * h, w, case.tokens, case.mask, bias=b, objective=objective, **case.terms).loss
    )
    loss = step(h, w, b)
    close(loss, expected, 1e-6, "loss")
    for g, e in zip(torch.autograd.grad(loss, [h, w, b]), torch.autograd.grad(expected, [h, w, b]), strict=True):
        close(g, e, 1e-5, "gradient")


def test_fp64_goes_through_the_eager_backend() -> None:
    case = make()
    h, w, b = case.inputs(True)
    with use_backend("eager"):
        out = dmfast.linear_dm_loss(h, w, case.tokens, case.mask, bias=b, **case.terms)
        log_pi = dmfast.linear_sequence_log_prob(h, w, case.tokens, case.mask, bias=b)
    expected = eager.linear_dm_loss(h, w, case.tokens, case.mask, bias=b, **case.terms)
    assert torch.equal(out.loss, expected.loss) and torch.equal(log_pi, out.log_prob)
    found = torch.autograd.grad(out.loss, [h, w, b])
    assert all(map(torch.equal, found, torch.autograd.grad(expected.loss, [h, w, b])))


# --- errors -----------------------------------------------------------------------------------------------------


@chunks
def test_a_bad_place_is_named_in_the_whole_call(rows: int) -> None:
    case = make()
    tokens = case.tokens.clone()
    tokens[3, 4], mask = 9, case.mask.clone()
    mask[3, 4] = True
    options = {"chunk_bytes": case.chunk_bytes(rows), **case.terms}
    hidden = case.hidden.clone()
    hidden[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"NaN or \+inf at \(sequence 3, position 4\)"):
        dmfast.linear_dm_loss(hidden, case.weight, tokens, mask, **options)
    bias = torch.zeros(V)
    bias[9] = -INF
    others = torch.where(tokens == 9, 10, tokens)
    others[3, 4] = 9
    with pytest.raises(ValueError, match=r"token 9 at \(sequence 3, position 4\) is -inf"):
        dmfast.linear_dm_loss(case.hidden, case.weight, others, mask, bias=bias, **options)
    options["log_target"] = case.terms["log_target"].clone()
    options["log_target"][3] = 800.0
    with pytest.raises(ValueError, match="the weight A of sequence 3 is"):
        dmfast.linear_dm_loss(case.hidden, case.weight, tokens, mask, **options)
    options["log_target"][3] = math.nan
    with pytest.raises(ValueError, match="log_target holds nan at sequence 3"):
        dmfast.linear_dm_loss(case.hidden, case.weight, tokens, mask, **options)
    tokens[3, 4] = V
    with pytest.raises(ValueError, match=rf"tokens holds {V} at \(sequence 3, position 4\)"):
        dmfast.linear_sequence_log_prob(case.hidden, case.weight, tokens, mask)


WRONG = [
    ({"hidden": torch.zeros(2, 8)}, ValueError, r"hidden must be \(B, T, D\)"),
    ({"hidden": torch.zeros(2, 3, 8, dtype=torch.int64)}, TypeError, "hidden must be float32"),
    ({"weight": torch.zeros(5, 8).double()}, TypeError, "weight must have the dtype of hidden, torch.float32"),
    ({"weight": torch.zeros(5, 9)}, ValueError, r"weight must be \(V, D\) with hidden's D = 8"),
    ({"weight": torch.zeros(5)}, ValueError, r"weight must be \(V, D\)"),
    ({"weight": torch.zeros(5, 8, device="meta")}, ValueError, f"weight is on meta, hidden on {torch.empty(0).device}"),
    ({"weight": torch.zeros(0, 8)}, ValueError, "empty vocabulary"),
    ({"bias": torch.zeros(6)}, ValueError, r"bias must be \(V,\)"),
    ({"bias": torch.zeros(5).double()}, TypeError, "bias must have the dtype"),
    ({"tokens": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "tokens must have the shape"),
    ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be a positive integer, got 0"),
    ({"temperature": -1.0}, ValueError, "temperature must be a positive number"),
]


@pytest.mark.parametrize(("changes", "error", "match"), WRONG)
def test_wrong_arguments(changes: dict[str, object], error: type[Exception], match: str) -> None:
    a = {"hidden": torch.zeros(2, 3, 8), "weight": torch.zeros(5, 8), "tokens": torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(error, match=match):
        dmfast.linear_sequence_log_prob(**{**a, **changes})


@pytest.mark.parametrize("has", [True, False], ids=["bf16 instructions", "none"])
def test_products_on_a_cpu_follow_its_instructions(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_multiplies_bf16", lambda: has)
    cpu, bf16, fp16, fp32 = torch.device("cpu"), torch.bfloat16, torch.float16, torch.float32
    widened, native = "widened", "native" if has else "widened"
    assert products.ways(cpu, bf16, fp32) == (widened, native, widened)
    assert products.ways(cpu, bf16, bf16) == (native, native, widened)
    assert products.ways(cpu, bf16, fp32, parts=True) == (widened, widened, widened)
    assert products.ways(cpu, fp16, fp32) == products.ways(cpu, fp16, fp16) == (widened, widened, widened)
    assert products.ways(cpu, fp32, fp32) == ("native", "native", "native")


def test_a_cpu_on_which_nothing_was_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_multiplies_bf16", lambda: False)
    monkeypatch.setattr(products.platform, "machine", lambda: "aarch64")
    assert "no product was measured on aarch64" in dmfast.backends()["cpu"].detail
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    assert "16-bit products are slower" in dmfast.backends()["cpu"].detail


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_widened_products_of_few_rows(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_CPU_BYTES", 5 * 31 * 4)  # this makes several blocks, of which the last is shorter
    monkeypatch.setattr(products, "_FEW_BYTES", 5 * 31 * 4)
    h, head, dz = torch.randn(rows, 31).to(dtype), torch.randn(77, 31).to(dtype), torch.randn(rows, 77).to(dtype)
    z, dh, total = torch.empty(rows, 77), torch.empty(rows, 31), torch.ones(77, 31)
    products.multiply("widened", h, head, None, z)
    products.multiply_back("widened", dz, head, dh)
    products.add_product("widened", total, dz, h, first=False)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(z.double(), h.double() @ head.double().t())
    close(dh.double(), dz.double() @ head.double())
    close(total.double(), 1 + dz.double().t() @ h.double())


def test_how_many_rows_the_buffer_holds() -> None:
    def rows(v: int, device: str, chunk_bytes: int | None, wants_head: bool = True) -> int:
        return linear.rows_of_buffer(v, 4, torch.device(device), chunk_bytes, wants_head)

    assert linear.row_stride(50257) == 50304 and linear.row_stride(64) == 64
    assert rows(50257, "cpu", None) == 667 and rows(50257, "cuda", None) == rows(50257, "xpu", None) == 4096
    assert rows(128256, "cuda", None) == 2092 and rows(128256, "cuda", None, False) == 1024
    assert rows(1000, "cpu", None) == rows(1000, "cuda", None) == 32768
    assert rows(50257, "cuda", 50304 * 4 * 7) == 7 and rows(50257, "cpu", 1) == 1


@pytest.mark.parametrize("logits_dtype", ["float16", torch.float64, None])
def test_a_wrong_logits_dtype_is_named(logits_dtype: object) -> None:
    case = make()
    with pytest.raises(ValueError, match=r"logits_dtype must be 'float32'.* or 'same'"):
        dmfast.linear_sequence_log_prob(case.hidden, case.weight, case.tokens, logits_dtype=logits_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_chunks_are_not_rounded_before_they_are_added(dtype: torch.dtype) -> None:
    a, b = torch.randn(7, 300).to(dtype), torch.randn(300, 5).to(dtype)
    total = torch.full((7, 5), torch.nan)
    way = products.ways(a.device, dtype, torch.float32).d_head
    products.add_product(way, total, a.t(), b, first=True)
    products.add_product(way, total, a.t(), b, first=False)
    torch.testing.assert_close(total.double(), 2 * (a.double() @ b.double()), rtol=0, atol=2e-4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_weight_is_one_matrix_in_fp32_or_that_of_one_chunk(
    dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_CPU_BYTES", 16 * 29 * 4)  # the head is copied in blocks only
    monkeypatch.setattr(products, "_FEW_BYTES", 16 * 29 * 4)
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            is_new = isinstance(out, torch.Tensor) and func._schema.returns[0].alias_info is None
            if is_new and out.numel() == 41 * 29:
                made.append(out.dtype)
            return out

    terms = {name: torch.full((6,), -20.0, dtype=torch.float64) for name in ("log_target", "log_proposal")}
    for rows, frozen in ((5, False), (1000, False), (5, True)):
        h = torch.randn(6, 5, 29).to(dtype).requires_grad_()
        w = torch.randn(41, 29).to(dtype).requires_grad_(not frozen)
        tokens = torch.randint(41, (6, 5))
        with Watch():
            out = dmfast.linear_dm_loss(
                h, w, tokens, log_z=0.0, reduction=reduction, chunk_bytes=rows * 64 * 4, **terms
            )
            out.loss.sum().backward()
        rounded = [] if dtype == torch.float32 else [dtype]
        summed = [torch.float32] if rows == 5 or dtype == torch.float32 else []
        assert made == ([] if frozen else [*summed, *rounded]), (rows, frozen)
        made.clear()
