"""When the windows that an adapter visits are drawn anew, and when they move."""

from __future__ import annotations

import torch

from cllm.training.examples import TrainingExample
from cllm.training.visited import VisitedWindows, Window

from .test_visited import RUN, examples_of, text_of


def predictions_for(example: TrainingExample, windows: list[Window]) -> list[int]:
    return [7] * sum(len(window.rows(text_of(example))) for window in windows)


def test_a_draw_is_of_the_state_as_it_is():
    """Draws are kept until they are advanced; none may outlive what it was drawn from."""
    example, other = examples_of([1, 2], list(range(20, 60))), examples_of([3, 4], [9] * 40)

    def fresh():
        return VisitedWindows(2, 3, 5, seed=1)

    store = fresh()
    first = store.draw(example, 0, 0)
    # another epoch, another response or another index in between changes no draw
    for between in ((example, 1, 0), (other, 0, 0), (example, 0, 1)):
        assert store.draw(*between) == fresh().draw(*between) != first
    assert store.draw(example, 0, 0) == first
    # advancing the windows of one epoch does not take those that were drawn last, of another
    plain, predictions = fresh(), predictions_for(example, first)
    plain.advance(example, 0, 0, predictions)
    store.draw(example, 1, 0)
    store.advance(example, 0, 0, predictions)
    for name, value in plain.state().items():
        assert torch.equal(store.state()[name], value)
    text = text_of(example)
    places = [window.start + window.kept(text) for window in first]
    assert [window.start for window in store.draw(example, 0, 0)] == places
    # nor does a draw outlive a restored state
    store.restore(fresh().state())
    assert store.draw(example, 0, 0) == first
    assert store.last_drawn(1) is example


def test_draws_that_are_never_advanced_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("cllm.training.visited._KEPT_DRAWS", 4)
    store = VisitedWindows(9, 2, 4)
    example = examples_of([1, 2], list(range(20, 40)))
    drawn = [store.draw(example, 0, index) for index in range(9)]
    assert [index for index in range(9) if store.last_drawn(index)] == [5, 6, 7, 8]
    for index in range(9):
        store.advance(example, 0, index, predictions_for(example, drawn[index]))
        assert store.last_drawn(index) is None


def test_windows_move_once_the_backward_pass_is_on_its_way(make_trainer, monkeypatch):
    settings = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    trainer = make_trainer(**{**RUN, **settings, "max_steps": 2})
    compute, advance = trainer.compute_loss, trainer.examples.advance
    backward = trainer.accelerator.backward
    calls, given = [], []

    def computed(model, inputs, *args, **kwargs):
        given.append(inputs["row_numbers"])
        # a loss that is not trained on moves nothing
        with torch.no_grad():
            compute(model, {**inputs, "row_numbers": torch.full_like(given[-1], -1)})
        return compute(model, inputs, *args, **kwargs)

    def backwards(*args, **kwargs):
        calls.append("backward")
        backward(*args, **kwargs)

    def advanced(numbers, predictions):
        assert torch.equal(numbers, given[-1]) and numbers.shape == predictions.shape
        calls.append("advance")
        advance(numbers, predictions)

    monkeypatch.setattr(trainer, "compute_loss", computed)
    monkeypatch.setattr(trainer.accelerator, "backward", backwards)
    monkeypatch.setattr(trainer.examples, "advance", advanced)
    trainer.train()
    assert len(given) == 4  # three micro-batches, and the last one of the epoch
    assert calls == ["backward", "advance"] * 4
