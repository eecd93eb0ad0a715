"""Patching is per instance, idempotent and leaves nothing behind."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import cllm

from .tiny_models import fresh_model, prompts, tiny_model

GREEDY = dict(max_new_tokens=20, do_sample=False)


def test_patch_and_remove():
    model, other = fresh_model(), fresh_model()
    inputs = prompts([6, 3])
    expected = model.generate(**inputs, **GREEDY)
    before = model.generate
    handle = cllm.patch(model, cllm.JacobiConfig(block_size=8))
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert isinstance(output, cllm.JacobiOutput)
    assert torch.equal(output.sequences, expected)
    assert "generate" not in other.__dict__
    handle.remove()
    assert model.generate == before and "generate" not in model.__dict__
    assert not any("cllm" in name for name in model.__dict__)
    handle.remove()
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_an_instance_attribute_is_restored_as_the_very_same_object():
    model = fresh_model()

    def own_generate(*args, **kwargs):
        return type(model).generate(model, *args, **kwargs)

    model.generate = own_generate
    handle = cllm.patch(model)
    assert torch.equal(
        model.generate(**prompts([4]), **GREEDY), own_generate(**prompts([4]), **GREEDY)
    )
    handle.remove()
    assert model.generate is own_generate


def test_patching_twice_replaces_the_settings():
    model = fresh_model()
    first = cllm.patch(model, cllm.JacobiConfig(block_size=4))
    second = cllm.patch(model, cllm.JacobiConfig(block_size=1))
    assert not first.active and second.active
    output = model.generate(**prompts([6]), **GREEDY, return_dict_in_generate=True)
    assert output.tokens_per_forward == 1.0
    first.remove()
    assert second.active
    second.remove()
    assert "generate" not in model.__dict__


def test_patched_scope_nests():
    model = fresh_model()
    with cllm.patched(model, cllm.JacobiConfig(block_size=2)):
        with cllm.patched(model, cllm.JacobiConfig(block_size=8)), pytest.raises(RuntimeError):
            raise RuntimeError
        output = model.generate(**prompts([6]), **GREEDY, return_dict_in_generate=True)
        assert isinstance(output, cllm.JacobiOutput)
    assert "generate" not in model.__dict__


def test_blocks_that_overlap():
    model = fresh_model()
    first, second = (cllm.patched(model, cllm.JacobiConfig(block_size=n)) for n in (2, 8))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    output = model.generate(**prompts([6]), **GREEDY, return_dict_in_generate=True)
    assert output.block_size == 8
    second.__exit__(None, None, None)
    assert "generate" not in model.__dict__


def test_a_patch_that_is_removed_or_replaced_inside_a_block():
    model = fresh_model()
    handle = cllm.patch(model, cllm.JacobiConfig(block_size=2))
    with cllm.patched(model, cllm.JacobiConfig(block_size=8)):
        handle.remove()
        cllm.patch(model, cllm.JacobiConfig(block_size=5))
        output = model.generate(**prompts([6]), **GREEDY, return_dict_in_generate=True)
        assert output.block_size == 5
    assert "generate" not in model.__dict__


def test_what_others_have_put_over_a_patch_stays():
    model, inputs = fresh_model(), prompts([6])
    handle = cllm.patch(model)
    ours, calls = model.generate, []

    def wrapper(*args, **kwargs):
        calls.append(args)
        return ours(*args, **kwargs)

    model.generate = wrapper
    handle.remove()
    assert model.generate is wrapper
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert calls and not isinstance(output, cllm.JacobiOutput)


def test_a_patch_over_a_wrapper_that_outlived_another():
    model, inputs = fresh_model(), prompts([6])
    expected = [model.generate(**inputs, **GREEDY, num_beams=n) for n in (1, 2)]
    handle = cllm.patch(model)
    ours = model.generate
    model.generate = wrapper = lambda *args, **kwargs: ours(*args, **kwargs)
    handle.remove()
    with cllm.patched(model, cllm.JacobiConfig(block_size=4)):
        output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        assert output.block_size == 4 and torch.equal(output.sequences, expected[0])
        with pytest.warns(UserWarning, match="goes to transformers' own generate"):
            beams = model.generate(**inputs, **GREEDY, num_beams=2)
        assert torch.equal(beams, expected[1])
    assert model.generate is wrapper


def test_a_kept_generate_of_a_removed_patch_is_what_it_hid():
    model = fresh_model()
    model.generate = own = lambda *args, **kwargs: "own"
    handle = cllm.patch(model)
    ours = model.generate
    handle.remove()
    assert model.generate is own and ours() == "own"


def test_copies_and_pickles_are_patched_for_themselves():
    model, inputs = fresh_model(), prompts([6])
    expected = model.generate(**inputs, **GREEDY)
    adapter = cllm.GatedAdapter.random(model, 2)
    cllm.patch(model, cllm.JacobiConfig(block_size=3), adapter=adapter)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = again.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        assert again.generate.__self__ is again and output.verify_size == 3
        assert torch.equal(output.sequences, expected)
        with cllm.patched(again, cllm.JacobiConfig(block_size=5)):
            pass
        cllm.patch(again).remove()
        assert "generate" not in again.__dict__ and "generate" in model.__dict__


def test_a_shallow_copy_is_patched_and_unpatched_apart_from_the_first():
    model, inputs = fresh_model(), prompts([6])
    expected = model.generate(**inputs, **GREEDY)
    handle = cllm.patch(model, cllm.JacobiConfig(block_size=3))
    again = copy.copy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(cllm.generate(again, **inputs, **GREEDY, block_size=2), expected)
    other = cllm.patch(again, cllm.JacobiConfig(block_size=5))
    assert again.generate.__self__ is again and model.generate.__self__ is model
    other.remove()
    assert "generate" not in again.__dict__ and handle.active
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert output.block_size == 3 and torch.equal(output.sequences, expected)


def right_padded(model):
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 7, 5]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def a_pad_inside(model):
    return {"input_ids": torch.tensor([[5, 0, 7, 9]])}


def doubles(model):
    model.double()
    return prompts([6])


def trained(model):
    model.train()
    return prompts([6])


def beams(model):
    return {**prompts([6]), "num_beams": 2, "block_size": 8, "generator": None, "row_ids": None}


def too_long(model):
    return {"input_ids": torch.full((1, 260), 5), "max_new_tokens": 3}


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return prompts([6])


OURS = {"block_size", "generator", "row_ids"}


@pytest.mark.parametrize(
    "given", [right_padded, a_pad_inside, doubles, trained, beams, too_long, offloaded]
)
def test_what_transformers_alone_takes_goes_to_it(given):
    model = fresh_model()
    inputs = GREEDY | given(model)
    plain = {name: value for name, value in inputs.items() if name not in OURS}
    expected = model.generate(**plain)
    with pytest.raises(cllm.UnsupportedOptionError) as error:
        cllm.generate(model, **inputs)
    assert "\n" not in str(error.value)
    with cllm.patched(model), pytest.warns(UserWarning, match="goes to transformers' own generate"):
        assert torch.equal(model.generate(**inputs), expected)


class Batches:
    """A streamer that takes several rows."""

    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.seen.append(None)


def test_a_streamer_of_batches_goes_to_transformers():
    model, inputs = fresh_model(), prompts([6, 3])
    expected, found = Batches(), Batches()
    text = model.generate(**inputs, **GREEDY, streamer=expected)
    with cllm.patched(model), pytest.warns(UserWarning, match="a streamer for 2 rows"):
        assert torch.equal(model.generate(**inputs, **GREEDY, streamer=found), text)
    assert found.seen == expected.seen


def test_an_option_is_warned_about_once_whatever_its_number():
    model = fresh_model()
    with cllm.patched(model), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for length in (257, 258):
            model.generate(input_ids=torch.full((1, length), 5), max_new_tokens=2, do_sample=False)
        for count in (2, 3):
            model.generate(**prompts([6]), max_new_tokens=2, do_sample=False, num_beams=count)
    said = [str(warning.message) for warning in warned]
    ours = [text.split(": ")[0] for text in said if "transformers' own generate" in text]
    assert [text.split("out ")[1] for text in ours] == ["a prompt of 257 tokens", "num_beams=2"]


def test_token_ids_of_32_bits():
    model, inputs = tiny_model("llama"), prompts([6, 3])
    expected = model.generate(**inputs, **GREEDY)
    inputs["input_ids"] = inputs["input_ids"].int()
    assert torch.equal(cllm.generate(model, **inputs, **GREEDY), expected)


def test_survives_to_saving_copying_and_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = fresh_model()
    inputs = prompts([6])
    expected = model.generate(**inputs, **GREEDY)
    cllm.patch(model)
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    unpatched = fresh_model()
    unpatched.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(unpatched.generate(**inputs, **GREEDY), expected)
    clone = copy.deepcopy(model)
    assert clone.generate.__self__ is clone
    assert torch.equal(clone.generate(**inputs, **GREEDY), expected)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wrapped.eval()
    output = wrapped.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert isinstance(output, cllm.JacobiOutput)
    cllm.patch(model).remove()
    adapted = wrapped.generate(**inputs, **GREEDY)
    assert torch.equal(output.sequences, adapted) and not torch.equal(adapted, expected)
    with cllm.patched(wrapped):
        assert torch.equal(wrapped.generate(**inputs, **GREEDY), adapted)
    assert torch.equal(cllm.generate(wrapped, **inputs, **GREEDY), adapted)


def test_huggingface_extension_point():
    model = tiny_model("qwen3")
    inputs = prompts([6, 2])
    expected = model.generate(**inputs, **GREEDY)
    found = model.generate(
        **inputs, **GREEDY, custom_generate=cllm.jacobi_decode, block_size=8, mode="block"
    )
    assert torch.equal(found, expected)


def test_generate_on_a_patched_model_uses_the_arguments_of_the_call():
    model = fresh_model()
    inputs = prompts([6])
    expected = model.generate(**inputs, **GREEDY)
    with cllm.patched(model, cllm.JacobiConfig(block_size=8)):
        output = cllm.generate(
            model, **inputs, **GREEDY, block_size=1, return_dict_in_generate=True
        )
        patched = model.generate(**inputs, **GREEDY, block_size=1, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected) and output.tokens_per_forward == 1.0
    assert torch.equal(patched.sequences, expected) and patched.tokens_per_forward == 1.0


UNSUPPORTED = {
    "sampled beams": dict(do_sample=True, num_beams=2),
    "beams": dict(num_beams=2, do_sample=False),
    "prompt lookup": dict(prompt_lookup_num_tokens=2, do_sample=False),
    "scores": dict(output_scores=True, return_dict_in_generate=True, do_sample=False),
}


@pytest.mark.parametrize("options", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_other_modes_raise_here_and_go_to_huggingface_when_patched(options):
    model = fresh_model()
    inputs = prompts([6])
    with pytest.raises(cllm.UnsupportedOptionError, match="Jacobi decoding cannot"):
        cllm.generate(model, **inputs, max_new_tokens=8, **options)
    torch.manual_seed(1)
    expected = model.generate(**inputs, max_new_tokens=8, **options)
    with cllm.patched(model):
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match="goes to transformers' own generate"):
            found = model.generate(**inputs, max_new_tokens=8, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.generate(**inputs, max_new_tokens=8, **options)
    first, second = (getattr(value, "sequences", value) for value in (found, expected))
    assert torch.equal(first, second)


def test_attention_of_the_model_is_as_before():
    model = fresh_model()
    cllm.generate(model, **prompts([6]), max_new_tokens=4)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="broken"):
        cllm.generate(
            model,
            **prompts([6]),
            max_new_tokens=4,
            logits_processor=[lambda ids, scores: (_ for _ in ()).throw(RuntimeError("broken"))],
        )
    assert model.config._attn_implementation == "sdpa"
