"""linear_consistency_loss in Triton: the in-place pass, one program per pair of rows.

A program reads its student's and its teacher's logits together, keeps their sums under running
maxima (Milakov and Gimelshein 2018) in fp32, and then goes over the row again, when it lies in L2,
to put the gradients in the logits' place. The vocabulary is a loop, never a compile-time size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cllm_kernels._triton import FUSION, device_of, tanh
from cllm_kernels.linear_consistency_loss.chunk import Chunk, Stage
from cllm_kernels.linear_consistency_loss.drivers import driven_by
from cllm_kernels.linear_consistency_loss.options import (
    DIVERGENCES,
    STATE_FIELDS,
    LossOptions,
)

_FORWARD = tl.constexpr(DIVERGENCES.index("forward_kl"))
_REVERSE = tl.constexpr(DIVERGENCES.index("reverse_kl"))
_JSD = tl.constexpr(DIVERGENCES.index("jsd"))
_WHOLE = tl.constexpr(int(Stage.WHOLE))
_SUMS = tl.constexpr(int(Stage.SUMS))
_MIXTURE = tl.constexpr(int(Stage.DIVERGENCE))
_SLOPES = tl.constexpr(int(Stage.SLOPES))


@triton.jit
def _finite(largest):
    """What exponentials are taken relative to: a row of -inf has no finite maximum."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _load(row_ptr, column, vocabulary, softcap, HAS_CAP: tl.constexpr):
    """Logits of a row at these columns, in fp32, behind the soft-cap; -inf past the end."""
    value = tl.load(row_ptr + column, mask=column < vocabulary, other=0.0).to(tl.float32)
    if HAS_CAP:
        value = softcap * tanh(value / softcap)
    return tl.where(column < vocabulary, value, float("-inf"))


@triton.jit
def _log_ratios(difference, beta):
    """log(q / m) and log(p / m) of m = beta p + (1 - beta) q, from difference = log p - log q.

    The larger exponential is taken out, so nothing overflows and both share one logarithm.
    """
    e = tl.exp(-tl.abs(difference))
    rest = tl.log(tl.where(difference < 0, beta * e + (1.0 - beta), (1.0 - beta) * e + beta))
    return -(tl.maximum(difference, 0.0) + rest), -(tl.maximum(-difference, 0.0) + rest)


@triton.jit
def _kept(state_ptr, row, FIELD: tl.constexpr, FIELDS: tl.constexpr):
    return tl.load(state_ptr + row * FIELDS + FIELD).to(tl.float32)


@triton.jit
def consistency_chunk_kernel(
    student_ptr,  # [rows, columns] logits, rows student_stride apart; d(logits) if wanted
    teacher_ptr,  # [rows, columns] logits, rows teacher_stride apart; d(logits) if wanted
    weight_ptr,  # [rows] float32: 0 masks the row's divergence
    label_ptr,  # [rows] int64, negative: none; unread unless HAS_LABELS
    scale_ptr,  # [2] float32, of d(student) and d(teacher)
    consistency_ptr,  # [rows] float32, written
    cross_entropy_ptr,  # [rows] float32, written
    state_ptr,  # [rows, FIELDS] float64, in the order of csrc/ops.h; unread where STAGE is WHOLE
    columns,
    student_stride,
    teacher_stride,
    first,
    vocabulary,
    inverse_temperature,
    beta,
    smoothing,
    softcap,
    STAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr,
    TEACHER_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row = student_ptr + row * student_stride
    t_row = teacher_ptr + row * teacher_stride
    weight = tl.load(weight_ptr + row)
    counts = weight != 0
    if HAS_LABELS:
        label = tl.load(label_ptr + row)
    else:
        label = tl.full([], -1, tl.int64)
    labelled = label >= 0
    # A masked row is not read: all its loads are masked, and so is what would come of them.
    length = tl.where(counts | labelled, columns, 0)
    # A label outside the vocabulary is never read; the caller asserts that there is none.
    place = label - first
    inside = labelled & (place >= 0) & (place < columns)

    if STAGE == _WHOLE:
        s_max = float("-inf")
        t_max = float("-inf")
        s_sum = 0.0
        t_sum = 0.0
        cross = 0.0  # sum exp(..) (t - s) for forward KL, (s - t) for reverse KL
        plain = 0.0  # sum exp(t - t_max), where it differs from t_sum
        total = 0.0  # sum t
        at_label = 0.0
        p_part = 0.0  # KL(p || m) and KL(q || m), for jsd
        q_part = 0.0
    else:
        s_max = _kept(state_ptr, row, 0, FIELDS)
        s_sum = _kept(state_ptr, row, 1, FIELDS)
        t_max = _kept(state_ptr, row, 2, FIELDS)
        t_sum = _kept(state_ptr, row, 3, FIELDS)
        cross = _kept(state_ptr, row, 4, FIELDS)
        plain = _kept(state_ptr, row, 5, FIELDS)
        total = _kept(state_ptr, row, 6, FIELDS)
        at_label = _kept(state_ptr, row, 7, FIELDS)
        p_part = _kept(state_ptr, row, 8, FIELDS)
        q_part = _kept(state_ptr, row, 9, FIELDS)

    if STAGE != _MIXTURE and STAGE != _SLOPES:
        for start in range(0, length, BLOCK):
            column = start + tl.arange(0, BLOCK)
            s = _load(s_row, column, columns, softcap, HAS_CAP)
            t = _load(t_row, column, columns, softcap, HAS_CAP)
            s_new = tl.maximum(s_max, tl.max(s, axis=0))
            t_new = tl.maximum(t_max, tl.max(t, axis=0))
            s_shrink = tl.exp((s_max - _finite(s_new)) * inverse_temperature)
            t_shrink = tl.exp((t_max - _finite(t_new)) * inverse_temperature)
            q = tl.exp((s - _finite(s_new)) * inverse_temperature)
            p = tl.exp((t - _finite(t_new)) * inverse_temperature)
            s_sum = s_sum * s_shrink + tl.sum(q, axis=0)
            t_sum = t_sum * t_shrink + tl.sum(p, axis=0)
            # -inf - -inf is NaN, but where the probability is 0 so is the term.
            if DIVERGENCE == _FORWARD:
                # infinite terms whose probability has become 0 count no more
                cross = tl.where(t_shrink == 0, 0.0, cross * t_shrink)
                cross += tl.sum(tl.where(p == 0, 0.0, p * (t - s)), axis=0)
            if DIVERGENCE == _REVERSE:
                cross = tl.where(s_shrink == 0, 0.0, cross * s_shrink)
                cross += tl.sum(tl.where(q == 0, 0.0, q * (s - t)), axis=0)
            if HAS_LABELS:
                if HAS_TEMPERATURE:
                    shrink = tl.exp(t_max - _finite(t_new))
                    plain = plain * shrink + tl.sum(tl.exp(t - _finite(t_new)), axis=0)
                total += tl.sum(tl.where(column < columns, t, 0.0), axis=0)
            s_max = s_new
            t_max = t_new
        if HAS_LABELS:
            found = tl.load(t_row + place, mask=inside, other=0.0).to(tl.float32)
            if HAS_CAP:
                found = softcap * tanh(found / softcap)
            at_label = tl.where(inside, found, at_label)
    if STAGE == _SUMS:
        kept = state_ptr + row * FIELDS
        tl.store(kept, s_max)
        tl.store(kept + 1, s_sum)
        tl.store(kept + 2, t_max)
        tl.store(kept + 3, t_sum)
        tl.store(kept + 4, cross)
        tl.store(kept + 5, plain)
        tl.store(kept + 6, total)
        tl.store(kept + 7, at_label)
        return

    s_max = _finite(s_max)
    t_max = _finite(t_max)
    # log sum exp, relative to the maximum
    s_log = tl.log(s_sum)
    t_log = tl.log(t_sum)
    if DIVERGENCE == _JSD and STAGE != _SLOPES:
        for start in range(0, tl.where(counts, columns, 0), BLOCK):
            column = start + tl.arange(0, BLOCK)
            s = (_load(s_row, column, columns, softcap, HAS_CAP) - s_max) * inverse_temperature
            t = (_load(t_row, column, columns, softcap, HAS_CAP) - t_max) * inverse_temperature
            q = tl.exp(s) / s_sum
            p = tl.exp(t) / t_sum
            q_over_m, p_over_m = _log_ratios((t - s) + (s_log - t_log), beta)
            p_part += tl.sum(tl.where(p == 0, 0.0, p * p_over_m), axis=0)
            q_part += tl.sum(tl.where(q == 0, 0.0, q * q_over_m), axis=0)
    if STAGE == _MIXTURE:
        kept = state_ptr + row * FIELDS
        tl.store(kept + 8, p_part)
        tl.store(kept + 9, q_part)
        return

    shift = (s_max - t_max) * inverse_temperature + (s_log - t_log)
    if DIVERGENCE == _FORWARD:
        divergence = cross / t_sum * inverse_temperature + shift
    elif DIVERGENCE == _REVERSE:
        divergence = cross / s_sum * inverse_temperature - shift
    else:
        divergence = beta * p_part + (1.0 - beta) * q_part
    tl.store(consistency_ptr + row, tl.where(counts, weight * divergence, 0.0))
    if HAS_TEMPERATURE:
        plain_sum = plain
    else:
        plain_sum = t_sum
    if HAS_LABELS:
        loss = t_max + tl.log(plain_sum) - (1.0 - smoothing) * at_label
        # With nothing to smooth, a logit of -inf must not make 0 * -inf.
        loss = tl.where(smoothing == 0.0, loss, loss - smoothing * (total / vocabulary))
        tl.store(cross_entropy_ptr + row, tl.where(labelled, loss, 0.0))
    else:
        tl.store(cross_entropy_ptr + row, 0.0)

    if STUDENT_GRADIENT or TEACHER_GRADIENT:
        # Every thread has read the row before any of them writes it.
        tl.debug_barrier()
        s_scale = tl.load(scale_ptr) * weight * inverse_temperature
        t_scale = tl.load(scale_ptr + 1)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < columns
            s_value = _load(s_row, column, length, softcap, HAS_CAP)
            t_value = _load(t_row, column, length, softcap, HAS_CAP)
            if STUDENT_GRADIENT:
                s = (s_value - s_max) * inverse_temperature
                t = (t_value - t_max) * inverse_temperature
                q = tl.exp(s) / s_sum
                difference = (t - s) + (s_log - t_log)  # log p - log q
                if DIVERGENCE == _FORWARD:
                    slope = q - tl.exp(t) / t_sum
                elif DIVERGENCE == _REVERSE:
                    slope = tl.where(q == 0, 0.0, -q * (difference + divergence))
                else:
                    q_over_m, _ = _log_ratios(difference, beta)
                    slope = tl.where(q == 0, 0.0, (1.0 - beta) * q * (q_over_m - q_part))
                slope = slope * s_scale
                if HAS_CAP:
                    slope = slope * (1.0 - (s_value / softcap) * (s_value / softcap))
                slope = tl.where(counts, slope, 0.0)
                tl.store(s_row + column, slope.to(student_ptr.dtype.element_ty), mask=real)
            if TEACHER_GRADIENT:
                slope = tl.exp(t_value - t_max) / plain_sum - smoothing / vocabulary
                slope = slope - tl.where(column == place, 1.0 - smoothing, 0.0)
                slope = slope * t_scale
                if HAS_CAP:
                    slope = slope * (1.0 - (t_value / softcap) * (t_value / softcap))
                slope = tl.where(labelled, slope, 0.0)
                tl.store(t_row + column, slope.to(teacher_ptr.dtype.element_ty), mask=real)


def launch_options(columns: int) -> dict[str, int]:
    """Block of columns and warps. Reasoned, not measured: 16 bytes a thread and row and block keep
    the loads wide and the values of both rows in registers."""
    block = min(2048, max(128, triton.next_power_of_2(max(columns, 1))))
    return {"BLOCK": block, "num_warps": max(1, block // 256), "num_stages": 2}


def _pass(chunk: Chunk, options: LossOptions) -> None:
    rows, columns = chunk.student.shape
    if rows == 0:
        return
    has_labels = chunk.labels is not None
    with device_of(chunk.student):
        consistency_chunk_kernel[(rows,)](
            chunk.student,
            chunk.teacher,
            chunk.row_weights,
            chunk.labels if has_labels else chunk.row_weights,
            chunk.scales,
            chunk.consistency,
            chunk.cross_entropy,
            chunk.row_weights if chunk.state is None else chunk.state,
            columns,
            chunk.student.stride(0),
            chunk.teacher.stride(0),
            chunk.first,
            chunk.vocabulary or columns,
            1.0 / options.temperature,
            options.beta,
            options.label_smoothing,
            options.softcap or 0.0,
            STAGE=int(chunk.stage),
            FIELDS=STATE_FIELDS,
            DIVERGENCE=DIVERGENCES.index(options.divergence),
            HAS_LABELS=has_labels,
            HAS_CAP=options.softcap is not None,
            HAS_TEMPERATURE=options.temperature != 1.0,
            STUDENT_GRADIENT=chunk.student_gradient,
            TEACHER_GRADIENT=chunk.teacher_gradient,
            **launch_options(columns),
            **FUSION,
        )


implementation = driven_by(_pass)
