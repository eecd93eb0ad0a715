"""Builds cllm_kernels._C: C++ for the CPU, CUDA C++ where nvcc is found, neither needing libtorch.

The build never stands in the way of an installation: with no compiler the package installs without
_C and runs on its reference backend; with no nvcc it has no CUDA kernels. What was built, and why
something was not, goes into cllm_kernels/_build_info.json (`cllm_kernels.build_info()` reads it).

Environment:
  CLLM_KERNELS_FORCE_BUILD=1  any failure to build is an error (a missing nvcc is none)
  CLLM_KERNELS_SKIP_CUDA=1    leave the CUDA kernels out even where nvcc is found
  CC, CXX, CFLAGS, CXXFLAGS   as for any setuptools build;  CUDA_HOME: where the CUDA toolkit lies
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
INFO_FILE = "_build_info.json"
# sm_80 and sm_90 always; newer ones where this toolkit knows them. The newest also goes in as PTX,
# so that a GPU younger than the toolkit can still compile it.
CUDA_ARCHS_WANTED = ("80", "90", "100", "120")
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # A fused multiply-add would round differently on machines that have one: results should not
    # depend on the instruction set that was picked at run time.
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
]


# Translation units for one instruction set; they are entered only after asking the CPU for it.
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512bf16": [
        *("-mavx512bf16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        "-mprefer-vector-width=512",
    ],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"],
}


class BuildFailure(Exception):
    """A build step that did not work, with the reason in one line for people."""


def enabled(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def reason(command: str, stderr: str) -> str:
    """The line of a compiler's output that says most, shortened."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return f"{command}: {telling[0][:300]}" if telling else f"{command} failed without a message"


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildFailure(f"{command[0]} could not be run ({error.strerror or error})") from error
    if done.returncode != 0:
        raise BuildFailure(reason(Path(command[0]).name, done.stderr or done.stdout))
    if done.stderr.strip():
        sys.stderr.write(done.stderr)


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (candidate := Path(home) / "bin" / "nvcc").is_file():
            return str(candidate)
    return shutil.which("nvcc")


def cuda_library_folder(nvcc: str) -> Path:
    """Where libcudart_static.a lies; nvcc itself knows its toolkit, even behind a wrapper."""
    shown = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    homes = [line.split("TOP=", 1)[1] for line in shown.stderr.splitlines() if "TOP=" in line]
    for home in [*map(Path, homes), Path(os.path.realpath(nvcc)).parent.parent]:
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (home / folder / "libcudart_static.a").is_file():
                return (home / folder).resolve()
    raise BuildFailure(f"libcudart_static.a was not found beside {nvcc}")


def cuda_arch_flags(nvcc: str) -> tuple[list[str], list[str]]:
    """The -gencode flags for this toolkit, and the architectures they name."""
    try:
        listed = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildFailure(f"nvcc --list-gpu-arch failed ({error})") from error
    archs = [arch for arch in CUDA_ARCHS_WANTED if f"compute_{arch}" in listed]
    if not archs:
        raise BuildFailure(f"this nvcc knows none of sm_{', sm_'.join(CUDA_ARCHS_WANTED)}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return flags, [f"sm_{arch}" for arch in archs]


class BuildNative(build_ext):
    """Compiles the translation units in parallel, tolerates what is missing, and says so."""

    def build_extension(self, ext: Extension) -> None:
        info: dict[str, object] = {"cpu": False, "openmp": False, "cuda": False, "cuda_archs": []}
        info["cpu_reason"] = info["openmp_reason"] = info["cuda_reason"] = None
        try:
            self._build(ext, info)
        except BuildFailure as failure:
            if enabled("CLLM_KERNELS_FORCE_BUILD"):
                raise SystemExit(f"error: CLLM_KERNELS_FORCE_BUILD is set and {failure}") from None
            info.update(cpu=False, openmp=False, cuda=False, cuda_archs=[])
            info["cpu_reason"] = str(failure)
            info["cuda_reason"] = info["cuda_reason"] or "the native module was not built"
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            sys.stderr.write(f"cllm-kernels: installing without the native module: {failure}\n")
        self._write_info(info)

    def _build(self, ext: Extension, info: dict[str, object]) -> None:
        if self.compiler.compiler_type != "unix":
            raise BuildFailure("the native module needs gcc or clang on Linux or macOS")
        try:
            import pybind11
        except ImportError as error:
            raise BuildFailure("pybind11 is not installed") from error
        self._temp = Path(self.build_temp).resolve()
        self._temp.mkdir(parents=True, exist_ok=True)
        self._cxx = list(
            getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        )
        if cxx := os.environ.get("CXX"):
            self._cxx = shlex.split(cxx) + self._cxx[1:]
        # Python's own -g would make the module ten times larger than its code.
        self._cxx = [flag for flag in self._cxx if flag not in ("-g", "-Wstrict-prototypes")]
        self._cxx += CXX_FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        self._include = [
            f"-I{ROOT / 'csrc'}",
            f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_path('include')}",
            f"-I{sysconfig.get_path('platinclude')}",
        ]
        self._probe_compiler()
        openmp = self._probe_openmp(info)
        cuda = self._cuda_setup(info)
        cpu_sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if cuda else []
        with ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1)) as pool:
            # bindings.cpp takes longest, so it starts first. It is compiled for the hoped-for case.
            bindings = pool.submit(
                self._compile, ROOT / "csrc" / "bindings.cpp", openmp, bool(cuda)
            )
            device = [pool.submit(self._compile_cuda, source, cuda) for source in cuda_sources]
            host = [pool.submit(self._compile, source, openmp, False) for source in cpu_sources]
            objects = [job.result() for job in host]
            bindings_object = bindings.result()
            try:
                cuda_objects = [job.result() for job in device]
            except BuildFailure as failure:
                cuda = self._without_cuda(info, failure)
        if cuda:
            try:
                self._link(ext, [bindings_object, *objects, *cuda_objects], openmp, cuda)
                info.update(cuda=True, cuda_archs=cuda["archs"])
            except BuildFailure as failure:
                cuda = self._without_cuda(info, failure)
        if not cuda:
            if cuda_sources:
                bindings_object = self._compile(ROOT / "csrc" / "bindings.cpp", openmp, False)
            self._link(ext, [bindings_object, *objects], openmp, None)
        info["cpu"] = True
        info["compiler"] = " ".join(self._cxx[:1])

    def _probe_compiler(self) -> None:
        source = self._temp / "probe.cpp"
        source.write_text("#include <Python.h>\n#include <vector>\nint main() { return 0; }\n")
        run([*self._cxx, *self._include, "-c", str(source), "-o", str(self._temp / "probe.o")])

    def _probe_openmp(self, info: dict[str, object]) -> bool:
        """True if the compiler has OpenMP; without it the kernels run on one thread.

        torch's Linux wheels bring a libgomp whose SONAME is libgomp.so.1, the very name that gcc
        links to: once torch is imported (cllm_kernels does so before _C), the dynamic loader hands
        _C that same library, so both share one pool of threads.
        """
        source = self._temp / "probe_openmp.cpp"
        source.write_text(
            '#include <omp.h>\nextern "C" int f() { return omp_get_max_threads(); }\n'
        )
        try:
            run(
                [
                    *self._cxx,
                    "-fopenmp",
                    "-shared",
                    str(source),
                    "-o",
                    str(source.with_suffix(".so")),
                ]
            )
        except BuildFailure as failure:
            info["openmp_reason"] = str(failure)
            return False
        info["openmp"] = True
        return True

    def _cuda_setup(self, info: dict[str, object]) -> dict | None:
        if enabled("CLLM_KERNELS_SKIP_CUDA"):
            info["cuda_reason"] = "CLLM_KERNELS_SKIP_CUDA was set when the package was built"
            return None
        nvcc = find_nvcc()
        if nvcc is None:
            info["cuda_reason"] = "nvcc was not found (neither on PATH nor under CUDA_HOME)"
            return None
        try:
            flags, archs = cuda_arch_flags(nvcc)
            return {"nvcc": nvcc, "flags": flags, "archs": archs, "lib": cuda_library_folder(nvcc)}
        except BuildFailure as failure:
            return self._without_cuda(info, failure)

    def _without_cuda(self, info: dict[str, object], failure: BuildFailure) -> None:
        if enabled("CLLM_KERNELS_FORCE_BUILD"):
            raise failure
        info.update(cuda=False, cuda_archs=[], cuda_reason=str(failure))
        sys.stderr.write(f"cllm-kernels: building without CUDA kernels: {failure}\n")

    def _compile(self, source: Path, openmp: bool, cuda: bool) -> Path:
        target = self._temp / (source.stem + ".cpu.o")
        flags = [*(["-fopenmp"] if openmp else []), *(["-DCLLM_WITH_CUDA"] if cuda else [])]
        if platform.machine().lower() in ("x86_64", "amd64"):
            for suffix, isa_flags in ISA_FLAGS.items():
                flags += isa_flags if source.stem.endswith(suffix) else []
        run([*self._cxx, *flags, *self._include, "-c", str(source), "-o", str(target)])
        return target

    def _compile_cuda(self, source: Path, cuda: dict) -> Path:
        target = self._temp / (source.stem + ".cuda.o")
        host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
        command = [cuda["nvcc"], "-c", "-O3", "-std=c++17", "--threads", "2", *host, *cuda["flags"]]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
        run([*command, str(source), "-o", str(target)])
        return target

    def _link(self, ext: Extension, objects: list[Path], openmp: bool, cuda: dict | None) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        linker = list(
            self.compiler.linker_so_cxx if hasattr(self.compiler, "linker_so_cxx") else []
        )
        linker = linker or list(self.compiler.linker_so)
        linker[0] = self._cxx[0]
        libraries = ["-fopenmp"] if openmp else []
        if cuda:
            # cudart is linked in: the module then imports on machines without any CUDA library.
            libraries += [f"-L{cuda['lib']}", "-lcudart_static", "-ldl", "-lpthread"]
            libraries += ["-lrt"] if sys.platform.startswith("linux") else []
        run([*linker, *map(str, objects), *libraries, "-o", str(target)])

    def _write_info(self, info: dict[str, object]) -> None:
        package = Path(self.build_lib).resolve() / "cllm_kernels"
        package.mkdir(parents=True, exist_ok=True)
        (package / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Editable installations: the module and the record of the build go beside the sources."""
        for ext in self.extensions:
            # A module of an earlier build must not outlive a build that made none.
            if not (Path(self.build_lib) / self.get_ext_filename(ext.name)).exists():
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        built = Path(self.build_lib).resolve() / "cllm_kernels" / INFO_FILE
        shutil.copyfile(built, ROOT / "cllm_kernels" / INFO_FILE)


setup(
    # optional=True: setuptools then accepts an extension that was not built.
    ext_modules=[Extension("cllm_kernels._C", ["csrc/bindings.cpp"], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
