import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mls.streams import derive, generator, uniforms


@given(st.integers(0, 2**62), st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(1, 9))
def test_a_draw_depends_on_its_own_id_alone(seed: int, ids: list[int], count: int) -> None:
    together = uniforms(seed, np.array(ids), count)
    alone = np.concatenate([uniforms(seed, np.array([i]), count) for i in ids])
    assert (together == alone).all()
    assert ((together >= 0) & (together < 1)).all()


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = uniforms(derive(0, "test"), np.arange(20_000), 4)
    assert np.abs(draws.mean(0) - 0.5).max() < 0.01
    assert np.abs(draws.var(0) - 1 / 12).max() < 0.002
    correlations = np.corrcoef(np.hstack([draws[:-1], draws[1:]]).T) - np.eye(8)
    assert np.abs(correlations).max() < 0.03


def test_purposes_and_seeds_have_streams_of_their_own() -> None:
    seeds = {derive(s, purpose, e) for s in range(5) for purpose in ("order", "view") for e in range(5)}
    assert len(seeds) == 50
    first, again = torch.rand(4, generator=generator(1, "a")), torch.rand(4, generator=generator(1, "a"))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.rand(4, generator=generator(1, "b")))
