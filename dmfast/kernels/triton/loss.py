"""Define the Triton row kernels of the losses. A program has one row; a program of ``sum_rows`` has one sequence.

``score_rows`` fuses scaling, softcap, log-sum-exp, the gather of the label and the entropy. It reads every logit of a
scored row once and writes nothing per logit. Less is impossible, since each logit counts in the sum. With ``WRITE``,
for weights that are known beforehand, it reads the row a second time, from the cache if the row is still there, and
writes its gradient. This takes 2 reads and 1 write per logit.

``write_rows`` forms the gradient from log-sum-exps with 1 read and 1 write per logit. This is the least possible if A
depends on all rows of a sequence. ``scale_rows`` has the same traffic, or none if the factor is 1. ``sum_rows`` reads
no logits; it adds up the values of rows to those of sequences in a fixed order.

torch forms A of a sequence between these kernels.
"""

import triton
import triton.language as tl

from .rows import (
    IGNORE,
    INF,
    LN_2,
    LOWEST,
    aligned,
    constants,
    distance,
    ends_of,
    exp2_of,
    label_bonus,
    label_gradient,
    logistic_of,
    packs_of,
    row_offset,
    scaled,
    slope,
    zero_row,
)  # fmt: skip

_NUMBERS = ["vocab", "vocab_start", "n_tokens", "steps", "stride_sequence", "stride_row", "dz_stride_sequence",
            "dz_stride_row", "scale_high", "scale_low", "cap_high", "cap_low", "n_rows"]  # fmt: skip
NOT_SPECIALIZED = {"do_not_specialize": _NUMBERS, "do_not_specialize_on_alignment": ["logits", "dz"]}
NONE = tl.constexpr(2**62)  # no fault; else row * 8 + fault, as csrc/batch.h numbers them


def _jit(kernel):
    """Compile a kernel whose numbers and addresses are run-time values, so that no shape compiles again."""
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(kernel, **{k: [name for name in v if name in names] for k, v in NOT_SPECIALIZED.items()})


@triton.jit
def _gradient(x, factor, linear, after, reference, logistic, c, CAP: tl.constexpr, BONUS: tl.constexpr):
    """Return dz of logits x apart from the label's, in fp32. With a bonus the factor of p is linear in log p."""
    g, exponent = exp2_of(distance(x, reference, logistic, c, CAP), c[0], c[1])
    if BONUS:
        g = tl.where(g > 0, g * (factor + linear * exponent), 0.0)  # 0 * -inf = 0
    else:
        g *= factor
    if CAP:
        g *= slope(x, c)
    return g * after


@triton.jit
def _write_row(
    z, dz, vocab, label, at_label, lse, coefficient, bonus, entropy, scale, cap, c,
    CAP: tl.constexpr, BONUS: tl.constexpr, WIDE: tl.constexpr, W: tl.constexpr, PACKS: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Write dz = scale * cap'(z) * (coefficient * (p - onehot) + bonus * p * (log p + entropy)), p being the softmax.

    Without BONUS only the first part is there. A label outside [0, vocab) has no one-hot here. W elements of dz fill 16
    bytes; W logits fill several times 16 bytes if they are wider.
    """
    reference64 = lse / scale  # a logit whose term is near 1
    if CAP:
        t = tl.minimum(tl.maximum(reference64 / cap, -0.999), 0.999)
        reference64 = cap * 0.5 * tl.log((1.0 + t) / (1.0 - t))
    reference = reference64.to(tl.float32)
    logistic = logistic_of(reference, c, CAP)
    # exp(off) corrects the rounding of the reference; two factors keep the digits of a product at the edges of fp32
    off = scaled(reference, scale, cap, CAP) - lse
    full = coefficient * scale * tl.exp(off)
    size = tl.abs(full)
    linear = tl.full([], 0.0, tl.float32)
    if BONUS:
        of_log_p = bonus * scale * tl.exp(off)
        full += of_log_p * (off + entropy)
        size = tl.maximum(tl.abs(full), tl.abs(of_log_p))
    after = tl.where(size > 1.2676506002282294e30, 1.8446744073709552e19,
                     tl.where(size < 8.673617379884035e-19, 5.421010862427522e-20, 1.0))  # fmt: skip
    factor = (full / after).to(tl.float32)
    for_label = label_gradient(at_label, lse, coefficient, scale, cap, CAP)
    if BONUS:
        linear = (of_log_p * LN_2 / after).to(tl.float32)  # exponents are powers of 2
        for_label += label_bonus(at_label, lse, bonus, entropy, scale, cap, CAP)
    for_label = for_label.to(tl.float32)
    after = after.to(tl.float32)

    out = dz.dtype.element_ty
    head, packs, to, lane, offsets = packs_of(dz, vocab, W, PACKS, THREADS)
    body = z + head
    if WIDE:
        body = aligned(z, head)
    for first in range(0, packs, PACKS * THREADS):
        here = (first + lane < packs)[:, :, None]
        x = tl.load(body + first * W + offsets, mask=here, other=0.0).to(tl.float32)
        g = _gradient(x, factor, linear, after, reference, logistic, c, CAP, BONUS)
        g = tl.where(head + first * W + offsets == label, for_label, g)
        tl.store(to + first * W + offsets, g.to(out), mask=here)
    index, there = ends_of(vocab, head, W)
    x = tl.load(z + index, mask=there, other=0.0).to(tl.float32)
    g = _gradient(x, factor, linear, after, reference, logistic, c, CAP, BONUS)
    g = tl.where(index == label, for_label, g)
    tl.store(dz + index, g.to(out), mask=there)


@_jit
def score_rows(
    logits,  # (B,T,V) or (N,V)
    labels,  # (rows) int64
    lse_of, label_of, entropy_of,  # (rows) fp64, written; entropy_of only with ENTROPY
    sequence_of,  # (rows) int64 and
    weights,  # (B) fp64, A times what the gradient is multiplied by: only with WRITE
    bonuses,  # (B) fp64, the factor of the gradient of the entropy: only with WRITE and BONUS
    dz,  # only with WRITE
    vocab, vocab_start, n_tokens, steps, stride_sequence, stride_row, dz_stride_sequence, dz_stride_row,
    scale_high, scale_low, cap_high, cap_low,
    CAP: tl.constexpr, ENTROPY: tl.constexpr, WRITE: tl.constexpr, BONUS: tl.constexpr, WIDE: tl.constexpr,
    W: tl.constexpr, PACKS: tl.constexpr, THREADS: tl.constexpr, DZ_W: tl.constexpr, DZ_PACKS: tl.constexpr,
):  # fmt: skip
    """Compute log-sum-exp, the label's logit and the entropy of a row.

    The logit is 0 if another shard has the label. The log-sum-exp is NaN if the label is not a token.
    """
    row = tl.program_id(0)
    label = tl.load(labels + row)
    token = (label >= 0) & (label < n_tokens)
    column = label - vocab_start
    is_here = (column >= 0) & (column < vocab)
    if not token:
        tl.store(lse_of + row, tl.where(label == IGNORE, 0.0, float("nan")).to(tl.float64))
        tl.store(label_of + row, tl.full([], 0.0, tl.float64))
        if ENTROPY:
            tl.store(entropy_of + row, tl.full([], 0.0, tl.float64))
        if WRITE:
            zero_row(dz + row_offset(row, steps, dz_stride_sequence, dz_stride_row), vocab, DZ_W, DZ_PACKS, THREADS)
    else:
        z = logits + row_offset(row, steps, stride_sequence, stride_row)
        at_label = tl.load(z + column, mask=is_here, other=0.0).to(tl.float32)
        scale, cap, c = constants(scale_high, scale_low, cap_high, cap_low, CAP)
        head, packs, body, lane, offsets = packs_of(z, vocab, W, PACKS, THREADS)

        # Each thread sums its terms relative to the largest logit that it has seen. It takes the maximum of all its
        # packs first, so that they are loaded before the first term is formed. Packs are added up in fp64. Terms that
        # are 1, such as the largest, are counted apart. Next to them an fp32 sum would lose small terms, always in the
        # same direction, and with them the digits of 1 - p where p is near 1.
        reference = tl.full([THREADS], LOWEST, tl.float32)
        logistic = logistic_of(reference, c, CAP)
        ones = tl.zeros([THREADS], tl.int32)
        rest = tl.zeros([THREADS], tl.float64)
        moment = tl.zeros([THREADS], tl.float64)  # sum of e^x times the exponent of 2
        for first in range(0, packs, PACKS * THREADS):
            here = (first + lane < packs)[:, :, None]
            x = tl.load(body + first * W + offsets, mask=here, other=-INF).to(tl.float32)
            top = tl.maximum(reference, tl.max(tl.max(x, axis=2), axis=0))
            higher = logistic_of(top, c, CAP)
            shrink, delta = exp2_of(distance(reference, top, higher, c, CAP), c[0], c[1])
            rises = top > reference
            sum = rest + ones
            if ENTROPY:
                moment = tl.where(rises, tl.where(shrink > 0, shrink * (moment + delta * sum), 0.0), moment)
            rest = tl.where(rises, shrink * sum, rest)
            ones = tl.where(rises, 0, ones)
            reference, logistic = top, higher
            e, exponent = exp2_of(distance(x, reference[None, :, None], logistic[None, :, None], c, CAP), c[0], c[1])
            if CAP:
                e = tl.where(here, e, 0.0)
            one = e == 1.0
            ones += tl.sum(tl.sum(one.to(tl.int32), axis=2), axis=0)
            rest += tl.sum(tl.sum(tl.where(one, 0.0, e), axis=2).to(tl.float64), axis=0)
            if ENTROPY:
                moment += tl.sum(tl.sum(tl.where(e > 0, e * exponent, 0.0), axis=2).to(tl.float64), axis=0)

        index, there = ends_of(vocab, head, W)
        x = tl.load(z + index, mask=there, other=-INF).to(tl.float32)
        top = tl.maximum(tl.max(reference, axis=0), tl.max(x, axis=0))
        logistic = logistic_of(top, c, CAP)
        e, exponent = exp2_of(distance(x, top, logistic, c, CAP), c[0], c[1])
        e = tl.where(there, e, 0.0)
        one = e == 1.0
        shrink, delta = exp2_of(distance(reference, top, logistic, c, CAP), c[0], c[1])
        at_top = reference == top
        total = tl.sum(tl.where(at_top, ones, 0), axis=0) + tl.sum(one.to(tl.int32), axis=0)
        total += tl.sum(tl.where(at_top, rest, tl.where(shrink == 0, 0.0, shrink * (rest + ones))), axis=0)
        total += tl.sum(tl.where(one, 0.0, e).to(tl.float64), axis=0)
        # A NaN must reach the total, even from a lane whose terms are too small to count.
        total = tl.where((top == INF) | (tl.sum((rest != rest).to(tl.int32), axis=0) > 0), float("nan"), total)
        log_total = tl.log(total)
        lse = scaled(top, scale, cap, CAP) + log_total
        tl.store(lse_of + row, lse)
        tl.store(label_of + row, tl.where(is_here, scaled(at_label, scale, cap, CAP), 0.0))
        entropy = tl.full([], 0.0, tl.float64)
        if ENTROPY:
            moments = tl.where(at_top, moment, tl.where(shrink > 0, shrink * (moment + delta * (rest + ones)), 0.0))
            all_moments = tl.sum(moments, axis=0)
            all_moments += tl.sum(tl.where(e > 0, e * exponent, 0.0).to(tl.float64), axis=0)
            # a shard's row of -inf alone has entropy 0
            entropy = tl.where(total == 0.0, 0.0, log_total - LN_2 * all_moments / total)
            tl.store(entropy_of + row, entropy)
        if WRITE:
            sequence = tl.load(sequence_of + row)
            coefficient = tl.load(weights + sequence)
            bonus = tl.full([], 0.0, tl.float64)
            if BONUS:
                bonus = tl.load(bonuses + sequence)
            to = dz + row_offset(row, steps, dz_stride_sequence, dz_stride_row)
            if ((coefficient != 0.0) | (bonus != 0.0)) & (tl.abs(lse) < INF):
                # The thread that has stored the label's logit has read it before another writes over it. It had to wait
                # for it: on AMD's gfx9 a barrier alone does not wait for loads (``make aot`` looks at that).
                tl.debug_barrier()
                _write_row(z, to, vocab, column, at_label, lse, coefficient, bonus, entropy, scale, cap, c,
                           CAP, BONUS, WIDE, DZ_W, DZ_PACKS, THREADS)  # fmt: skip
            else:
                zero_row(to, vocab, DZ_W, DZ_PACKS, THREADS)


@_jit
def write_rows(
    logits,  # (B,T,V) or (N,V)
    labels,  # (rows) int64
    lse_of,  # (rows) fp64; NaN: a row of a sequence with a fault
    sequence_of,  # (rows) int64
    weights,  # (B) fp64, A times what the gradient is multiplied by
    entropy_of, bonuses,  # (rows), and (B) the factor of the gradient of the entropy, fp64; only with BONUS
    dz,  # of the shape of logits, written; if it has 16 bits and logits are fp32, it shares no memory with them
    there,  # int32: whether dz holds its gradient already; only with MAY_BE_THERE
    vocab, vocab_start, n_tokens, steps, stride_sequence, stride_row, dz_stride_sequence, dz_stride_row,
    scale_high, scale_low, cap_high, cap_low,
    MAY_BE_THERE: tl.constexpr, CAP: tl.constexpr, BONUS: tl.constexpr, WIDE: tl.constexpr, DZ_W: tl.constexpr,
    DZ_PACKS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row. A row that is not scored or has weight 0 is zeroed without being read."""
    if MAY_BE_THERE:
        if tl.load(there) != 0:
            return
    row = tl.program_id(0)
    label = tl.load(labels + row)
    lse = tl.load(lse_of + row)
    sequence = tl.load(sequence_of + row)
    coefficient = tl.load(weights + sequence)
    bonus = tl.full([], 0.0, tl.float64)
    entropy = bonus
    if BONUS:
        bonus = tl.load(bonuses + sequence)
        entropy = tl.load(entropy_of + row)
    to = dz + row_offset(row, steps, dz_stride_sequence, dz_stride_row)
    column = label - vocab_start
    if (label >= 0) & (label < n_tokens) & ((coefficient != 0.0) | (bonus != 0.0)) & (tl.abs(lse) < INF):
        z = logits + row_offset(row, steps, stride_sequence, stride_row)
        # The thread that overwrites the label's logit has read it, since its result depends on it. No other needs it.
        at_label = tl.load(z + column, mask=(column >= 0) & (column < vocab), other=0.0).to(tl.float32)
        scale, cap, c = constants(scale_high, scale_low, cap_high, cap_low, CAP)
        _write_row(z, to, vocab, column, at_label, lse, coefficient, bonus, entropy, scale, cap, c,
                   CAP, BONUS, WIDE, DZ_W, DZ_PACKS, THREADS)  # fmt: skip
    else:
        zero_row(to, vocab, DZ_W, DZ_PACKS, THREADS)


@_jit
def scale_rows(
    sequence_of,  # (rows) int64
    factors,  # (B) fp64
    dz,  # (B,T,V) or (N,V)
    vocab, steps, dz_stride_sequence, dz_stride_row,
    DZ_W: tl.constexpr, DZ_PACKS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Multiply dz by the factor of the sequence. Nothing is read if the factor is 0 or 1."""
    row = tl.program_id(0)
    by = tl.load(factors + tl.load(sequence_of + row)).to(tl.float32)
    to = dz + row_offset(row, steps, dz_stride_sequence, dz_stride_row)
    if by == 0.0:
        zero_row(to, vocab, DZ_W, DZ_PACKS, THREADS)
    elif by != 1.0:
        head, packs, body, lane, offsets = packs_of(to, vocab, DZ_W, DZ_PACKS, THREADS)
        for first in range(0, packs, DZ_PACKS * THREADS):
            here = (first + lane < packs)[:, :, None]
            x = tl.load(body + first * DZ_W + offsets, mask=here, other=0.0).to(tl.float32)
            tl.store(body + first * DZ_W + offsets, (x * by).to(dz.dtype.element_ty), mask=here)
        index, there = ends_of(vocab, head, DZ_W)
        x = tl.load(to + index, mask=there, other=0.0).to(tl.float32)
        tl.store(to + index, (x * by).to(dz.dtype.element_ty), mask=there)


@_jit
def sum_rows(
    labels,  # (rows) int64
    starts,  # (B+1) int64
    lse_of,  # (rows) fp64; NaN is written where a sequence has a fault, so that no gradient is made of it
    label_of, entropy_of,  # (rows) fp64
    log_prob, entropy,  # (B) fp64, written; entropy is 0 without ENTROPY
    faults,  # (B) int64, written: the first, or NONE
    vocab, vocab_start, n_tokens,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up log pi and the entropy of a sequence. Both are NaN if the sequence has a fault."""
    i = tl.program_id(0)
    first, last = tl.load(starts + i), tl.load(starts + i + 1)
    sums = tl.zeros([ROWS], tl.float64)
    entropies = tl.zeros([ROWS], tl.float64)
    fault = tl.full([ROWS], NONE, tl.int64)
    for start in range(first, last, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        label = tl.load(labels + row, mask=row < last, other=IGNORE)
        scored = label != IGNORE
        token = (label >= 0) & (label < n_tokens)
        is_here = (label >= vocab_start) & (label < vocab_start + vocab)
        lse = tl.load(lse_of + row, mask=scored, other=0.0)
        value = tl.load(label_of + row, mask=token, other=0.0) - tl.load(lse_of + row, mask=token, other=0.0)
        sums += value
        if ENTROPY:
            entropies += tl.load(entropy_of + row, mask=token, other=0.0)
        kind = tl.where(token, tl.where((lse != lse) | (lse == INF), 1, tl.where((value > -INF) | ~is_here, 0, 2)), 4)
        kind = tl.where(scored, kind, 0)
        fault = tl.minimum(fault, tl.where(kind > 0, row * 8 + kind, NONE))
    worst = tl.min(fault, axis=0)
    bad = worst != NONE
    tl.store(faults + i, worst)
    tl.store(log_prob + i, tl.where(bad, float("nan"), tl.sum(sums, axis=0)))
    tl.store(entropy + i, tl.where(bad, float("nan"), tl.sum(entropies, axis=0)))  # 0 without ENTROPY
    if bad:
        for start in range(first, last, ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            tl.store(lse_of + row, tl.full([ROWS], float("nan"), tl.float64), mask=row < last)
