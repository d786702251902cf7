"""Define what the Triton row kernels share: the cut of a row, the terms of its sum, and fp64 values of a single logit.

A row consists of a head up to the first 16-byte boundary, packs of 16 bytes, and a tail. Head and tail have fewer
logits than a pack and are read one by one, so that the packs are wide accesses for any V and any address. Without this
cut Triton emits wide accesses only if it knows that V or the row stride is a multiple of 16, which 50257 is not.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf, from which -inf can't be subtracted
# The kernels write float("nan") for NaN. Triton compares each global with its old value at every launch, and NaN would
# never be equal.
INF = tl.constexpr(float("inf"))
IGNORE = tl.constexpr(-100)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again, it rounds to an integer


# --- a row, cut ---------------------------------------------------------------------------------------------------


@triton.jit
def row_offset(row, steps, stride_sequence, stride_row):
    """Return the start of a row, in logits. A packed batch counts as one sequence here."""
    row = row.to(tl.int64)
    return row // steps * stride_sequence + row % steps * stride_row


@triton.jit
def head_of(z, vocab, W: tl.constexpr):
    """Return the number of logits before the first 16-byte boundary of the row at z. W logits fill 16 bytes."""
    at = z.to(tl.int64) // (16 // W)
    return tl.minimum((W - at % W) % W, vocab).to(tl.int32)


@triton.jit
def aligned(z, head):
    """Return the address after the head, and tell the compiler that it is a multiple of 16."""
    return tl.multiple_of(z + head, 16)


@triton.jit
def packs_of(z, vocab, W: tl.constexpr, PACKS: tl.constexpr, THREADS: tl.constexpr):
    """Return the head's length, the number of packs after it, the address of the first pack, the lanes that take one
    pack each (PACKS, THREADS), and the offsets of their logits (PACKS, THREADS, W). A thread has PACKS lanes.
    """
    head = head_of(z, vocab, W)
    lane = tl.arange(0, PACKS)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    return head, (vocab - head) // W, aligned(z, head), lane, lane[:, :, None] * W + tl.arange(0, W)[None, None, :]


@triton.jit
def ends_of(vocab, head, W: tl.constexpr):
    """Return the indices (2W) of head and tail, and which of them there are."""
    i = tl.arange(0, 2 * W)
    tail = head + (vocab - head) // W * W
    index = tl.where(i < W, i, tail + i - W)
    return index, tl.where(i < W, i < head, index < vocab)


@triton.jit
def zero_row(dz, vocab, W: tl.constexpr, PACKS: tl.constexpr, THREADS: tl.constexpr):
    """Write zeros over the row at dz."""
    head, packs, body, lane, offsets = packs_of(dz, vocab, W, PACKS, THREADS)
    nothing = tl.zeros([PACKS, THREADS, W], dz.dtype.element_ty)
    for first in range(0, packs, PACKS * THREADS):
        tl.store(body + first * W + offsets, nothing, mask=(first + lane < packs)[:, :, None])
    index, there = ends_of(vocab, head, W)
    tl.store(dz + index, tl.zeros([2 * W], dz.dtype.element_ty), mask=there)


# --- fp32 terms of a softmax --------------------------------------------------------------------------------------


@triton.jit
def split(x):
    """Return an fp64 constant as two fp32 numbers. The rounding of a single one would bias all terms of a row alike."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def exp2_of(x, high, low):
    """Return 2^(x (high + low)) to 2 ulps, and the exponent. A power below 2^-126 is 0.

    The integer part of the exponent is taken out before the exponent is rounded, because exp2 of an fp32 product would
    be off by the rounding of the product.
    """
    shifted = tl.fma(x, high, _MAGIC)
    whole = shifted - _MAGIC
    part = tl.fma(x, high, -whole) + x * low
    power = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    # NaN fails the comparison, and stays NaN
    return tl.where(whole <= -127.0, 0.0, tl.exp2(part) * power), whole + part


@triton.jit
def constants(scale_high, scale_low, cap_high, cap_low, CAP: tl.constexpr):
    """Return scale and cap in fp64, and a tuple of fp32 constants.

    The tuple has the factor that turns a ``distance`` into an exponent of 2, then 2 / cap in nats and in bits, each
    split in two. Its last entry is the logit beyond which tanh is +-1.
    """
    scale = tl.full([], scale_high, tl.float64) + tl.full([], scale_low, tl.float64)
    cap = tl.full([], cap_high, tl.float64) + tl.full([], cap_low, tl.float64)
    factor = scale * LOG2_E
    inverse = scale
    if CAP:
        factor *= 2.0 * cap
        inverse = 2.0 / cap
    high, low = split(factor)
    nats_high, nats_low = split(inverse)
    bits_high, bits_low = split(inverse * LOG2_E)
    return scale, cap, (high, low, nats_high, nats_low, bits_high, bits_low, (30.0 * cap).to(tl.float32))


@triton.jit
def clamp(z, c, CAP: tl.constexpr):
    """Return z clamped to the range in which the softcap is not constant. NaN stays NaN."""
    if CAP:
        z = tl.where(z < -c[6], -c[6], tl.where(z > c[6], c[6], z))
    return z


@triton.jit
def logistic_of(reference, c, CAP: tl.constexpr):
    """Return what ``distance`` needs of a reference besides the reference itself."""
    if CAP:
        e, _ = exp2_of(-clamp(reference, c, CAP), c[4], c[5])
        return 1.0 / (1.0 + e)
    else:
        return reference


@triton.jit
def distance(z, reference, logistic, c, CAP: tl.constexpr):
    """Return the distance of z from the reference, whose product with c[0] + c[1] is an exponent of 2.

    2 to this exponent is the term of z relative to the term of the reference. Without a softcap the distance is
    z - reference. With one it follows from cap(z) - cap(r) = 2 cap s(2r/cap) expm1(2 (z - r)/cap) / (e^(2z/cap) + 1),
    where s is the logistic function. This is right to a few ulps of the difference itself, while a difference of two
    tanh is off by an ulp of cap.
    """
    if CAP:
        z = clamp(z, c, CAP)
        d = z - clamp(reference, c, CAP)
        y = d * c[2] + d * c[3]
        near = y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7))))))
        far, _ = exp2_of(d, c[4], c[5])
        grown = tl.where(tl.abs(y) < 0.35, near, far - 1)
        full, _ = exp2_of(z, c[4], c[5])
        return grown / (full + 1) * logistic
    else:
        return z - reference


@triton.jit
def slope(z, c):
    """Return cap'(z) = 1 - tanh^2. The logit is not clamped from below, so that -inf gives 0."""
    u, _ = exp2_of(tl.minimum(z, c[6]), c[4], c[5])
    r = 1.0 / (u + 1.0)
    return 4.0 * r * (u * r)


# --- fp64 values of a single logit --------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Return tanh(x), whose error near 0 is small absolutely and not relatively. A logit needs no more."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def scaled(z, scale, cap, CAP: tl.constexpr):
    """Return scale * cap(z) in fp64."""
    z = z.to(tl.float64)
    if CAP:
        z = cap * tanh(z / cap)
    return scale * z


@triton.jit
def label_gradient(z, lse, coefficient, scale, cap, CAP: tl.constexpr):
    """Return -coefficient * scale * cap'(z) * (1 - p), formed without cancellation where p is near 1."""
    x = scaled(z, scale, cap, CAP) - lse
    u = tl.exp(x)
    # This is Kahan's expm1, in which the rounding of u cancels against that of its logarithm.
    log_u = tl.log(u)
    minus = tl.where(u == 1.0, x, tl.where(u == 0.0, -1.0, (u - 1.0) * x / tl.where(log_u == 0.0, 1.0, log_u)))
    g = coefficient * scale * minus
    if CAP:
        t = tanh(z.to(tl.float64) / cap)
        g *= 1.0 - t * t
    return g


@triton.jit
def label_bonus(z, lse, bonus, entropy, scale, cap, CAP: tl.constexpr):
    """Return bonus * scale * cap'(z) * p * (log p + entropy), which is 0 where p is 0."""
    log_p = scaled(z, scale, cap, CAP) - lse
    g = bonus * scale * tl.where(log_p > -INF, tl.exp(log_p) * (log_p + entropy), 0.0)
    if CAP:
        t = tanh(z.to(tl.float64) / cap)
        g *= 1.0 - t * t
    return g
