"""The ops as torch sees them: registration, fake tensors, compilation, choice of backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cllm_kernels
import cllm_kernels.jacobi_step
import cllm_kernels.row_argmax
from cllm_kernels import _common
from cllm_kernels._backend import BACKENDS, interpreting, registered
from cllm_kernels._common import eager
from cllm_kernels._native import missing_reason
from cllm_kernels.jacobi_step import OP as JACOBI_STEP
from tests.kernels.test_jacobi_step import NAMES, make

ops = torch.ops.cllm_kernels
# The package's attributes of these names are the functions.
jacobi_module = sys.modules["cllm_kernels.jacobi_step"]
row_module = sys.modules["cllm_kernels.row_argmax"]


def jacobi_arguments(fill: bool = True) -> list:
    state = make([[1, 2, 3], [1, 9, 3]], [[2, 3, 4], [2, 3, 4]], stop_ids=(4,), fill=fill)
    return [state[name] for name in NAMES]


@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("fill", [True, False])
def test_opcheck_jacobi_step(mode, fill):
    arguments = (*jacobi_arguments(fill), mode, "all")
    torch.library.opcheck(ops.jacobi_step.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_row_argmax(dtype):
    torch.library.opcheck(ops.row_argmax.default, (torch.randn(2, 5, 33).to(dtype),))
    torch.library.opcheck(ops.row_argmax.default, (torch.randn(33).to(dtype),))


def test_opcheck_linear_argmax():
    hidden, weight, bias = torch.randn(4, 8), torch.randn(20, 8), torch.randn(20)
    torch.library.opcheck(ops.linear_argmax.default, (hidden, weight, bias, 2.0))
    torch.library.opcheck(ops.linear_argmax.default, (hidden.half(), weight.half(), None, None))
    noise = (torch.tensor([2**40]), torch.arange(4), torch.arange(4))
    torch.library.opcheck(ops.linear_argmax.default, (hidden, weight, bias, 2.0, 0.5, *noise))


def test_opcheck_gumbel_noise():
    ids = torch.arange(4)
    torch.library.opcheck(ops.gumbel_noise.default, (torch.tensor([2**40]), ids, ids, 70))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_graph_break(backend):
    def loop(hidden, weight, *state):
        index, _ = cllm_kernels.linear_argmax(hidden, weight)
        _, value = cllm_kernels.row_argmax(hidden)
        position = torch.arange(hidden.shape[0])
        sample, _ = cllm_kernels.linear_argmax(
            hidden, weight, temperature=3.0, noise=(2**63, 4, position)
        )
        # Outside an op a compiler may fuse multiplications and additions; these bits stay.
        noise = cllm_kernels.gumbel_noise(7, 4, position, 50)
        accepted = cllm_kernels.jacobi_step(*state, mode="block")
        return index, value, sample, noise, accepted

    hidden, weight = torch.randn(5, 16), torch.randn(30, 16)
    plain, compiled = jacobi_arguments(), jacobi_arguments()
    wanted = loop(hidden, weight, *plain)
    found = torch.compile(loop, fullgraph=True, backend=backend)(hidden, weight, *compiled)
    for a, b in zip((*wanted, *plain), (*found, *compiled), strict=True):
        assert torch.equal(a, b)


def test_fake_tensors_and_meta_tensors():
    with FakeTensorMode():
        index, value = cllm_kernels.row_argmax(torch.empty(2, 3, 7, dtype=torch.float16))
        assert index.shape == value.shape == (2, 3)
        assert (index.dtype, value.dtype) == (torch.int64, torch.float16)
        index, value = cllm_kernels.linear_argmax(torch.empty(4, 8), torch.empty(9, 8))
        assert index.shape == (4,) and value.dtype is torch.float32
    index, _ = cllm_kernels.row_argmax(torch.empty(2, 7, device="meta"))
    assert index.device.type == "meta" and index.shape == (2,)


def test_whoever_watches_torch_calls_sees_the_ops():
    """The eager fast path steps aside for modes, tracers and functional transforms."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    logits = torch.randn(3, 9)
    assert eager(logits)
    with Watch():
        assert not eager(logits)
        cllm_kernels.row_argmax(logits)
        cllm_kernels.jacobi_step(*jacobi_arguments())
    assert "cllm_kernels.row_argmax.default" in seen
    assert "cllm_kernels.jacobi_step.default" in seen

    functional = torch.func.functionalize(lambda x: cllm_kernels.row_argmax(x)[0])
    assert torch.equal(functional(logits), logits.argmax(-1))

    class Sub(torch.Tensor):
        pass

    assert not eager(logits.as_subclass(Sub))


def test_both_ways_of_telling_what_is_eager(monkeypatch):
    """With DLPack's exchange interface one native call tells, without it Python does."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sub(torch.Tensor):
        pass

    plain, parameter = torch.randn(3), torch.nn.Parameter(torch.randn(3))
    for tell in {eager, _common._eager}:
        assert tell(plain) and tell(parameter, plain)
        assert not tell(plain, plain.as_subclass(Sub))
        assert not tell(plain.to("meta"))
        with TorchDispatchMode():
            assert not tell(plain)
        with torch.device("cpu"):  # a function mode
            assert not tell(plain)
        assert tell(plain)


direct_only = pytest.mark.skipif(_common.DIRECT is None, reason="torch < 2.11 or no native module")


@direct_only
def test_the_direct_calls_are_taken(monkeypatch):
    """What fits is served by one native call: nothing of the long way is reached."""
    arguments = jacobi_arguments()
    logits = torch.randn(3, 5, 7)
    cllm_kernels.jacobi_step(*arguments)
    cllm_kernels.row_argmax(logits)  # both resolved now

    def fail(*_):
        raise AssertionError("the long way was taken")

    for module in (jacobi_module, row_module):
        monkeypatch.setattr(module.OP, "resolve", fail)
    assert cllm_kernels.jacobi_step(*jacobi_arguments()).tolist() == [3, 1]
    for view in (logits, logits[:, -2:], logits.transpose(0, 1), logits[0, 0], logits[:0]):
        index, value = cllm_kernels.row_argmax(view)
        assert torch.equal(index, view.argmax(-1)) and torch.equal(value, view.amax(-1))
    parameter = torch.nn.Parameter(logits)
    assert torch.equal(cllm_kernels.row_argmax(parameter)[0], logits.argmax(-1))
    with cllm_kernels.use_backend("reference"), pytest.raises(AssertionError, match="long way"):
        cllm_kernels.row_argmax(logits)


@direct_only
def test_the_direct_call_sees_tensors_as_they_are_now():
    """Nothing about a tensor is remembered: it may be resized or pointed elsewhere in between."""
    state = dict(zip(NAMES, jacobi_arguments(), strict=True))
    other = dict(zip(NAMES, jacobi_arguments(), strict=True))
    cllm_kernels.jacobi_step(**state)
    for name, tensor in state.items():
        tensor.set_(other[name])
    assert cllm_kernels.jacobi_step(**state).tolist() == [3, 1]
    assert torch.equal(other["output"], state["output"])
    state["window"].resize_(1, 3)
    with pytest.raises(ValueError, match=r"predictions must be \[1, 3\].*not \[2, 3\]"):
        cllm_kernels.jacobi_step(**state)
    logits = torch.randn(2, 9)
    assert torch.equal(cllm_kernels.row_argmax(logits)[0], logits.argmax(-1))
    logits.set_(torch.randn(5, 3))
    assert torch.equal(cllm_kernels.row_argmax(logits)[0], logits.argmax(-1))


@direct_only
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("window", lambda x: x.int()),
        ("window", lambda x: x.t().contiguous().t()),
        ("window", lambda x: x[:, :0]),
        ("predictions", lambda x: x[:, :2]),
        ("output", lambda x: x[:1]),
        ("lengths", lambda x: x[:, None]),
        ("generated", lambda x: x.float()),
        ("progress", lambda x: x.repeat(2)[::2]),
        ("done", lambda x: x.long()),
        ("limits", lambda x: x.to("meta")),
        ("stop_ids", lambda x: x[0]),
        ("fill", lambda x: x[:, :2]),
        ("fill", lambda x: x.to_sparse()),
    ],
)
def test_what_does_not_fit_is_explained_with_and_without_the_direct_call(monkeypatch, name, change):
    state = dict(zip(NAMES, jacobi_arguments(), strict=True))
    cllm_kernels.jacobi_step(**{k: v.clone() for k, v in state.items()})
    before = {k: v.clone() for k, v in state.items() if k != name}
    state[name] = change(state[name])
    messages = []
    for direct in (jacobi_module._direct, None):
        monkeypatch.setattr(jacobi_module, "_direct", direct)
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            cllm_kernels.jacobi_step(**state)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and name in messages[0]
    assert all(torch.equal(state[k], v) for k, v in before.items())


def test_the_long_way_gives_the_same(monkeypatch):
    arguments, logits = jacobi_arguments(), torch.randn(4, 6, 50)
    wanted = cllm_kernels.jacobi_step(*arguments), *cllm_kernels.row_argmax(logits[:, ::2])
    for module in (jacobi_module, row_module):
        monkeypatch.setattr(module, "_direct", None)
    again = jacobi_arguments()
    found = cllm_kernels.jacobi_step(*again), *cllm_kernels.row_argmax(logits[:, ::2])
    for a, b in zip((*wanted, *arguments), (*found, *again), strict=True):
        assert torch.equal(a, b)


def test_the_overhead_is_measured():
    if reason := missing_reason():
        pytest.skip(reason)
    script = Path(__file__).parents[2] / "benchmarks" / "kernels" / "overhead.py"
    done = subprocess.run(
        [sys.executable, str(script), "--rounds", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:]}
    assert set(rows) == {"jacobi_step", "row_argmax", "linear_argmax"}
    for numbers in rows.values():
        # which of two times of a busy machine is the longer says nothing
        call, native, outputs, _ = map(float, numbers)
        assert call > 0 and native > 0 and outputs >= 0


def test_negated_views_are_read_as_their_values():
    logits = torch.randn(3, 50)
    negated = torch._neg_view(logits)
    index, value = cllm_kernels.row_argmax(negated)
    assert torch.equal(index, (-logits).argmax(-1))
    assert torch.equal(value, (-logits).amax(-1))


def test_the_choice_of_a_backend():
    assert cllm_kernels.current_backend() == "auto"
    with cllm_kernels.use_backend("reference") as choice:
        assert cllm_kernels.current_backend() == choice.name == "reference"
        with cllm_kernels.use_backend("auto"):
            assert cllm_kernels.current_backend() == "auto"
        assert cllm_kernels.current_backend() == "reference"
    assert cllm_kernels.current_backend() == "auto"
    cllm_kernels.use_backend("reference")  # for good
    try:
        assert cllm_kernels.current_backend() == "reference"
    finally:
        cllm_kernels.use_backend("auto")


def test_an_unavailable_backend_is_an_error_not_a_fallback():
    with pytest.raises(
        cllm_kernels.BackendError, match="unknown backend 'fast'; choose one of auto"
    ):
        cllm_kernels.use_backend("fast")
    assert cllm_kernels.current_backend() == "auto"
    if not torch.cuda.is_available():
        with pytest.raises(cllm_kernels.BackendError, match="'cuda' is not available"):
            cllm_kernels.use_backend("cuda")
        if not interpreting():
            with pytest.raises(cllm_kernels.BackendError, match="no CUDA device"):
                cllm_kernels.use_backend("triton")
    # One that exists, but not for the tensors of the call.
    with pytest.raises(cllm_kernels.BackendError, match="backend 'cuda' cannot run on cpu tensors"):
        JACOBI_STEP.choose(torch.device("cpu"), "cuda")


def test_without_the_native_module_the_reference_runs(monkeypatch):
    monkeypatch.setattr("cllm_kernels._backend.missing_reason", lambda: "no compiler was found")
    assert JACOBI_STEP.choose(torch.device("cpu"), "auto") == "reference"
    with pytest.raises(cllm_kernels.BackendError, match="'cpp' is not available: no compiler"):
        cllm_kernels.use_backend("cpp")
    assert cllm_kernels.backends()["row_argmax"]["cpu"]["cpp"] == "no compiler was found"


def test_what_is_reported():
    report = cllm_kernels.backends()
    folders = {
        path.parent.name for path in Path(cllm_kernels.__file__).parent.glob("*/reference.py")
    }
    assert set(report) == folders
    for name, devices in report.items():
        assert set(devices) == {"cpu", "cuda"}
        for entry in devices.values():
            assert set(entry) == {*BACKENDS, "auto"}
        assert devices["cpu"]["reference"] is None
        native = "cpp" in registered()[name].implementations and not missing_reason()
        assert devices["cpu"]["auto"] == ("cpp" if native else "reference")
        assert devices["cpu"]["cuda"]  # a reason, whatever the machine
    info = cllm_kernels.build_info()
    assert info["loaded"] == (missing_reason() is None)
    for part in ("cpu", "cuda", "openmp"):
        assert info[part] or info[f"{part}_reason"], part


@pytest.mark.parametrize(
    ("value", "shown"),
    [("reference", "reference"), ("fast", "CLLM_KERNELS_BACKEND: unknown backend 'fast'")],
)
def test_the_environment_chooses_at_import(value, shown):
    done = subprocess.run(
        [sys.executable, "-c", "import cllm_kernels; print(cllm_kernels.current_backend())"],
        env=os.environ | {"CLLM_KERNELS_BACKEND": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown in (done.stdout if done.returncode == 0 else done.stderr)
    assert (done.returncode == 0) == (value == "reference")


def test_one_openmp_runtime_serves_torch_and_the_kernels():
    if reason := missing_reason():
        pytest.skip(reason)
    if not sys.platform.startswith("linux") or not cllm_kernels.build_info()["openmp"]:
        pytest.skip("only where OpenMP is built in, on Linux")
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(loaded) == 1, loaded


@pytest.mark.parametrize(
    "op", [op for op in registered().values() if "cuda" in op.implementations], ids=lambda o: o.name
)
def test_a_cuda_kernel_is_found_where_it_was_built(op):
    """By the name that the native module has it under, whether or not a GPU is here."""
    if not cllm_kernels.build_info()["cuda"]:
        pytest.skip("built without CUDA kernels")
    assert op.unavailable("cuda", torch.device("cuda")) is None
