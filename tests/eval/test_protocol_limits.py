"""Limits stand on the fields of the protocols, and hold for every task."""

import pytest

from mls.errors import ConfigError
from mls.eval.protocol import load_protocol


@pytest.mark.parametrize(
    ("protocol", "override", "sentence"),
    [
        ("linear", "probe.l2=[]", "probe.l2 is empty: give one or more values"),
        ("linear", "probe.l2=[0.1,0]", "probe.l2 is 0.0: it must be greater than 0"),
        ("svm_voc07", "probe.folds=1", "probe.folds is 1: it must be at least 2"),
        ("linear", "data.validation=2", "data.validation is 2.0: it must lie between 0 and 1"),
        ("finetune", "training.mixup=-1", "training.mixup is -1.0: it must be at least 0"),
        ("finetune", "training.layer_decay=1.5", "training.layer_decay is 1.5: it must be at most 1"),
        ("coco_fpn_1x", "model.anchors=[8,0,32,64]", "model.anchors is 0: it must be greater than 0"),
        ("cityscapes_fcn", "data.crop=[0,512]", "data.crop is 0: it must be greater than 0"),
        ("cityscapes_fcn", "seeds=0", "seeds is 0: it must be greater than 0"),
    ],
)
def test_a_value_beyond_its_limit_is_refused_as_the_protocol_is_read(
    protocol: str, override: str, sentence: str
) -> None:
    load_protocol(protocol)
    with pytest.raises(ConfigError) as error:
        load_protocol(protocol, [override])
    assert str(error.value) == sentence


def test_lists_with_limits_are_not_shared_between_protocols() -> None:
    first, second = load_protocol("linear"), load_protocol("linear")
    first.probe.l2.append(7.0)
    assert 7.0 not in second.probe.l2
