"""A resume where images came or went: a number in a checkpoint never names another image."""

from pathlib import Path

import pytest
import torch

from mls.core.dictionary import EMPTY
from mls.core.matching import Matches
from mls.core.neighbour_lists import NeighbourLists
from mls.data.listing import FileSource
from mls.engine.images import accept_other_images, hash_of_names, hash_of_some, keep_names
from mls.errors import CheckpointError

BEFORE = [b"b.jpg", b"c.jpg", b"d \n.jpg"]


def state_of(source: FileSource) -> dict:
    memory = {"ids": torch.tensor([2, 0, EMPTY, EMPTY]), "filled": 2, "head": 2}
    return {
        "images": len(source),
        "names": hash_of_names(source),
        "unreadable": [(1, "c")],
        "method": {"_extra_state": {"dictionary": memory}},
    }


def kept(run: Path) -> dict:
    source = FileSource("folder", Path("/old"), BEFORE)
    keep_names(run, source)
    return state_of(source)


def test_the_same_names_in_another_folder_are_the_same_images(tmp_path: Path) -> None:
    other = FileSource("other", Path("/new"), BEFORE)
    assert accept_other_images(tmp_path, kept(tmp_path), other, False) == ""
    known = hash_of_some(FileSource("folder", Path("/old"), BEFORE), torch.tensor([2, 0]))
    assert known == hash_of_some(other, torch.tensor([2, 0])) != hash_of_some(other, torch.tensor([2, 1]))


def test_other_names_are_refused_with_what_changed_even_where_their_number_is_the_same(tmp_path: Path) -> None:
    other = FileSource("folder", Path("/old"), [b"a.jpg", b"b.jpg", b"d \n.jpg"])
    told = r"1 are gone \(c.jpg\) and 1 are new \(a.jpg\): give the same images, or .*--accept-data`"
    with pytest.raises(CheckpointError, match=told):
        accept_other_images(tmp_path, kept(tmp_path), other, False)


def test_accepted_numbers_are_mapped_by_name(tmp_path: Path) -> None:
    state = kept(tmp_path)
    other = FileSource("folder", Path("/old"), [b"a.jpg", b"b.jpg", b"d \n.jpg"])
    assert "mapped by name" in accept_other_images(tmp_path, state, other, True)
    memory = state["method"]["_extra_state"]["dictionary"]
    assert memory["ids"].tolist() == [2, 1, EMPTY, EMPTY]
    assert state["unreadable"] == []


def test_a_dictionary_with_images_that_are_gone_starts_empty(tmp_path: Path) -> None:
    state = kept(tmp_path)
    assert "starts empty" in accept_other_images(tmp_path, state, FileSource("f", Path("/old"), BEFORE[1:]), True)
    memory = state["method"]["_extra_state"]["dictionary"]
    assert (memory["filled"], memory["head"], memory["ids"].tolist()) == (0, 0, [EMPTY] * 4)


def test_lists_of_neighbours_are_not_mapped(tmp_path: Path) -> None:
    state, lists = kept(tmp_path), NeighbourLists.of(Matches(torch.zeros(3, 1).long(), torch.ones(3, 1)), {})
    state["method"]["_extra_state"]["neighbours"] = {"identity": lists.identity, **lists.tensors}
    with pytest.raises(CheckpointError, match="numbers in the run's neighbours cannot be mapped by name: start a new"):
        accept_other_images(tmp_path, state, FileSource("f", Path("/old"), BEFORE[1:]), True)


def test_without_names_only_the_number_is_compared(tmp_path: Path) -> None:
    state = kept(tmp_path) | {"names": None}
    assert accept_other_images(tmp_path, state, FileSource("f", Path("/x"), [b"1", b"2", b"3"]), False) == ""
    for accept in (False, True):
        with pytest.raises(CheckpointError, match="start a new run"):
            accept_other_images(tmp_path, state, FileSource("f", Path("/x"), [b"1"]), accept)
