"""Collecting all blocks at once: the sequential definition's states, and decoding's."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm
from cllm.training.collect.block_parallel import collect_states, sample_blocks
from cllm.traits import UnsupportedModelError

from ...decoding.tiny_models import PAD, VOCAB, fresh_model, prompts, tiny_model
from .definition import block_states, greedy, guesses

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "mistral"]


@cache
def response_of(family: str, prompt: tuple[int, ...], tokens: int) -> list[int]:
    return greedy(tiny_model(family), list(prompt), tokens)


def texts(family, lengths, tokens, seed=0):
    """Random prompts of these lengths, and the model's responses of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    asked = [torch.randint(3, VOCAB, (size,), generator=generator).tolist() for size in lengths]
    answered = [
        response_of(family, tuple(prompt), count)
        for prompt, count in zip(asked, tokens, strict=True)
    ]
    return asked, answered


def states_of(collected):
    return [block.states for block in collected.example.blocks]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fill", ["prompt", "random", "pad"])
def test_states_are_the_definitions(family, fill):
    model = tiny_model(family)
    asked, answered = texts(family, (7, 3, 12), (23, 30, 9))
    found = collect_states(
        model, asked, answered, block_size=5, fill=fill, seed=3, pad_token_id=PAD
    )
    for entry, prompt, response in zip(found, asked, answered, strict=True):
        guess = guesses(prompt, len(response), fill, 3, VOCAB, PAD)
        assert states_of(entry) == block_states(model, prompt, response, 5, guess)
        assert entry.example.prompt == prompt and entry.example.response == response
        assert entry.mismatches == [] and entry.gaps == []
        assert max(block.iterations for block in entry.example.blocks) <= entry.forwards + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_states_towards_another_text(family):
    """A text that no tiny model would write: every token of it matters to what follows."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    draw = lambda size: torch.randint(3, VOCAB, (size,), generator=generator).tolist()  # noqa: E731
    asked, answered = [draw(9), draw(4)], [draw(33), draw(21)]
    found = collect_states(model, asked, answered, block_size=8, fill="random", seed=3)
    for entry, prompt, response in zip(found, asked, answered, strict=True):
        guess = guesses(prompt, len(response), "random", 3, VOCAB, PAD)
        expected = block_states(model, prompt, response, 8, guess, forced=True)
        assert states_of(entry) == expected
        # little is right by chance, so nearly every pass confirms one token
        assert all(block.iterations >= 6 for block in entry.example.blocks[:-1])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        logits = logits[len(prompt) - 1 : -1]
        own = logits.gather(1, torch.tensor(response)[:, None])[:, 0]
        gaps = logits.amax(dim=1) - own
        assert entry.mismatches == gaps.nonzero()[:, 0].tolist()
        assert entry.gaps == pytest.approx(gaps[gaps > 0].tolist(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("fill", ["prompt", "random", "pad", "last"])
def test_decoding_in_block_mode_takes_the_same_states(family, fill):
    model, n = tiny_model(family), 6
    inputs = prompts([11, 4])
    output = cllm.generate(
        model, **inputs, max_new_tokens=28, eos_token_id=None, mode="block", block_size=n,
        fill=fill, seed=5, record_trajectories=True, return_dict_in_generate=True,
    )  # fmt: skip
    asked = [trajectory.prompt for trajectory in output.trajectories]
    answered = [trajectory.tokens for trajectory in output.trajectories]
    found = collect_states(
        model, asked, answered, block_size=n, fill=fill, seed=5, pad_token_id=PAD
    )
    for entry, trajectory in zip(found, output.trajectories, strict=True):
        for start, block in zip(range(0, 28, n), entry.example.blocks, strict=True):
            passes = [item for item in trajectory.iterations if item.position == start]
            fed = [item.window[1:] for item in passes]
            if start + n <= 28:  # decoding's window is n wide to the end, and ends with the text
                assert block.iterations == len(passes)
                # a window begins with the token before the block, so its last guess is not fed
                states = [state[:-1] for state in block.states]
                assert fed == states[: len(fed)]
                assert len(states) - len(fed) in (0, 1)


@settings(max_examples=12)
@given(data=st.data())
def test_a_row_alone_and_in_any_batch(data):
    family = data.draw(st.sampled_from(["llama", "gpt2", "mistral"]))
    n = data.draw(st.sampled_from([1, 2, 5, 16, 40]))
    rows = data.draw(st.integers(1, 5))
    sizes = st.lists(st.integers(1, 20), min_size=rows, max_size=rows)
    lengths, tokens = data.draw(sizes), data.draw(sizes)
    model = tiny_model(family)
    asked, answered = texts(family, lengths, tokens, seed=data.draw(st.integers(0, 3)))
    ids = [f"row {row}" for row in range(rows)]
    together = collect_states(
        model, asked, answered, block_size=n, ids=ids, fill="random", seed=1,
        max_rows=data.draw(st.integers(1, 5)), max_tokens=data.draw(st.sampled_from([1, 60, 999])),
    )  # fmt: skip
    assert [entry.example.id for entry in together] == ids
    for entry, prompt, response in zip(together, asked, answered, strict=True):
        guess = guesses(prompt, len(response), "random", 1, VOCAB, PAD)
        assert states_of(entry) == block_states(model, prompt, response, n, guess)
        alone = collect_states(
            model, [prompt], [response], block_size=n, ids=[entry.example.id], fill="random", seed=1
        )[0]
        assert alone.example == entry.example


def test_some_blocks_of_a_response():
    model = tiny_model("llama")
    asked, answered = texts("llama", (7, 3), (23, 30))
    every = collect_states(model, asked, answered, block_size=5, fill="random")
    some = collect_states(
        model, asked, answered, block_size=5, fill="random", blocks=[[1, 4], [0, 2, 5]]
    )
    for entry, whole, wanted in zip(some, every, ([1, 4], [0, 2, 5]), strict=True):
        assert entry.example.block_index == wanted
        assert states_of(entry) == [states_of(whole)[block] for block in wanted]
        assert entry.example.block_start(1) == wanted[1] * 5


def test_sampled_blocks():
    drawn = {sample_blocks(250, 16, 0.25, seed=0, id=f"q{row}")[0] for row in range(200)}
    assert drawn <= set(range(13)) and len(drawn) > 6
    assert sample_blocks(250, 16, 0.25, seed=0, id="a") == sample_blocks(
        250, 16, 0.25, seed=0, id="a"
    )
    assert len(sample_blocks(250, 16, 0.25, seed=1, id="b")) == 4
    assert sample_blocks(250, 16, 1.0, seed=1, id="b") == list(range(16))
    assert sample_blocks(3, 16, 0.01, seed=1, id="b") == [0]
    assert sample_blocks(250, 16, 0.0, seed=1, id="b") == []
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], not -1"):
        sample_blocks(3, 16, -1, seed=1, id="b")


@pytest.mark.parametrize("fill", ["random", "last"])
def test_responses_alone(fill):
    """No block is wanted: the responses are read and checked, and nothing is iterated."""
    model = tiny_model("llama")
    asked, answered = texts("llama", (7, 3), (23, 30))
    answered[1][4] = (answered[1][4] + 1) % VOCAB or 3
    every = collect_states(model, asked, answered, block_size=5, fill=fill)
    found = collect_states(model, asked, answered, block_size=5, fill=fill, blocks=[[], []])
    some = collect_states(model, asked, answered, block_size=5, fill=fill, blocks=[[], [3]])
    for entry, whole in zip(found, every, strict=True):
        assert entry.example.blocks == [] == entry.example.block_index
        assert entry.example.response == whole.example.response
        assert entry.mismatches == whole.mismatches and entry.forwards == 0
    assert found[0].mismatches == [] and 4 in found[1].mismatches
    assert states_of(some[1]) == [states_of(every[1])[3]] and some[0].example.blocks == []


def test_less_is_fed_as_blocks_converge(monkeypatch):
    """Finished blocks and responses, and what is right already, are not forwarded again."""
    from cllm.training.collect.segments import SegmentForward

    fed = []
    whole = SegmentForward.segments

    def counted(self, tokens, segment, *rest):
        fed.append((tuple(tokens.shape), int((segment >= 0).sum())))
        return whole(self, tokens, segment, *rest)

    monkeypatch.setattr(SegmentForward, "segments", counted)
    model = tiny_model("llama")
    asked, answered = texts("llama", (7, 7, 7), (4, 16, 40))
    found = collect_states(model, asked, answered, block_size=8, fill="random")
    assert len(fed) == found[0].forwards
    for number, (shape, tokens) in enumerate(fed):
        blocks = [
            [block for block in entry.example.blocks if block.iterations - 1 > number]
            for entry in found
        ]
        wanted = [
            sum(len(block.fixed_point) - 1 - block.first_divergence[number] for block in row)
            for row in blocks
        ]
        assert tokens == sum(wanted)
        assert shape == (sum(count > 0 for count in wanted), max(wanted))
    assert fed[-1][0][0] < 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_end_at_the_response(dtype):
    """A near-tie may fall differently in a forward of another width, and nothing comes of it."""
    model = tiny_model("qwen2", dtype)
    asked = [[5, 6, 7, 8], [9, 10]]
    answered = [greedy(model, prompt, 30) for prompt in asked]
    for entry in collect_states(model, asked, answered, block_size=7, fill="random"):
        assert all(gap < 0.1 for gap in entry.gaps)
        for start, block in zip(range(0, 30, 7), entry.example.blocks, strict=True):
            assert block.fixed_point == entry.example.response[start : start + 7]
            first = block.first_divergence
            assert first == sorted(set(first)) and len(block.states) <= 8


def test_an_adapter_counts():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(fresh_model("llama"), config).eval()
    asked = [[5, 6, 7, 8]]
    answered = [greedy(model, asked[0], 20)]
    assert answered[0] != greedy(tiny_model("llama"), asked[0], 20)
    found = collect_states(model, asked, answered, block_size=5, fill="random", seed=4)[0]
    guess = guesses(asked[0], 20, "random", 4, VOCAB, PAD)
    assert states_of(found) == block_states(model, asked[0], answered[0], 5, guess)
    assert found.mismatches == []


def test_eager_attention():
    model = fresh_model("mistral")
    model.set_attn_implementation("eager")
    asked, answered = texts("mistral", (7, 12), (23, 30))
    found = collect_states(model, asked, answered, block_size=5, fill="random")
    expected = collect_states(tiny_model("mistral"), asked, answered, block_size=5, fill="random")
    assert [entry.example for entry in found] == [entry.example for entry in expected]


def call(**changes):
    arguments = dict(prompts=[[5, 6], [7]], responses=[[8, 9], [10]], block_size=4) | changes
    return collect_states(changes.pop("model", tiny_model("llama")), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[5], []]}, r"the prompt of row 1 \(id 1\) is empty"),
        ({"responses": [[], [5]], "ids": ["a", "b"]}, r"the response of row 0 \(id a\) is empty"),
        ({"responses": [[8], [VOCAB]]}, r"token id 97, outside the model's vocabulary of 97; was"),
        ({"prompts": [[5], [6] * 256]}, r"256 prompt and 1 response tokens, more than .* of 256;"),
        ({"responses": [[5]]}, "2 prompts but 1 responses"),
        ({"ids": ["a"]}, "2 prompts but 1 ids"),
        ({"block_size": 0}, "block_size must be an integer >= 1, not 0"),
        ({"max_rows": True}, "max_rows must be an integer >= 1, not True"),
        (
            {"blocks": [[0], [1]]},
            r"blocks of row 1 .* numbers from 0 to 0, not \[1\]",
        ),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_a_model_in_training_mode():
    with pytest.raises(ValueError, match=r"in training mode, .* call model.eval\(\) first"):
        collect_states(fresh_model("llama").train(), [[5]], [[6]], block_size=4)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bloom", "takes no position_ids, so its trajectories cannot"),
        ("falcon-alibi", "at several places of a text at once, as collecting does: ValueError"),
        ("gpt-neo", "gives other logits .* cannot be collected this way"),
    ],
)
def test_models_that_read_positions_off_the_keys_places(family, message):
    with pytest.raises(UnsupportedModelError, match=message):
        collect_states(tiny_model(family), [[5, 6, 7]], [[8, 9, 10]], block_size=2)
