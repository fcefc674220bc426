"""Shared by the tests of the supervised loop."""

from collections.abc import Callable

import pytest

from mls.errors import Stopped
from mls.eval.training import Training


@pytest.fixture
def train_until() -> Callable[[Training, int], None]:
    """Trains, and after so many steps a signal comes, as from a scheduler."""

    def train(training: Training, steps: int) -> None:
        train_step = training.train_step

        def step(*arguments: object) -> object:
            if training.step == steps:
                training.session.stop.exit_code = 75
            return train_step(*arguments)

        training.train_step = step  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            training.train(quiet=True)

    return train
