"""Test sample_tokens against fp64.

Draws are exact (chi-square over 10^6 of them, and the tails by injected uniforms). The draw is the same whatever the
threads or the batch, and so is the log-probability of what was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dmfast
from dmfast import eager
from dmfast.functional import sample_tokens
from dmfast.kernels import checks, extension, select
from dmfast.kernels import eager as oracle

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
# (temperature, softcap)
SCALINGS = [(1.0, None), (0.5, None), (1.7, None), (1.0, 30.0), (0.7, 5.0)]
scalings = pytest.mark.parametrize(("temperature", "softcap"), SCALINGS)
LAST = 1 - 2.0**-53


def log_softmax(z: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    z = z.double()
    return ((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature).log_softmax(-1)


def draw(z: Tensor, uniform: Tensor, temperature: float = 1.0, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the kernel's draw with the uniforms given."""
    return select(z).sample(checks.make_sample_rows(z, 0, None, 0, temperature, softcap), uniform)[:2]


def chi_square(counts: Tensor, p: Tensor) -> None:
    """Assert that the counts fit p, with all tokens together that are expected fewer than 10 times."""
    expected = p * counts.sum()
    rare = expected < 10
    observed = torch.cat([counts[~rare].double(), counts[rare].sum().double()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    assert observed[~keep].sum() == 0
    observed, expected = observed[keep], expected[keep]
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * max(freedom, 1)) + 5, (statistic, freedom)


# --- the generator ----------------------------------------------------------------------------------------------

# the authors of Philox publish these vectors: counter, key, result
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox(counter: list[int], key: list[int], result: list[int]) -> None:
    assert extension._C.philox(counter, key) == result
    assert [int(x) for x in oracle.philox([torch.tensor([c]) for c in counter], (key[0], key[1]))] == result


def test_uniforms_are_53_bits_of_it() -> None:
    """Where token k has the probability 2^-13 each, the token is the first 13 bits; the rest is held by the twin."""
    ids = torch.tensor([0, 1, 2**32 + 5, 2**40 + 2**31, -1])
    for seed, step in ((0, 0), (2**64 - 1, 3), (-1, 3), (2**63 + 12345, 2**40 + 1)):
        counter = [[int(i) & 0xFFFFFFFF, int(i) >> 32 & 0xFFFFFFFF, step & 0xFFFFFFFF, step >> 32] for i in ids]
        words = [extension._C.philox(c, [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]) for c in counter]
        expected = [((a << 32 | b) >> 11) / 2**53 for a, b, *_ in words]
        assert oracle.uniforms(seed % 2**64, ids, step).tolist() == expected
        for sample in (sample_tokens, eager.sample_tokens):
            tokens, _ = sample(torch.zeros(5, 2**13), seed=seed, row_ids=ids, step=step)
            assert tokens.tolist() == [int(u * 2**13) for u in expected]


# --- the distribution -------------------------------------------------------------------------------------------


def peaked(v: int) -> Tensor:
    z = 2 * torch.randn(v)
    z[torch.rand(v) < 0.1] = -INF
    z[v // 3] = 6.0
    return z


@pytest.mark.parametrize(
    ("v", "temperature", "softcap", "dtype"),
    [
        (2, 1.0, None, torch.float32), (11, 0.7, None, torch.bfloat16), (11, 0.7, None, torch.float16),
        (150, 1.3, 9.0, torch.float32),
    ],
    ids=["2-fp32", "11-bf16", "11-fp16", "150-fp32"],
)  # fmt: skip
def test_a_million_draws_small_vocabulary(
    v: int, temperature: float, softcap: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(v)
    z = peaked(v).to(dtype)
    counts = torch.zeros(v, dtype=torch.int64)
    # both the row ids and the steps vary
    for step in range(4):
        tokens, _ = sample_tokens(z.expand(250_000, v), seed=1, step=step, temperature=temperature, softcap=softcap)
        counts += torch.bincount(tokens, minlength=v)
    chi_square(counts, log_softmax(z, temperature, softcap).exp())


def test_a_million_draws_large_vocabulary() -> None:
    torch.manual_seed(0)
    v = 50257
    z = peaked(v)
    z[512:1024] = -INF
    tokens, _ = draw(z.expand(20_000, v), torch.rand(20_000, dtype=torch.float64))
    p = log_softmax(z).exp()
    assert bool((p[tokens] > 0).all())
    # a million rows of 50,257 logits would take minutes, so sample_row draws from one row in the kernel's way
    tokens = torch.cat([sample_row(z, u) for u in oracle.uniforms(7, torch.arange(1_000_000), 0).split(50_000)])
    chi_square(torch.bincount(tokens, minlength=v), p)
    some = oracle.uniforms(7, torch.arange(2000), 0)
    assert torch.equal(tokens[:2000], draw(z.expand(2000, v), some)[0])


def sample_row(z: Tensor, uniform: Tensor) -> Tensor:
    cdf = log_softmax(z).exp().cumsum(0)
    return torch.searchsorted(cdf, uniform * cdf[-1], right=True)


@dtypes
@scalings
@pytest.mark.parametrize("v", [1, 2, 31, 512, 513, 1300, 5000])
def test_every_token_by_its_own_interval(v: int, temperature: float, softcap: float | None, dtype: torch.dtype) -> None:
    """The middle of a token's interval of the CDF draws that token, and just inside either end does too."""
    torch.manual_seed(v)
    z = (3 * torch.randn(v)).to(dtype)
    z[torch.rand(v) < 0.2] = -INF if softcap is None else -20.0
    z[v // 2] = 1.0
    log_p = log_softmax(z, temperature, softcap)
    p = log_p.exp()
    end = p.cumsum(0)
    likely = (p > 1e-6).nonzero()[:, 0]
    for place in (0.02, 0.5, 0.98):
        uniform = end[likely] - p[likely] * (1 - place)
        # fp32 terms shift boundaries by up to 1e-7 of what lies before them
        sure = (p[likely] * min(place, 1 - place) > 3e-7).logical_and(uniform < 1)
        tokens, log_prob = draw(z.expand(len(likely), v), uniform, temperature, softcap)
        assert torch.equal(tokens[sure], likely[sure])
        assert (log_prob - log_p[tokens]).abs().max() < 1e-6


@dtypes
def test_a_row_of_many_blocks(dtype: torch.dtype) -> None:
    """There are more blocks than a warp has lanes. A stretch of them has no possible token."""
    torch.manual_seed(0)
    v = 20_011
    z = torch.randn(v).to(dtype)
    z[600:9000] = z[-700:] = -INF
    log_p = log_softmax(z)
    p = log_p.exp()
    aimed = torch.tensor([0, 1, 511, 512, 599, 9000, 9215, 9216, 15_000, 16_383, 16_384, v - 701])
    uniform = p.cumsum(0)[aimed] - p[aimed] / 2
    ends = torch.tensor([0.0, LAST], dtype=torch.float64)
    tokens, log_prob = draw(z.expand(len(aimed) + 2, v), torch.cat([uniform, ends]))
    assert tokens.tolist() == [*aimed.tolist(), 0, v - 701]
    assert (log_prob - log_p[tokens]).abs().max() < 1e-6


def blocks(*parts: float | None) -> Tensor:
    """Return a row of blocks of 512 logits: -inf for None, else noise around a value."""
    return torch.cat([torch.full((512,), -INF) if x is None else x + torch.randn(512) for x in parts])


TAILS: dict[str, Callable[[], Tensor]] = {
    "-inf blocks at both ends": lambda: blocks(None, 0.0, None),
    "-inf block in the middle": lambda: blocks(0.0, None, 0.0),
    "-inf at both ends of a block": lambda: torch.cat([torch.full((3,), -INF), blocks(0.0), torch.full((3,), -INF)]),
    "one finite": lambda: torch.full((1500,), -INF).index_fill_(0, torch.tensor([700]), -3.0),
    "rising blocks": lambda: blocks(-80.0, -40.0, 0.0, 40.0),
    "falling blocks": lambda: blocks(80.0, 40.0, 0.0, -40.0),
    "underflowing ends": lambda: torch.cat([torch.full((600,), -9000.0), blocks(0.0), torch.full((600,), -9000.0)]),
    "single": lambda: torch.zeros(1),
}


@dtypes
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("name", TAILS)
def test_the_tails_draw_no_impossible_token(name: str, temperature: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = TAILS[name]().to(dtype)
    log_p = log_softmax(z, temperature)
    uniform = torch.tensor([0.0, 2.0**-53, 0.3, 0.5, 1 - 2.0**-30, LAST], dtype=torch.float64)
    for sample in (draw, lambda z, u, t: oracle.draw(checks.make_sample_rows(z, 0, None, 0, t, None), u)):
        tokens, log_prob = sample(z.expand(len(uniform), -1), uniform, temperature)
        assert bool((log_p[tokens] > -700).all()), tokens
        assert (log_prob - log_p[tokens]).abs().max() < 1e-6
        possible = (log_p > -700).nonzero()[:, 0]
        # the last tokens of falling blocks are possible, but less probable than the smallest step of a uniform number
        if name != "falling blocks":
            assert tokens[-1] >= possible[-1] - 512
        if "rising" not in name:
            assert tokens[0] == possible[0]


# --- what must make no difference -------------------------------------------------------------------------------


@dtypes
@scalings
def test_the_twin_draws_the_same(temperature: float, softcap: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = (3 * torch.randn(1500, 700)).to(dtype)
    z[:, 100] = -INF if softcap is None else 0.0
    options = {"seed": 5, "step": 9, "temperature": temperature, "softcap": softcap}
    tokens, log_prob = sample_tokens(z, **options)
    twin, twin_log_prob = eager.sample_tokens(z, **options)
    wide = eager.sample_tokens(z.double(), **options)
    assert torch.equal(twin, wide[0]) and torch.equal(twin_log_prob, wide[1])
    assert tokens.dtype == torch.int64 and log_prob.dtype == torch.float64 and tokens.shape == log_prob.shape == (1500,)
    # boundaries are known to 1e-7, and there are 700 of them
    assert int((tokens != twin).sum()) <= 2
    same = tokens == twin
    assert (log_prob - twin_log_prob)[same].abs().max() < 1e-6
    scored = dmfast.sequence_log_prob(z[:, None], tokens[:, None], temperature=temperature, softcap=softcap)
    # on CUDA the sampler and the scorer add up different groups of fp32 terms
    assert (log_prob - scored).abs().max() < (1e-6 if select(z).name == "cuda" else 1e-9)


@pytest.mark.parametrize("sample", [sample_tokens, eager.sample_tokens], ids=["cpu", "eager"])
def test_threads_and_batches_make_no_difference(sample: Callable[..., tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    z = 3 * torch.randn(50, 2000)
    whole = sample(z, seed=3, step=4)
    ids = torch.arange(50)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again = sample(z, seed=3, step=4)
            assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
    finally:
        torch.set_num_threads(before)
    order = torch.randperm(50)
    parts = [sample(z[i], seed=3, step=4, row_ids=ids[i].to(torch.int32)) for i in order.split(7)]
    assert torch.equal(torch.cat([tokens for tokens, _ in parts]), whole[0][order])
    assert torch.equal(torch.cat([log_prob for _, log_prob in parts]), whole[1][order])
    for other in ({"seed": 2, "step": 4}, {"seed": 3, "step": 5}, {"seed": 3, "step": 4, "row_ids": ids + 50}):
        assert int((sample(z, **other)[0] == whole[0]).sum()) < 25


@dtypes
def test_strides(dtype: torch.dtype) -> None:
    """Rows may be far apart, one row for all, or of any alignment. NaN between rows is not read."""
    torch.manual_seed(0)
    base = torch.full((9, 4, 700), math.nan, dtype=dtype)
    z = (3 * torch.randn(9, 700)).to(dtype)
    base[:, -1, 2:-1] = z[:, 2:-1]
    view = base[:, -1, 2:-1]
    assert not view.is_contiguous()
    for a, b in ((view, view.contiguous()), (z[3].expand(9, 700), z[3].repeat(9, 1)), (z[::2], z[::2].clone())):
        left, right = sample_tokens(a, seed=1), sample_tokens(b, seed=1)
        assert torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])
    unaligned = torch.randn(7001, dtype=torch.float32)[1:].view(10, 700)
    assert torch.equal(sample_tokens(unaligned, seed=1)[0], sample_tokens(unaligned.clone(), seed=1)[0])


@dtypes
def test_a_row_at_any_address(dtype: torch.dtype) -> None:
    """The draw and its log-probability are functions of the logits alone, to the last bit."""
    torch.manual_seed(0)
    z = (3 * torch.randn(3, 2600)).to(dtype)
    tokens, log_prob = sample_tokens(z, seed=1)
    for offset in range(1, 8):
        base = torch.full((offset + z.numel() + 8,), math.nan, dtype=dtype)
        moved = base[offset : offset + z.numel()].view_as(z).copy_(z)
        again = sample_tokens(moved, seed=1)
        assert torch.equal(again[0], tokens) and torch.equal(again[1], log_prob)


def test_nothing_to_draw_no_gradient_and_the_logits_as_they_were() -> None:
    tokens, log_prob = sample_tokens(torch.zeros(0, 5), seed=1)
    assert tokens.shape == log_prob.shape == (0,) and tokens.dtype == torch.int64 and log_prob.dtype == torch.float64
    z = torch.randn(3, 40, requires_grad=True)
    before = z.detach().clone()
    tokens, log_prob = sample_tokens(z, seed=1)
    assert not log_prob.requires_grad and torch.equal(z.detach(), before)
    wide = sample_tokens(z.double(), seed=1)
    assert torch.equal(wide[0], tokens) and (wide[1] - log_prob).abs().max() < 1e-6


def test_under_compile() -> None:
    z = torch.randn(6, 100)
    ids = torch.arange(6) + 3

    @torch.compile(fullgraph=True)
    def compiled(z: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        tokens, log_prob = sample_tokens(2 * z, seed=seed, row_ids=ids, step=2, temperature=0.8)
        return tokens + 0, log_prob + 0

    for seed in (5, -5):
        plain = sample_tokens(2 * z, seed=seed, row_ids=ids, step=2, temperature=0.8)
        assert all(map(torch.equal, compiled(z, ids, seed), plain))
    torch.library.opcheck(torch.ops.dmfast.sample_v3, (z, 5, ids, 2, 1.25, 0.0, select(z).name))
    torch.library.opcheck(torch.ops.dmfast.sample_v3, (z, 5, None, 2, 1.25, 30.0, select(z).name))


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [sample_tokens, eager.sample_tokens], ids=["cpu", "eager"])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, INF])
@pytest.mark.parametrize("column", [0, 511, 512, 1299])
def test_a_bad_row_is_named(sample: Callable[..., object], bad: float, column: int) -> None:
    z = torch.randn(6, 1300)
    z[4:, column] = bad
    with pytest.raises(ValueError, match=r"NaN or \+inf.* in row 4:"):
        sample(z, seed=0)
    with pytest.raises(ValueError, match=r"in row 4 \(row id 104\)"):
        sample(z, seed=0, row_ids=torch.arange(6) + 100)
    z[4:] = 0.0
    z[2] = -INF
    with pytest.raises(ValueError, match=r"nothing but -inf, in row 2:"):
        sample(z, seed=0)
    z[2] = -math.nan
    with pytest.raises(ValueError, match=r"in row 2:"):
        sample(z, seed=0)


WRONG = [
    ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits must be \(N, V\)"),
    ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits must be float32"),
    ({"logits": torch.zeros(2, 0)}, ValueError, "empty vocabulary"),
    ({"logits": torch.zeros(4, 2).t()}, ValueError, "must be contiguous"),
    ({"seed": 2**64}, ValueError, r"seed must be an integer in .*got 18446744073709551616"),
    ({"seed": 1.0}, ValueError, "seed must be an integer"),
    ({"seed": True}, ValueError, "seed must be an integer"),
    ({"step": -1}, ValueError, "step must be an integer"),
    ({"temperature": 0.0}, ValueError, "temperature must be a positive number"),
    ({"softcap": -1.0}, ValueError, "softcap must be a positive number"),
    ({"row_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"row_ids must be an integer tensor \(2,\)"),
    ({"row_ids": torch.zeros(2)}, ValueError, r"row_ids must be an integer tensor \(2,\)"),
    ({"row_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "row_ids is on meta"),
]


@pytest.mark.parametrize("sample", [sample_tokens, eager.sample_tokens], ids=["cpu", "eager"])
@pytest.mark.parametrize(("changes", "error", "match"), WRONG)
def test_wrong_arguments(
    sample: Callable[..., object], changes: dict[str, object], error: type[Exception], match: str
) -> None:
    arguments = {"logits": torch.zeros(2, 4), "seed": 0, **changes}
    with pytest.raises(error, match=match):
        sample(arguments.pop("logits"), **arguments)
