"""linear_consistency_loss as torch sees it: derivatives, registration, compilation, bad input."""

from __future__ import annotations

import pytest
import torch

import cllm_kernels
from cllm_kernels.linear_consistency_loss import OP
from cllm_kernels.linear_consistency_loss.chunked import automatic_chunk
from cllm_kernels.linear_consistency_loss.options import DIVERGENCES
from cllm_kernels.linear_consistency_loss.reference import divergence_rows
from tests.kernels.backends import everywhere, running, slow_interpreter
from tests.kernels.test_linear_consistency_loss import INF, NAN, Case, by_autograd, loss_options


@pytest.mark.parametrize("function", [by_autograd, cllm_kernels.linear_consistency_loss])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(function, divergence):
    """The definition and the op against numerical derivatives, in fp64.

    The consistency term's teacher is a constant, which numerical derivatives do not know: the
    teacher's and the weight's gradients are checked where only the autoregressive term counts.
    """
    case = Case.random(
        4, 9, 5, torch.float64, bias=True, labels=True, masked=True, divergence=divergence,
        beta=0.3, temperature=1.5, label_smoothing=0.1, softcap=3.0, ar_weight=2.0,
    )  # fmt: skip

    def consistency(student):
        options = case.options
        return function(student, case.teacher, case.weight, bias=case.bias, **options)[0]

    def autoregressive(teacher, weight, bias):
        options = case.options | {"row_weights": torch.zeros(4)}
        return function(case.student, teacher, weight, bias=bias, **options)[0]

    leaves = [t.requires_grad_() for t in (case.student, case.teacher, case.weight, case.bias)]
    assert torch.autograd.gradcheck(consistency, leaves[:1])
    assert torch.autograd.gradcheck(autoregressive, leaves[1:])


@pytest.mark.parametrize("function", [by_autograd, cllm_kernels.linear_consistency_loss])
def test_gradcheck_of_teachers_without_students(function):
    case = Case.random(
        5, 9, 4, torch.float64, students=2, bias=True, labels=True, label_smoothing=0.1, softcap=3.0
    )

    def consistency(student):
        return function(student, case.teacher, case.weight, bias=case.bias, **case.options)[0]

    def autoregressive(teacher, weight, bias):
        options = case.options | {"row_weights": torch.zeros(2)}
        return function(case.student, teacher, weight, bias=bias, **options)[0]

    leaves = [t.requires_grad_() for t in (case.student, case.teacher, case.weight, case.bias)]
    assert torch.autograd.gradcheck(consistency, leaves[:1])
    assert torch.autograd.gradcheck(autoregressive, leaves[1:])


@pytest.mark.parametrize("function", [by_autograd, cllm_kernels.linear_consistency_loss])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_with_another_models_teacher(function, divergence):
    """Here the teacher is a constant, so that all derivatives are the definition's own."""
    case = Case.random(
        4, 9, 5, torch.float64, teacher_width=3, bias=True, masked=True, divergence=divergence,
        beta=0.3, temperature=1.5, softcap=3.0,
    )  # fmt: skip

    def loss(student, weight, bias):
        return function(student, case.teacher, weight, bias=bias, **case.options)[0]

    leaves = [t.requires_grad_() for t in (case.student, case.weight, case.bias)]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_twice_and_scaled(recompute):
    case = Case.random(5, 60, 16, torch.float32, labels=True)
    leaves = [t.float().requires_grad_() for t in (case.student, case.teacher, case.weight)]
    loss, _, _ = cllm_kernels.linear_consistency_loss(*leaves, recompute=recompute, **case.options)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in leaves]
    loss.backward(torch.tensor(-3.0))
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, -2 * gradient)


@pytest.mark.parametrize("recompute", [False, True])
@everywhere(OP)
def test_autocast_changes_nothing(backend, device, recompute):
    case = Case.random(5, 60, 16, torch.float32, labels=True, bias=True)
    case.options["recompute"] = recompute
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float16}
    for dtype in other:
        if slow_interpreter(backend, device) and dtype is torch.bfloat16:
            continue

        def autocast(*tensors, dtype=dtype, **options):
            with torch.autocast(device, other[dtype]):
                return cllm_kernels.linear_consistency_loss(*tensors, **options)

        with running(OP, backend, device):
            found = case.run(autocast, dtype, device)
            wanted = case.run(cllm_kernels.linear_consistency_loss, dtype, device)
        assert all(map(torch.equal, found, wanted))


def test_there_is_no_second_derivative():
    case = Case.random(3, 30, 8, torch.float32)
    student = case.student.float().requires_grad_()
    loss, _, _ = cllm_kernels.linear_consistency_loss(
        student, case.teacher.float(), case.weight.float()
    )
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), student)


def test_local_consistency_is_another_teacher():
    """The next state on the trajectory as the teacher's input: nothing else changes."""
    case = Case.random(4, 40, 8, torch.float32)
    rows = divergence_rows(
        case.student @ case.weight.T, case.teacher @ case.weight.T, "forward_kl", 0.5
    )
    found = case.run(cllm_kernels.linear_consistency_loss, torch.float32)
    torch.testing.assert_close(found[1], rows.mean(), rtol=1e-5, atol=0)


# Every teacher with its student; some without; another model's.
PAIRINGS = [{"labels": True}, {"labels": True, "students": 2}, {"teacher_width": 12}]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_opcheck(recompute, pairing):
    case = Case.random(5, 40, 8, torch.float32, bias=True, masked=True, **pairing)
    tensors = [case.student, case.teacher, case.weight, case.bias]
    leaves = [t.float().requires_grad_() for t in tensors]
    others = [case.options.get(name) for name in ("teacher_weight", "teacher_bias")]
    others = [None if t is None else t.float() for t in others]
    if others[0] is not None:
        leaves[1] = leaves[1].detach()
    numbers = loss_options(divergence="jsd", temperature=2.0, softcap=3.0)
    numbers = numbers._replace(recompute=recompute)
    arguments = (
        *leaves, *others, case.options.get("labels"), case.options["row_weights"], *numbers,
        True, others[0] is None, True, True,
    )  # fmt: skip
    ops = torch.ops.cllm_kernels
    torch.library.opcheck(ops.linear_consistency_loss.default, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    if recompute:
        state = ops.linear_consistency_loss.default(*detached)[-1]
        more = (*detached, state, torch.tensor(2.0))
        torch.library.opcheck(ops.linear_consistency_loss_gradients.default, more)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_compiled_without_a_graph_break(backend, recompute, pairing):
    torch._dynamo.reset()  # all cases are one function to it, and it compiles one only so often
    case = Case.random(6, 90, 16, torch.float32, masked=True, bias=True, **pairing)

    def loss(*tensors, **options):
        hidden, *rest = tensors
        result = cllm_kernels.linear_consistency_loss(
            hidden * 2.0, *rest, recompute=recompute, **options
        )
        return (result[0] * 3.0, *result[1:])

    wanted = case.run(loss, torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for a, b in zip(case.run(compiled, torch.float32), wanted, strict=True):
        assert torch.equal(a, b)


def test_the_automatic_chunk():
    cpu = torch.device("cpu")
    for rows, vocabulary in ((512, 49152), (3, 49152), (10_000, 256_000), (0, 5), (1, 10**9)):
        size = automatic_chunk(rows, vocabulary, torch.float32, cpu)
        assert size >= 1 and size & (size - 1) == 0
        assert size == 1 or 2 * size * vocabulary * 4 <= 64 << 20
        assert size < 2 * max(rows, 1)


def test_float64_runs_on_the_reference_alone():
    case = Case.random(3, 20, 8, torch.float64)
    loss, _, _ = cllm_kernels.linear_consistency_loss(case.student, case.teacher, case.weight)
    assert loss.dtype is torch.float64
    if OP.unavailable("cpp", torch.device("cpu")) is None:
        with (
            cllm_kernels.use_backend("cpp"),
            pytest.raises(cllm_kernels.BackendError, match="cannot run on float64 tensors"),
        ):
            cllm_kernels.linear_consistency_loss(case.student, case.teacher, case.weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": torch.zeros(2, 3, 4)}, ValueError, r"student must be \[S, H\], not \[2, 3, 4"),
        ({"teacher": torch.zeros(8)}, ValueError, r"teacher must be \[M, H\], not \[8\]"),
        ({"teacher": torch.zeros(1, 8)}, ValueError, r"each of student \[2, 8\], not \[1, 8\]"),
        (
            {"teacher": torch.zeros(3, 8)},
            ValueError,
            r"teacher \[3, 8\] has rows without a student \[2, 8\]; .*: pass labels",
        ),
        (
            {"teacher": torch.zeros(2, 9)},
            ValueError,
            r"teacher must be \[M, 8\].*not \[2, 9\]; .*need its teacher_weight",
        ),
        (
            {"teacher": torch.zeros(2, 9), "teacher_weight": torch.zeros(5, 8)},
            ValueError,
            r"teacher_weight must be \[5, 9\].*not \[5, 8\]",
        ),
        ({"teacher_weight": torch.zeros(4, 8)}, ValueError, r"must be \[5, 8\].*not \[4, 8\]"),
        (
            {"teacher": torch.zeros(3, 8), "teacher_weight": torch.zeros(5, 8)},
            ValueError,
            r"teacher with teacher_weight must have as many rows as student \[2, 8\], not \[3, 8",
        ),
        (
            {"teacher_weight": torch.zeros(5, 8), "labels": torch.zeros(2).long()},
            ValueError,
            "labels with teacher_weight: .*call once more without",
        ),
        ({"teacher_bias": torch.zeros(5)}, ValueError, "teacher_bias without teacher_weight"),
        (
            {"teacher_weight": torch.zeros(5, 8), "teacher_bias": torch.zeros(4)},
            ValueError,
            r"teacher_bias must be \[5\], one entry per row of weight, not \[4\]",
        ),
        (
            {"teacher_weight": torch.zeros(5, 8).half()},
            TypeError,
            "teacher_weight is float16 but student is float32",
        ),
        (
            {"teacher_weight": torch.zeros(5, 8), "teacher_bias": torch.zeros(5).long()},
            TypeError,
            "teacher_bias must be float32 or float32, not int64",
        ),
        (
            {"teacher_weight": torch.zeros(5, 8, device="meta")},
            ValueError,
            "teacher_weight is on meta but student is on cpu",
        ),
        ({"weight": torch.zeros(5, 9)}, ValueError, r"weight must be \[V, 8\].*\[2, 8\].*\[5, 9\]"),
        ({"weight": torch.zeros(0, 8)}, ValueError, "V >= 1"),
        ({"weight": torch.zeros(5, 8).half()}, TypeError, "weight is float16 but student is float"),
        ({"teacher": torch.zeros(2, 8).half()}, TypeError, "teacher is float16 but student is"),
        ({"student": torch.zeros(2, 8).long()}, TypeError, "student must be float32.*not int64"),
        ({"weight": torch.zeros(5, 8, device="meta")}, ValueError, "weight is on meta but student"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\], one entry.*not \[4\]"),
        ({"bias": torch.zeros(5).long()}, TypeError, "bias must be float32 or float32, not int64"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels must be \[2\], .*not \[3\]"),
        ({"labels": torch.zeros(2)}, TypeError, "labels must be int64, not float32"),
        (
            {"labels": torch.tensor([1, 5])},
            ValueError,
            r"labels \[2\] must be less.*\[5, 8\].*is 5",
        ),
        ({"row_weights": torch.ones(2, 1)}, ValueError, r"row_weights must be \[2\].*\[2, 1\]"),
        ({"row_weights": torch.ones(2).long()}, TypeError, "row_weights must be floating-point"),
        ({"row_weights": torch.tensor([1.0, -1])}, ValueError, "must not be negative, but one is"),
        ({"divergence": "kl"}, ValueError, "one of forward_kl, reverse_kl, jsd, not 'kl'"),
        ({"divergence": "jsd", "beta": 1.0}, ValueError, "beta must lie between 0 and 1, not 1.0"),
        ({"temperature": -1.0}, ValueError, "positive number \\(1e-30 to 1e30\\), not -1.0"),
        ({"temperature": 1e46}, ValueError, "positive number \\(1e-30 to 1e30\\)"),
        ({"temperature": NAN}, ValueError, "temperature must be a positive number"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must lie in \[0, 1\), not 1.0"),
        ({"ar_weight": INF}, ValueError, "ar_weight must be finite"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None, not 0.0"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1, not 0"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments_are_named(backend, change, error, message):
    arguments = {
        "student": torch.zeros(2, 8),
        "teacher": torch.zeros(2, 8),
        "weight": torch.zeros(5, 8),
    } | change
    tensors = [arguments.pop(name) for name in ("student", "teacher", "weight")]
    with cllm_kernels.use_backend(backend), pytest.raises(error, match=message):
        cllm_kernels.linear_consistency_loss(*tensors, **arguments)
