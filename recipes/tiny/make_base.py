"""Train a small byte-level language model on text of this repository.

A model that everybody can make in minutes, to try `cllm collect` and `cllm train` on. It learns its
text by heart, which is what so small a model can do in minutes without repeating itself. Beside it
lie prompts, the beginnings of passages: some to collect trajectories from, others to evaluate on.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = ("LICENSE",)  # changes least
CONTEXT = 512  # bytes that the model's positions allow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the model and the prompts")
    parser.add_argument("--texts", nargs="+", default=TEXTS, help="files to learn, from the root")
    parser.add_argument("--bytes", type=int, default=4000, help="how much of them")
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=8, help="passages a step")
    parser.add_argument("--passage", type=int, default=256, help="bytes of a passage")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=440, help="prompts to collect from")
    parser.add_argument("--held-out", type=int, default=48, help="prompts to evaluate on")
    parser.add_argument("--prompt-bytes", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    text = read(options.texts)[: options.bytes]
    # before the training: the text may be too short for so many
    count = options.prompts + options.held_out
    passages = beginnings(text, count, options.prompt_bytes, options.seed)
    tokenizer = byte_tokenizer()
    model = train(tokenizer, text, options)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    for name, rows in (
        ("held_out", passages[: options.held_out]),
        ("prompts", passages[options.held_out :]),
    ):
        lines = [json.dumps({"id": f"{name}-{i}", "prompt": row}) for i, row in enumerate(rows)]
        (options.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(patterns: list[str]) -> str:
    """The repository's files of these names, one behind the other; ASCII, one byte a character."""
    files = [file for pattern in patterns for file in sorted(REPOSITORY.glob(pattern))]
    if not files:
        raise SystemExit(f"no file of {REPOSITORY} is called {', '.join(patterns)}")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    # rules and indents are runs of one character: learned by heart, they teach repetition
    return re.sub(r"([^\w\n])\1{2,}", r"\1\1", text.encode("ascii", "ignore").decode("ascii"))


def byte_tokenizer() -> Any:
    """One token a byte, and an end-of-text token that also pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{byte: index for index, byte in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        model_max_length=CONTEXT,
        padding_side="left",
    )


def train(tokenizer: Any, text: str, options: argparse.Namespace) -> Any:
    """A Llama of a few layers, trained on random passages; returned in eval mode."""
    import transformers as hf
    from transformers.trainer_utils import set_seed

    set_seed(options.seed)
    end = tokenizer.eos_token_id
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 32,
            num_key_value_heads=options.hidden // 32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            eos_token_id=end,
            pad_token_id=end,
            bos_token_id=None,
        )
    )
    stream = torch.tensor(tokenizer(text)["input_ids"])
    passages = Passages(stream, options.passage, options.steps * options.batch_size, options.seed)
    trainer = hf.Trainer(
        model=model,
        args=hf.TrainingArguments(
            output_dir=str(options.output / "base-training"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            weight_decay=0.1,
            logging_steps=max(options.steps // 10, 1),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=options.seed,
        ),
        train_dataset=passages,
    )
    trainer.train()
    return model.eval()


class Passages(torch.utils.data.Dataset):
    """`count` passages of `length` bytes from random places of `stream` [N]."""

    def __init__(self, stream: torch.Tensor, length: int, count: int, seed: int):
        self.stream, self.length = stream, length
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(stream) - length, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.starts[index]
        passage = self.stream[start : start + self.length]
        return {"input_ids": passage, "labels": passage}


def beginnings(text: str, count: int, width: int, seed: int) -> list[str]:
    """The first `width` characters of `count` passages that start at words, in random order.

    Passages overlap where the text is short, but no two start at the same word.

    Raises:
        SystemExit: if the text has fewer words than that.
    """
    starts = [match.end() for match in re.finditer(r"\s(?=\w)", text[: -4 * width])]
    if len(starts) < count:
        raise SystemExit(f"the text has {len(starts)} words to start at, fewer than {count}")
    return [text[start : start + width] for start in random.Random(seed).sample(starts, count)]


if __name__ == "__main__":
    main()
