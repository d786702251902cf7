"""Define the Triton kernel that draws a token from each row of logits.

``sample_rows`` fuses scaling, softcap, softmax, the draw and its log-probability. It reads every logit once, one tile
of 1,024 logits a second time, and writes nothing per logit. Less is impossible, since each logit counts in the sum.

A program has one row. The sums of its tiles stay in registers. A uniform number picks a tile by these sums, and then a
token in the tile. Tiles start at multiples of 1,024 logits of the row, whatever its address, so that the draw and its
log-probability depend on the logits alone. Therefore accesses are wide only if every row is aligned and V is a multiple
of 8 (``WIDE``). A token of probability 0 is never drawn.
"""

import triton
import triton.language as tl

from .rows import INF, LOWEST, constants, distance, exp2_of, logistic_of, scaled

TILE = 1024
_RUN_TIME = ["vocab", "stride_row", "scale_high", "scale_low", "cap_high", "cap_low", "seed_low", "seed_high",
             "step_low", "step_high"]  # fmt: skip


@triton.jit
def _pick(weights, target, N: tl.constexpr):
    """Return the index of the first of N weights at which the running sum exceeds the target, and the target minus the
    sum before it. If rounding leaves the target at the very end, the index is that of the last weight that is not 0.
    """
    i = tl.arange(0, N)
    running = tl.cumsum(weights, axis=0)
    there = weights > 0
    picked = tl.min(tl.where(there & (running > target), i, N), axis=0)
    picked = tl.where(picked == N, tl.max(tl.where(there, i, 0), axis=0), picked)
    return picked, target - tl.sum(tl.where(i == picked - 1, running, 0.0), axis=0)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=["logits"])
def sample_rows(
    logits,  # (N,V)
    row_ids,  # (N) int64; only with IDS, else 0, 1, ...
    uniforms,  # (N) fp64; only with GIVEN, for tests
    tokens,  # (N) int64, written
    log_prob,  # (N) fp64, written; NaN for a row that is not a distribution
    vocab, stride_row, scale_high, scale_low, cap_high, cap_low, seed_low, seed_high, step_low, step_high,
    CAP: tl.constexpr, IDS: tl.constexpr, GIVEN: tl.constexpr, WIDE: tl.constexpr,
    TILES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Draw one token from a row."""
    row = tl.program_id(0)
    z = logits + row.to(tl.int64) * stride_row
    if WIDE:  # this tells the compiler that the accesses are aligned
        z = tl.multiple_of(z, 16)
        vocab = vocab // 8 * 8
    scale, cap, c = constants(scale_high, scale_low, cap_high, cap_low, CAP)
    i = tl.arange(0, SIZE)
    k = tl.arange(0, TILES)
    sums = tl.zeros([TILES], tl.float64)
    tops = tl.full([TILES], LOWEST, tl.float32)
    for tile in range(0, tl.cdiv(vocab, SIZE)):
        here = tile * SIZE + i < vocab
        x = tl.load(z + tile * SIZE + i, mask=here, other=-INF).to(tl.float32)
        top = tl.maximum(tl.max(x, axis=0), LOWEST)
        e, _ = exp2_of(distance(x, top, logistic_of(top, c, CAP), c, CAP), c[0], c[1])
        e = tl.where(here, e, 0.0)
        sums = tl.where(k == tile, tl.where(top == INF, float("nan"), tl.sum(e.to(tl.float64), axis=0)), sums)
        tops = tl.where(k == tile, top, tops)
    highest = scaled(tl.max(tops, axis=0), scale, cap, CAP)
    shrink = tl.exp(scaled(tops, scale, cap, CAP) - highest)
    weights = tl.where(sums == 0.0, 0.0, sums * shrink)  # NaN stays
    total = tl.sum(weights, axis=0)
    log_total = highest + tl.log(total)
    if tl.abs(log_total) < INF:
        if GIVEN:
            uniform = tl.load(uniforms + row)
        else:
            of = row.to(tl.int64)
            if IDS:
                of = tl.load(row_ids + row)
            seed = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
            seed |= seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
            low = step_low.to(tl.uint32, bitcast=True)
            high = step_high.to(tl.uint32, bitcast=True)
            first, second, _, _ = tl.philox(seed, of.to(tl.uint32), (of >> 32).to(tl.uint32), low, high)
            bits = (first.to(tl.int64) << 21) | (second >> 11).to(tl.int64)
            uniform = bits.to(tl.float64) * 1.1102230246251565e-16  # 2^-53
        tile, target = _pick(weights, uniform * total, TILES)
        top = tl.max(tl.where(k == tile, tops, LOWEST), axis=0)
        here = tile * SIZE + i < vocab
        x = tl.load(z + tile * SIZE + i, mask=here, other=-INF).to(tl.float32)
        e, _ = exp2_of(distance(x, top, logistic_of(top, c, CAP), c, CAP), c[0], c[1])
        e = tl.where(here, e, 0.0).to(tl.float64)
        target /= tl.exp(scaled(top, scale, cap, CAP) - highest)
        token, _ = _pick(e, target, SIZE)
        drawn = tl.max(tl.where(i == token, x, -INF), axis=0)
        tl.store(tokens + row, tile * SIZE + token)
        tl.store(log_prob + row, scaled(drawn, scale, cap, CAP) - log_total)
    else:
        tl.store(tokens + row, 0)
        tl.store(log_prob + row, tl.full([], float("nan"), tl.float64))
