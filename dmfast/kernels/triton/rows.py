"""What the Triton row kernels share: how a row is cut, the terms of its sum, fp64 values of a single logit.

A row is a head up to the first 16-byte boundary, packs of 16 bytes, and a tail. Head and tail have fewer logits than a
pack and go one by one; so the packs are wide accesses whatever V and the row's address. Without that cut Triton emits
wide accesses only where it knows that V or the row stride is a multiple of 16, which 50257 is not.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf, from which -inf can't be subtracted
# NaN is float("nan") in the kernels: at each launch Triton holds a global against what it was, and NaN is never that
INF = tl.constexpr(float("inf"))
IGNORE = tl.constexpr(-100)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again, it rounds to an integer


# --- a row, cut ---------------------------------------------------------------------------------------------------


@triton.jit
def row_offset(row, steps, stride_sequence, stride_row):
    """Where a row starts, in logits. Packed batches have one sequence of all rows here."""
    row = row.to(tl.int64)
    return row // steps * stride_sequence + row % steps * stride_row


@triton.jit
def head_of(z, vocab, W: tl.constexpr):
    """Logits before the first 16-byte boundary of the row at z, W of which fill 16 bytes."""
    at = z.to(tl.int64) // (16 // W)
    return tl.minimum((W - at % W) % W, vocab).to(tl.int32)


@triton.jit
def aligned(z, head):
    """The address after the head, which the compiler is told is a multiple of 16."""
    return tl.multiple_of(z + head, 16)


@triton.jit
def packs_of(z, vocab, W: tl.constexpr, PACKS: tl.constexpr, THREADS: tl.constexpr):
    """The head's length; the number of packs behind it, the address of the first, the lanes that take one each
    (PACKS, THREADS), and where their logits lie (PACKS, THREADS, W). PACKS of them are one thread's."""
    head = head_of(z, vocab, W)
    lane = tl.arange(0, PACKS)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    return head, (vocab - head) // W, aligned(z, head), lane, lane[:, :, None] * W + tl.arange(0, W)[None, None, :]


@triton.jit
def ends_of(vocab, head, W: tl.constexpr):
    """The indices (2W) of head and tail, and which of them there are."""
    i = tl.arange(0, 2 * W)
    tail = head + (vocab - head) // W * W
    index = tl.where(i < W, i, tail + i - W)
    return index, tl.where(i < W, i < head, index < vocab)


@triton.jit
def zero_row(dz, vocab, W: tl.constexpr, PACKS: tl.constexpr, THREADS: tl.constexpr):
    """Writes zeros over the row at dz."""
    head, packs, body, lane, offsets = packs_of(dz, vocab, W, PACKS, THREADS)
    nothing = tl.zeros([PACKS, THREADS, W], dz.dtype.element_ty)
    for first in range(0, packs, PACKS * THREADS):
        tl.store(body + first * W + offsets, nothing, mask=(first + lane < packs)[:, :, None])
    index, there = ends_of(vocab, head, W)
    tl.store(dz + index, tl.zeros([2 * W], dz.dtype.element_ty), mask=there)


# --- fp32 terms of a softmax --------------------------------------------------------------------------------------


@triton.jit
def split(x):
    """An fp64 constant as two fp32, whose rounding would else tilt every term of a row the same way."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def exp2_of(x, high, low):
    """2^(x (high + low)) to 2 ulps, and the exponent. The integer part of the exponent is taken out before it is
    rounded: exp2 of an fp32 product alone is off by its rounding. Below 2^-126: 0."""
    shifted = tl.fma(x, high, _MAGIC)
    whole = shifted - _MAGIC
    part = tl.fma(x, high, -whole) + x * low
    power = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    # NaN stays
    return tl.where(whole <= -127.0, 0.0, tl.exp2(part) * power), whole + part


@triton.jit
def constants(scale_high, scale_low, cap_high, cap_low, CAP: tl.constexpr):
    """scale and cap in fp64; the factor of ``distance`` to an exponent of 2, and 2 / cap, in nats and in bits, each
    split; beyond ``bound`` tanh is +-1."""
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
    """z within the softcap's range; NaN stays."""
    if CAP:
        z = tl.where(z < -c[6], -c[6], tl.where(z > c[6], c[6], z))
    return z


@triton.jit
def logistic_of(reference, c, CAP: tl.constexpr):
    """What ``distance`` needs of a reference besides itself."""
    if CAP:
        e, _ = exp2_of(-clamp(reference, c, CAP), c[4], c[5])
        return 1.0 / (1.0 + e)
    else:
        return reference


@triton.jit
def distance(z, reference, logistic, c, CAP: tl.constexpr):
    """Times (c[0] + c[1]) this is the exponent of 2 of the term of z against that of reference.

    Without softcap z - reference. With one cap(z) - cap(r) = 2 cap s(2r/cap) expm1(2 (z - r)/cap) / (e^(2z/cap) + 1), s
    the logistic function: right to a few ulps of the difference itself, where a difference of two tanh is off by an ulp
    of cap.
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
    """cap'(z) = 1 - tanh^2; of the logit as it is, so that -inf gives 0."""
    u, _ = exp2_of(tl.minimum(z, c[6]), c[4], c[5])
    r = 1.0 / (u + 1.0)
    return 4.0 * r * (u * r)


# --- fp64 values of a single logit --------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Absolutely, not relatively right near 0, which is what a logit needs."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def scaled(z, scale, cap, CAP: tl.constexpr):
    """scale * cap(z) of fp32 z."""
    z = z.to(tl.float64)
    if CAP:
        z = cap * tanh(z / cap)
    return scale * z


@triton.jit
def label_gradient(z, lse, coefficient, scale, cap, CAP: tl.constexpr):
    """-coefficient * scale * cap'(z) * (1 - p) in one subtraction: no cancellation where p is near 1."""
    x = scaled(z, scale, cap, CAP) - lse
    u = tl.exp(x)
    # expm1 (Kahan): the rounding of u cancels against that of its logarithm
    log_u = tl.log(u)
    minus = tl.where(u == 1.0, x, tl.where(u == 0.0, -1.0, (u - 1.0) * x / tl.where(log_u == 0.0, 1.0, log_u)))
    g = coefficient * scale * minus
    if CAP:
        t = tanh(z.to(tl.float64) / cap)
        g *= 1.0 - t * t
    return g


@triton.jit
def label_bonus(z, lse, bonus, entropy, scale, cap, CAP: tl.constexpr):
    """bonus * scale * cap'(z) * p * (log p + entropy); 0 where p is."""
    log_p = scaled(z, scale, cap, CAP) - lse
    g = bonus * scale * tl.where(log_p > -INF, tl.exp(log_p) * (log_p + entropy), 0.0)
    if CAP:
        t = tanh(z.to(tl.float64) / cap)
        g *= 1.0 - t * t
    return g
