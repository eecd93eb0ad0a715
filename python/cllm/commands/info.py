"""``cllm info``: versions, devices, backends, the build, the cache."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from .common import diagnostics, write_json
from .options import DebugOption

_PACKAGES = ("cllm-kernels", "torch", "triton", "transformers")


def versions() -> dict[str, str | None]:
    """Version of Python and of each package, None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if found["cllm-kernels"] is None:
        # run from a checkout that was never installed
        from .. import __version__

        found["cllm-kernels"] = __version__
    return found


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: DebugOption = False,
) -> int:
    """Show versions, devices, backends, what was built, and where the default model is."""
    with diagnostics().status("looking around"):
        facts = _facts()
    if as_json:
        write_json(facts)
    else:
        _print(facts)
    return 0


def _facts() -> dict[str, Any]:
    import torch

    import cllm_kernels

    from .. import default_model

    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                }
            )
    folder = default_model.model_folder()
    problem = default_model.damage(folder)
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "devices": devices,
        "cuda": None if torch.cuda.is_available() else _no_cuda(torch),
        "backends": cllm_kernels.backends(),
        "build": cllm_kernels.build_info(),
        "cache": str(default_model.cache_root()),
        "default_model": {
            "name": default_model.NAME,
            "folder": str(folder),
            "ready": problem is None,
            "reason": problem,
            "source": _source(default_model),
        },
    }


def _no_cuda(torch: Any) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return "torch was built with CUDA but finds no device"


def _source(default_model: Any) -> str:
    """Where the default model's weights come from, or how to get them."""
    try:
        return str(default_model.find_gguf())
    except default_model.ModelError as error:
        return str(error)


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen = Console(file=sys.stdout, highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, *values: str) -> None:
        for index, value in enumerate(values):
            table.add_row(name if index == 0 else "", Text(value))

    add(
        "versions", ", ".join(f"{name} {value or '-'}" for name, value in facts["versions"].items())
    )
    add("platform", facts["platform"])
    add("devices", *(_device_line(device) for device in facts["devices"]))
    if facts["cuda"]:
        add("", f"no cuda: {facts['cuda']}")
    for op, places in facts["backends"].items():
        add(op, *(line for device in places for line in _backend_lines(device, places[device])))
    add("built", *_build_lines(facts["build"]))
    add("cache", facts["cache"])
    model = facts["default_model"]
    state = "ready" if model["ready"] else f"not ready: {model['reason']}"
    add("default model", f"{model['name']}, {state}", f"from {model['source']}")
    screen.print(table)


def _device_line(device: dict[str, Any]) -> str:
    line = f"{device['device']}: {device['name']}"
    if "threads" in device:
        line += f", {device['threads']} threads"
    if "memory_gib" in device:
        line += f", compute capability {device['capability']}, {device['memory_gib']} GiB"
    return line


def _backend_lines(device: str, choices: dict[str, str | None]) -> list[str]:
    """One line for a device: what runs, then each that does not and why."""
    chosen = choices.get("auto")
    reasons = {name: why for name, why in choices.items() if name != "auto"}
    usable = [name for name, why in reasons.items() if why is None]
    if not usable:
        return [f"{device}: nothing, {next(iter(reasons.values()), 'no backend is known')}"]
    lines = [f"{device}: {chosen}" + (f" (of {', '.join(usable)})" if len(usable) > 1 else "")]
    lines += [f"  not {name}: {why}" for name, why in reasons.items() if why is not None]
    return lines


def _build_lines(build: dict[str, Any]) -> list[str]:
    lines = []
    for part, label in (("cpu", "C++ kernels"), ("openmp", "OpenMP"), ("cuda", "CUDA kernels")):
        if build.get(part):
            detail = {"cpu": build.get("isa"), "cuda": ", ".join(build.get("cuda_archs") or [])}
            extra = detail.get(part)
            lines.append(f"{label}: yes" + (f" ({extra})" if extra else ""))
        else:
            lines.append(f"{label}: no, {build.get(f'{part}_reason') or 'no reason was recorded'}")
    if build.get("compiler"):
        lines.append(f"compiler: {build['compiler']}")
    if build.get("cpu") and not build.get("loaded"):
        lines.append(f"not loaded: {build.get('cpu_reason') or 'no reason was recorded'}")
    return lines
