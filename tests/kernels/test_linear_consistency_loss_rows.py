"""linear_consistency_loss where the two sides differ: teachers without a student, and teachers of
another model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import cllm_kernels
from cllm_kernels.linear_consistency_loss import OP, swept
from cllm_kernels.linear_consistency_loss.chunk import blocks, most_pairs
from cllm_kernels.linear_consistency_loss.options import DIVERGENCES, Gradients, Operands
from tests.kernels.backends import everywhere, running
from tests.kernels.test_linear_consistency_loss import (
    DTYPES,
    Case,
    by_autograd,
    check,
    loss_options,
    skip_what_the_interpreter_gets_wrong,
)


def check_both_drivers(case, dtype, device):
    for recompute in (False, True):
        check(case, dtype, device, recompute=recompute)
        check(case, dtype, device, recompute=recompute, chunk_tokens=3)


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("students", "rows", "extra"),
    [
        (0, 9, {}),
        (1, 8, {"bias": True, "label_smoothing": 0.1, "ar_weight": 10.0}),
        (5, 7, {"masked": True, "temperature": 2.0, "softcap": 5.0, "bias": True}),
        (6, 21, {"masked": True, "temperature": 0.7, "label_smoothing": 0.3}),
    ],
)
def test_teachers_without_students(backend, device, dtype, divergence, students, rows, extra):
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    case = Case.random(
        rows, 251, 40, dtype, students=students, labels=True, divergence=divergence, beta=0.3,
        **extra,
    )  # fmt: skip
    with running(OP, backend, device):
        check_both_drivers(case, dtype, device)


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("rows", "teacher_width", "extra"),
    [
        (1, 40, {}),
        (7, 24, {"masked": True, "bias": True}),
        (8, 56, {"temperature": 2.0, "softcap": 5.0, "bias": True}),
    ],
)
def test_another_models_teacher(backend, device, dtype, divergence, rows, teacher_width, extra):
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    case = Case.random(
        rows, 251, 40, dtype, teacher_width=teacher_width, divergence=divergence, beta=0.3, **extra
    )
    with running(OP, backend, device):
        check_both_drivers(case, dtype, device)


@everywhere(OP)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("other", [{"students": 3, "labels": True}, {"teacher_width": 17}])
def test_sweeps_over_pieces_of_the_vocabulary(backend, device, divergence, other, monkeypatch):
    monkeypatch.setattr(swept, "_PIECE", {"cpu": 96, "cuda": 96})
    case = Case.random(
        11, 250, 24, torch.float32, divergence=divergence, beta=0.3, temperature=1.5, masked=True,
        bias=True, softcap=8.0, **other,
    )  # fmt: skip
    with running(OP, backend, device):
        for chunk in (None, 2):
            check(case, torch.float32, device, recompute=True, chunk_tokens=chunk)


@everywhere(OP)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_sum_of_two_calls(backend, device, recompute):
    """The consistency of the pairs and the autoregressive loss of all rows, each by itself."""
    case = Case.random(
        10, 130, 24, torch.float32, students=4, labels=True, masked=True, bias=True, ar_weight=3.0
    )

    def apart(student, teacher, weight, *, bias, labels, row_weights, ar_weight):
        call = cllm_kernels.linear_consistency_loss
        pairs = call(student, teacher[:4], weight, bias=bias, row_weights=row_weights)
        alone = call(student[:0], teacher, weight, bias=bias, labels=labels, ar_weight=ar_weight)
        assert alone[1] == 0 and pairs[2] == 0
        return pairs[0] + alone[0], pairs[1], alone[2]

    def together(*tensors, **options):
        return cllm_kernels.linear_consistency_loss(*tensors, recompute=recompute, **options)

    with running(OP, backend, device):
        wanted = case.run(apart, torch.float32, device)
        found = case.run(together, torch.float32, device)
    for a, b in zip(wanted, found, strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()


@everywhere(OP)
@pytest.mark.parametrize("recompute", [False, True])
def test_no_rows_at_all(backend, device, recompute):
    for extra in ({}, {"labels": True}, {"teacher_width": 5}):
        case = Case.random(0, 50, 16, torch.float32, bias=True, **extra)
        case.options["recompute"] = recompute
        with running(OP, backend, device):
            found = case.run(cllm_kernels.linear_consistency_loss, torch.float32, device)
        assert all(x.count_nonzero() == 0 for x in found)


@everywhere(OP)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("other", [{"students": 2, "labels": True}, {"teacher_width": 12}])
def test_only_what_is_asked_for_gets_a_gradient(backend, device, recompute, other):
    case = Case.random(7, 70, 16, torch.float32, bias=True, **other)
    wanted = case.run(by_autograd, torch.float64)[3:]
    with running(OP, backend, device):
        for chosen in range(4):
            tensors = [case.student, case.teacher, case.weight, case.bias]
            leaves = [
                t.to(device, torch.float32).requires_grad_(i == chosen)
                for i, t in enumerate(tensors)
            ]
            options = {
                k: v.to(device, v.dtype if k == "labels" else torch.float32)
                for k, v in case.options.items()
            }
            loss, _, _ = cllm_kernels.linear_consistency_loss(
                *leaves[:3], bias=leaves[3], recompute=recompute, chunk_tokens=2, **options
            )
            if wanted[chosen].count_nonzero() == 0:  # another model's teacher
                assert chosen == 1 and loss.requires_grad is False
                continue
            loss.backward()
            gradient = leaves[chosen].grad.double().cpu()
            assert (gradient - wanted[chosen]).norm() <= 1e-5 * wanted[chosen].norm()


class CountedProducts(TorchDispatchMode):
    """The multiplications in matrix products inside."""

    def __init__(self):
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[:2] if name == "mm" else args[1:3]
            self.multiplications += left.numel() * right.shape[1]
        assert name not in ("bmm", "matmul", "linear"), "uncounted"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize(("students", "teachers"), [(8, 8), (5, 21), (0, 9)])
def test_missing_students_cost_no_matmul(students, teachers, chunk):
    """(S + M) H V multiplications for the logits, as many for the gradients of the hidden states
    and of the weight each; S H V where only the students want one."""
    case = Case.random(teachers, 60, 16, torch.float32, students=students, labels=True)
    tensors = [t.float() for t in (case.student, case.teacher, case.weight)]
    operands = Operands(*tensors, None, None, None, case.options["labels"], None)
    implementation = OP.resolve(torch.device("cpu"))
    unit, options = 16 * 60, loss_options()._replace(chunk_tokens=chunk)

    def rows_multiplied(function, *arguments):
        with CountedProducts() as counter:
            function(*arguments)
        return counter.multiplications / unit

    everything, student_alone = Gradients(True, True, True, False), Gradients(True, *[False] * 3)
    both = students + teachers
    assert rows_multiplied(implementation.losses, operands, options, everything) == 3 * both
    assert (
        rows_multiplied(implementation.losses, operands, options, student_alone) == both + students
    )
    options = options._replace(recompute=True)
    state = implementation.losses(operands, options, everything).state
    again = (state, torch.tensor(1.0))
    gradients = implementation.gradients
    assert rows_multiplied(implementation.losses, operands, options, everything) == both
    assert rows_multiplied(gradients, operands, options, everything, *again) == 3 * both
    pairs = 2 * students  # both logits
    assert rows_multiplied(gradients, operands, options, student_alone, *again) == pairs + students


@given(students=st.integers(0, 40), alone=st.integers(0, 40), size=st.integers(1, 50))
def test_blocks_cover_every_row_once(students, alone, size):
    teachers = students + alone
    cut = blocks(students, teachers, size)
    assert [row for block in cut for row in range(block.begin, block.end)] == [*range(teachers)]
    assert all(0 < block.height <= 2 * size for block in cut)
    assert all(block.paired == (block.end <= students) for block in cut)
    whole = blocks(students, teachers, max(1, most_pairs(students, teachers)))
    assert len(whole) == (students > 0) + (alone > 0)


@settings(max_examples=40, deadline=None)
@given(
    students=st.integers(0, 12),
    alone=st.integers(0, 12),
    chunk=st.sampled_from([None, 1, 2, 5, 100]),
    recompute=st.booleans(),
    divergence=st.sampled_from(DIVERGENCES),
    masked=st.booleans(),
)
def test_any_numbers_of_rows(students, alone, chunk, recompute, divergence, masked):
    case = Case.random(
        students + alone, 37, 8, torch.float32, students=students, labels=True, masked=masked,
        divergence=divergence, ar_weight=2.0,
    )  # fmt: skip
    check(case, torch.float32, "cpu", chunk_tokens=chunk, recompute=recompute)
