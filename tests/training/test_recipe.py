from __future__ import annotations

import pytest

from cllm.training.recipe import RecipeError, read_recipe

KNOWN = ("model", "seed", "learning_rate", "max_steps", "trajectories", "output")


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_sections_share_what_stands_beside_them(tmp_path):
    path = recipe(
        tmp_path,
        "model: base\nseed: 1\ncollect:\n  limit: 3\ntrain:\n  learning-rate: 1e-5\n  seed: 2\n",
    )
    assert read_recipe(path, "train", KNOWN) == {
        "model": "base",
        "seed": 2,
        "learning_rate": 1e-5,
    }
    assert read_recipe(path, "collect", ("model", "limit")) == {"model": "base", "limit": 3}


def test_a_file_without_sections_is_the_commands_own(tmp_path):
    path = recipe(tmp_path, "trajectories: [a, b]\nmax_steps: 5\n")
    assert read_recipe(path, "train", KNOWN) == {"trajectories": ["a", "b"], "max_steps": 5}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("2E4", 2e4), ("+1.5e3", 1500.0), ("1e5x", "1e5x"), ("'1e-5'", "1e-5")],
)
def test_numbers(tmp_path, text, value):
    found = read_recipe(recipe(tmp_path, f"learning_rate: {text}\n"), "train", KNOWN)
    assert found == {"learning_rate": value} and type(found["learning_rate"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1\n", "unknown setting 'lerning_rate'; did you mean 'learning_rate'"),
        ("train:\n  max_step: 1\n", "section train: unknown setting 'max_step'; did you mean"),
        ("zzz: 1\n", "unknown setting 'zzz'$"),
        ("trian:\n  seed: 1\ncollect: {}\n", "unknown setting 'trian'; did you mean 'train'"),
        ("collect: {}\n", "has no section 'train'"),
        ("train: 5\n", "the section 'train' holds no settings"),
        ("seed: 1\nseed: 2\n", "line 2: the setting 'seed' is there twice"),
        ("max-steps: 1\nmax_steps: 2\n", "the setting 'max_steps' is there twice"),
        ("a: [1\n", "not YAML"),
        ("- 1\n", "holds no settings"),
        ("", "holds no settings"),
        ("1: 2\n", "the key 1 is not a name"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe(tmp_path, text), "train", KNOWN)


def test_a_recipe_that_is_not_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"seed: \xff\n")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe(path, "train", KNOWN)
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "nowhere.yaml", "train", KNOWN)
