from __future__ import annotations

import pytest

from cllm.training.arguments import ConsistencyTrainingArguments
from cllm.training.config import ConsistencyConfig


def arguments(tmp_path, **settings):
    return ConsistencyTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_every_field_of_the_loss_is_an_argument_with_its_default(tmp_path):
    assert arguments(tmp_path).consistency_config() == ConsistencyConfig()
    changed = {"teacher": "ema", "states": 3, "divergence": "jsd", "beta": 0.25, "ar_weight": 1}
    assert arguments(tmp_path, **changed).consistency_config() == ConsistencyConfig(**changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
        ({"states": 1.5}, "states must be an integer, not 1.5"),
        ({"bf16": "yes"}, "bf16 must be True or False, not 'yes'"),
        ({"lora_targets": 3}, "lora_targets must be text or a list, not 3"),
        ({"teacher": "nobody"}, "teacher must be one of 'self', 'base', 'ema'"),
        ({"ar_weight": -1.0}, "ar_weight must be 0 or more"),
        ({"lora_r": -1}, "lora_r must be at least 0"),
        ({"augment": 1.0}, r"augment must lie in \[0, 1\)"),
        ({"augment": 0.5, "consistency": "local"}, "augment needs consistency='global'"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\)"),
        ({"lora_alpha": 0}, "lora_alpha must be positive"),
        ({"merge_lora": True}, "merge_lora needs adapters to merge; set lora_r"),
        ({"row_tokens": 0}, "row_tokens must be at least 1"),
        ({"quality_patience": 0}, "quality_patience must be at least 1"),
        ({"max_nll_increase": -0.1}, "max_nll_increase must be at least 0"),
        ({"label_smoothing_factor": 0.1}, "use label_smoothing"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"load_best_model_at_end": True}, "leave load_best_model_at_end"),
        ({"train_sampling_strategy": "group_by_length"}, "must be 'random' or 'sequential'"),
    ],
)
def test_bad_values_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_all_problems_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"lora_r must .*; quality_patience must "):
        arguments(tmp_path, lora_r=-1, quality_patience=0)


def test_numbers_and_flags_that_transformers_takes(tmp_path):
    args = arguments(tmp_path, learning_rate=1, warmup_steps=2, logging_steps=5, max_grad_norm=0)
    assert args.learning_rate == 1 and args.max_grad_norm == 0
    assert args.report_to == [] and args.logging_nan_inf_filter is False
