"""The dictionary against a deque: whatever is enqueued, in whatever portions, saved and loaded in between."""

import io
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mls.core.dictionary import Dictionary
from mls.errors import CheckpointError, ConfigError

FEATURES, PROJECTION = 3, 2


def keys(first: int, batch: int) -> dict[str, torch.Tensor]:
    """Keys that tell which they are in every field."""
    ids = torch.arange(first, first + batch)
    return {
        "backbone": ids[:, None] + torch.tensor([0.1, 0.2, 0.3]),
        "projection": ids[:, None] + torch.tensor([0.4, 0.5]),
        "ids": ids,
        "boxes": ids[:, None] + torch.tensor([0.6, 0.7, 0.8, 0.9]),
    }


def oldest_first(dictionary: Dictionary) -> dict[str, torch.Tensor]:
    """rows() begins at slot 0; once the ring is full the oldest row is where the next write goes."""
    head = dictionary.state_dict()["head"] if len(dictionary) == dictionary.capacity else 0
    return {name: rows.roll(-head, dims=0) for name, rows in vars(dictionary.rows()).items()}


def reloaded(dictionary: Dictionary) -> Dictionary:
    file = io.BytesIO()
    torch.save(dictionary.state_dict(), file)
    file.seek(0)
    copy = Dictionary(dictionary.capacity, backbone=FEATURES, projection=PROJECTION)
    copy.load_state_dict(torch.load(file, weights_only=True))
    return copy


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(1, 9),
    portions=st.lists(st.tuples(st.integers(0, 25), st.booleans()), max_size=12),
)
def test_dictionary_holds_what_a_deque_of_its_size_holds(size: int, portions: list[tuple[int, bool]]) -> None:
    dictionary, model, written = Dictionary(size, backbone=FEATURES, projection=PROJECTION), deque(maxlen=size), 0
    for number, (batch, save_and_load) in enumerate(portions, start=1):
        new = keys(written, batch)
        dictionary.enqueue(**new)
        model.extend((*(new[name][i].tolist() for name in new), number) for i in range(batch))
        written += batch
        if save_and_load:
            dictionary = reloaded(dictionary)
        rows = oldest_first(dictionary)
        found = zip(*(rows[name].tolist() for name in ("backbone", "projection", "ids", "boxes", "ages")), strict=True)
        assert list(found) == list(model)
        assert len(dictionary) == dictionary.filled == len(model)
        assert dictionary.count == number


def test_enqueue_writes_in_place_without_new_memory() -> None:
    dictionary = Dictionary(4, backbone=FEATURES, projection=PROJECTION)
    dictionary.enqueue(**keys(0, 4))
    before = dictionary.rows()
    dictionary.enqueue(**keys(4, 3))
    after = dictionary.rows()
    assert [t.data_ptr() for t in vars(before).values()] == [t.data_ptr() for t in vars(after).values()]
    assert before.ids.tolist() == [4, 5, 6, 3]


def test_saved_state_does_not_change_while_training_goes_on() -> None:
    dictionary = Dictionary(4, backbone=FEATURES, projection=PROJECTION)
    dictionary.enqueue(**keys(0, 4))
    state = dictionary.state_dict()
    dictionary.enqueue(**keys(10, 4))
    assert state["ids"].tolist() == [0, 1, 2, 3]
    assert torch.equal(state["projection"], keys(0, 4)["projection"])


def test_loading_does_not_tie_the_dictionary_to_the_loaded_tensors() -> None:
    source = Dictionary(4, backbone=FEATURES, projection=PROJECTION)
    source.enqueue(**keys(0, 3))
    state = source.state_dict()
    copy = Dictionary(4, backbone=FEATURES, projection=PROJECTION)
    copy.load_state_dict(state)
    copy.enqueue(**keys(50, 4))
    assert state["ids"].tolist() == [0, 1, 2, -1]


def test_rows_are_float32_and_stored_unnormalised_whatever_precision_they_come_in() -> None:
    dictionary = Dictionary(2, backbone=FEATURES, projection=PROJECTION)
    new = keys(7, 1) | {"backbone": torch.tensor([[4.0, 8.0, 16.0]], dtype=torch.bfloat16)}
    dictionary.enqueue(**new)
    rows = dictionary.rows()
    assert rows.backbone.dtype == rows.projection.dtype == torch.float32
    assert rows.backbone.tolist() == [[4.0, 8.0, 16.0]]


def test_keys_with_gradient_leave_no_graph_behind() -> None:
    dictionary = Dictionary(2, backbone=FEATURES, projection=PROJECTION)
    new = keys(0, 2)
    dictionary.enqueue(new["backbone"].requires_grad_(), new["projection"].requires_grad_(), new["ids"])
    assert not dictionary.rows().backbone.requires_grad
    assert not dictionary.rows().projection.requires_grad


def test_boxes_that_were_not_given_are_nan() -> None:
    dictionary = Dictionary(3, backbone=FEATURES, projection=PROJECTION)
    dictionary.enqueue(**keys(0, 2))
    dictionary.enqueue(**{name: value for name, value in keys(2, 2).items() if name != "boxes"})
    assert dictionary.rows().boxes.isnan().all(dim=1).tolist() == [True, False, True]


def test_an_enqueue_between_forward_and_backward_is_refused() -> None:
    dictionary = Dictionary(4, backbone=FEATURES, projection=PROJECTION)
    dictionary.enqueue(**keys(0, 4))
    query = torch.randn(2, PROJECTION, requires_grad=True)
    loss = (query @ dictionary.rows().projection.T).sum()
    dictionary.enqueue(**keys(4, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dictionary_is_invisible_to_a_module_that_holds_it() -> None:
    module = torch.nn.Linear(2, 2)
    module.dictionary = Dictionary(4, backbone=FEATURES, projection=PROJECTION)  # type: ignore[assignment]
    assert [name for name, _ in module.named_buffers()] == []
    assert set(module.state_dict()) == {"weight", "bias"}


def test_moving_keeps_the_rows() -> None:
    dictionary = Dictionary(3, backbone=FEATURES, projection=PROJECTION)
    dictionary.enqueue(**keys(0, 2))
    assert dictionary.to("cpu") is dictionary
    assert dictionary.rows().ids.tolist() == [0, 1]
    assert dictionary.to("meta").rows().backbone.device.type == "meta"


@pytest.mark.parametrize(
    ("size", "backbone", "projection", "fix"),
    [(8, 3, 2, "dictionary.size"), (4, 5, 2, "model.backbone"), (4, 3, 6, "model.projection")],
)
def test_loading_into_another_shape_names_the_key_to_change(
    size: int, backbone: int, projection: int, fix: str
) -> None:
    saved = Dictionary(4, backbone=3, projection=2).state_dict()
    other = Dictionary(size, backbone=backbone, projection=projection)
    with pytest.raises(CheckpointError, match=fix):
        other.load_state_dict(saved)
    assert len(other) == other.count == 0


def test_loading_half_a_state_says_what_is_missing() -> None:
    state = Dictionary(4, backbone=3, projection=2).state_dict()
    del state["head"]
    with pytest.raises(CheckpointError, match="lacks head"):
        Dictionary(4, backbone=3, projection=2).load_state_dict(state)


def test_keys_of_another_width_are_refused_and_change_nothing() -> None:
    dictionary = Dictionary(4, backbone=FEATURES, projection=PROJECTION)
    with pytest.raises(ValueError, match="backbone of shape 2 x 1, this dictionary takes 2 x 3"):
        dictionary.enqueue(torch.zeros(2, 1), torch.zeros(2, PROJECTION), torch.arange(2))
    with pytest.raises(ValueError, match="projection of shape 2 x 1"):
        dictionary.enqueue(torch.zeros(2, FEATURES), torch.zeros(2, 1), torch.arange(2))
    assert len(dictionary) == dictionary.count == 0


def test_a_dictionary_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dictionary\.size"):
        Dictionary(0, backbone=FEATURES, projection=PROJECTION)


@pytest.mark.parametrize(("storage", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_rows_in_half_precision_are_the_nearest_numbers_and_take_half_the_memory(
    storage: str, dtype: torch.dtype
) -> None:
    dictionary = Dictionary(4, backbone=FEATURES, projection=PROJECTION, storage=storage)
    dictionary.enqueue(**keys(0, 3))
    rows = dictionary.rows()
    assert rows.backbone.dtype == rows.projection.dtype == dtype
    assert torch.equal(rows.backbone, keys(0, 3)["backbone"].to(dtype))
    assert rows.backbone.nbytes == 3 * FEATURES * 2
    copy = Dictionary(4, backbone=FEATURES, projection=PROJECTION, storage=storage)
    copy.load_state_dict(dictionary.state_dict())
    assert torch.equal(copy.rows().projection, rows.projection)
