"""The CUDA C++ kernels on the CPU, thread by thread, against the C++ ones.

tests/kernels/cuda_on_host/ stands in for the CUDA headers, so that g++ compiles the kernels' own
sources; only the launch syntax is rewritten. This proves their arithmetic, indices and barriers,
not what a GPU makes of them.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cllm_kernels
from cllm_kernels._native import missing_reason
from cllm_kernels.linear_consistency_loss import native, reference
from cllm_kernels.linear_consistency_loss.chunk import Chunk, Stage
from cllm_kernels.linear_consistency_loss.drivers import driven_by
from cllm_kernels.linear_consistency_loss.options import (
    DIVERGENCES,
    STATE_FIELDS,
    Gradients,
    LossOptions,
    Operands,
)
from tests.kernels.test_jacobi_step import NAMES, make
from tests.kernels.test_linear_consistency_loss import Case

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "cuda_on_host"
pytestmark = [
    pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason())),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fibers need Linux"),
]
LAUNCH = re.compile(r"(\w+(?:<[\w:, ]+>)?)\s*<<<([^,]+),([^,]+),.*?>>>\((\w+)\)", re.DOTALL)


class ConsistencyChunk(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "row_weights", "labels")),
        *((name, ctypes.c_void_p) for name in ("scales", "consistency", "cross_entropy", "state")),
        *((name, ctypes.c_int) for name in ("stage", "dtype")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "student_stride")),
        *((name, ctypes.c_int64) for name in ("teacher_stride", "first", "vocabulary")),
        ("divergence", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("beta", "inverse_temperature", "smoothing")),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_bool) for name in ("student_gradient", "teacher_gradient")),
    ]


class JacobiStep(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*NAMES, "accepted")),
        *((name, ctypes.c_int64) for name in ("rows", "n", "capacity", "stops", "fill_width")),
        *((name, ctypes.c_bool) for name in ("block_mode", "accept_one")),
    ]


@pytest.fixture(scope="module", params=["forward", "reverse"])
def library(request, tmp_path_factory):
    """The kernels, their threads run in this order."""
    folder = tmp_path_factory.getbasetemp() / "cuda_on_host"
    built = folder / "kernels.so"
    if not built.is_file():
        folder.mkdir(exist_ok=True)
        sources = [SHIM / "entry.cpp"]
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            text, launches = LAUNCH.subn(
                r"host::launch(\2, \3, [=] { \1(\4); })", source.read_text()
            )
            assert launches and "<<<" not in text, source
            sources.append(folder / f"{source.stem}.cpp")
            sources[-1].write_text(text)
        command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-DCLLM_WITH_CUDA"]
        command += [f"-I{SHIM}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
        done = subprocess.run(
            [*command, *map(str, sources), "-o", str(built)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    previous = os.environ.get("CLLM_HOST_ORDER")
    os.environ["CLLM_HOST_ORDER"] = request.param
    yield ctypes.CDLL(str(built))
    if previous is None:
        del os.environ["CLLM_HOST_ORDER"]
    else:
        os.environ["CLLM_HOST_ORDER"] = previous


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("columns", "offset", "temperature", "softcap", "smoothing", "labelled", "gradients"),
    [
        (1, 0, 1.0, None, 0.0, True, (True, True)),
        (250, 1, 1.0, None, 0.1, True, (True, True)),  # rows that are not aligned to 16 bytes
        (8192, 0, 2.0, 5.0, 0.1, True, (True, True)),
        (5001, 0, 1.0, None, 0.0, False, (True, False)),
        (4096, 0, 0.5, None, 0.0, True, (False, True)),
    ],
)
def test_consistency_chunk(
    library, dtype, divergence, columns, offset, temperature, softcap, smoothing, labelled,
    gradients,
):  # fmt: skip
    generator = torch.Generator().manual_seed(columns)
    rows = 5
    logits = 3 * torch.randn(2, rows, columns + 24, generator=generator)
    logits[1] = logits[0] + 0.5 * logits[1]
    logits[0, 1] *= 1000
    if columns > 100:
        logits[:, 3, 20 : columns - 20] = -float("inf")
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.0])
    labels = torch.tensor([0, columns - 1, columns // 2, columns - 1, -100])
    options = LossOptions(
        divergence, 0.3, temperature, smoothing * (columns < 200), 1, softcap, 0, False
    )
    results = []
    for run in ("cpu", "cuda"):
        student, teacher = (
            x[:, offset : offset + columns] for x in logits.to(dtype, copy=True).unbind()
        )
        losses = torch.empty(2, rows)
        chunk = Chunk(
            student, teacher, weights, labels if labelled else None, torch.tensor([0.5, 3.0]),
            *losses, *gradients,
        )  # fmt: skip
        arguments = native._arguments(chunk, options)
        if run == "cpu":
            native._pass_cpu(chunk, options)
        else:
            assert library.consistency_chunk(ctypes.byref(ConsistencyChunk(*arguments))) == 0
        results.append((losses, student, teacher))
    for place, (wanted, found) in enumerate(zip(*results, strict=True)):
        wanted, found = wanted.double(), found.double()
        assert torch.equal(wanted.isfinite(), found.isfinite()), place
        wanted, found = wanted[wanted.isfinite()], found[wanted.isfinite()]
        # Both are fp32 inside: they differ by its rounding of differences of logits, and by that
        # of the logits' own type.
        eps = torch.finfo(torch.float32 if place == 0 else dtype).eps
        largest = logits[logits.isfinite()].abs().max()
        bound = 2 * torch.finfo(torch.float32).eps * float(largest)
        assert ((wanted - found).abs() <= bound + eps * wanted.abs()).all(), place


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_consistency_chunk_in_pieces(library, divergence):
    """Sums carried over pieces of the vocabulary give what whole rows give."""
    generator = torch.Generator().manual_seed(1)
    rows, columns, piece = 4, 700, 256
    logits = 3 * torch.randn(2, rows, columns, generator=generator)
    options = LossOptions(divergence, 0.3, 2.0, 0.1, 1, 9.0, 0, True)
    weights, labels = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([0, 256, -1, -1])
    fixed = {"row_weights": weights, "labels": labels, "scales": torch.tensor([0.5, 3.0])}

    def chunk(columns, losses, stage, state=None):
        return Chunk(
            logits[0, :, columns].clone(), logits[1, :, columns].clone(), **fixed,
            consistency=losses[0], cross_entropy=losses[1], student_gradient=True,
            teacher_gradient=True, stage=stage, state=state, first=columns.start or 0,
            vocabulary=700,
        )  # fmt: skip

    whole_losses, losses = torch.empty(2, rows), torch.empty(2, rows)
    whole = chunk(slice(None), whole_losses, Stage.WHOLE)
    native._pass_cpu(whole, options)
    state = torch.zeros(rows, STATE_FIELDS, dtype=torch.float64)
    state[:, [0, 2]] = -float("inf")
    slopes = []
    for stage in (Stage.SUMS, Stage.DIVERGENCE, Stage.SLOPES):
        for first in range(0, columns, piece):
            part = chunk(slice(first, min(first + piece, columns)), losses, stage, state)
            arguments = ConsistencyChunk(*native._arguments(part, options))
            assert library.consistency_chunk(ctypes.byref(arguments)) == 0
            if stage is Stage.SLOPES:
                slopes.append((part.student, part.teacher))
    torch.testing.assert_close(losses, whole_losses, rtol=1e-5, atol=1e-6)
    for side, wanted in enumerate((whole.student, whole.teacher)):
        found = torch.cat([pair[side] for pair in slopes], dim=1)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pairing", [{"students": 2, "labels": True}, {"teacher_width": 12}])
def test_consistency_loss_of_unlike_sides(library, divergence, recompute, pairing):
    """Lone teachers, whose logits stand on both sides of the pass, and another model's teachers."""
    case = Case.random(5, 70, 16, torch.float64, masked=True, bias=True, **pairing)
    tensors = {"student": case.student, "teacher": case.teacher, "weight": case.weight}
    tensors |= {"bias": case.bias, **case.options}
    wanted = Gradients(True, "labels" in case.options, True, True)
    options = LossOptions(divergence, 0.3, 2.0, 0.1, 3.0, 5.0, 2, recompute)

    def in_place(chunk, options):
        arguments = ConsistencyChunk(*native._arguments(chunk, options))
        assert library.consistency_chunk(ctypes.byref(arguments)) == 0

    def run(implementation, dtype):
        operands = Operands(
            *(
                tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor
                for tensor in (tensors.get(name) for name in Operands._fields)
            )
        )
        found = implementation.losses(operands, options, wanted)
        if not recompute:
            return *found[:3], *found[3:7]
        one = torch.ones((), dtype=dtype)
        return *found[:3], *implementation.gradients(operands, options, wanted, found.state, one)

    exact = run(reference.implementation, torch.float64)
    for a, b in zip(run(driven_by(in_place), torch.float32), exact, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("accept", ["all", "one"])
@pytest.mark.parametrize("n", [1, 5, 32, 33, 100])
def test_jacobi_step(library, mode, accept, n):
    generator = torch.Generator().manual_seed(n)
    window = torch.randint(3, (9, n), generator=generator)
    predictions = torch.randint(3, (9, n), generator=generator)
    predictions[0, :-1] = window[0, 1:]  # converged
    predictions[1, : n // 2] = window[1, 1 : 1 + n // 2]
    for stops, fill in (((), True), ((2,), False)):
        states = [
            make(window.tolist(), predictions.tolist(), stop_ids=stops, fill=fill) for _ in range(2)
        ]
        with cllm_kernels.use_backend("cpp"):
            accepted = cllm_kernels.jacobi_step(
                *(states[0][name] for name in NAMES), mode=mode, accept=accept
            )
        state = states[1]
        found = torch.empty_like(accepted)
        step = JacobiStep(
            *(None if state[name] is None else state[name].data_ptr() for name in NAMES),
            found.data_ptr(), 9, n, state["output"].shape[1], len(stops),
            0 if state["fill"] is None else state["fill"].shape[1],
            mode == "block", accept == "one",
        )  # fmt: skip
        assert library.jacobi_step(ctypes.byref(step)) == 0
        assert torch.equal(found, accepted)
        for name in NAMES:
            if state[name] is not None:
                assert torch.equal(state[name], states[0][name]), name
