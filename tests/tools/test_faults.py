"""A few tries of every attack of `mls bench faults`."""

import pytest

from mls.tools.bench.faults import Fault, faults_of, lost


@pytest.mark.long
@pytest.mark.parametrize("fault", faults_of(), ids=lambda fault: f"{fault.chapter}: {fault.words}")
def test_nothing_is_lost(fault: Fault) -> None:
    losses = lost(fault, range(fault.quick))
    assert not losses or fault.reason
