"""The stand-in for mmcv's compiled operators: PSAMask equals loops over the positions, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mls.frameworks import installed as frameworks
from mls.frameworks.mmcv_lite import Operators, psamask_backward, psamask_forward


def looped(x: Tensor, psa_type: int, mask: tuple[int, int]) -> Tensor:
    """As mmcv's C++ has it: position i has a weight for every position j in the window around it."""
    n, _, height, width = x.shape
    half = (mask[0] - 1) // 2, (mask[1] - 1) // 2
    out = x.new_zeros(n, height * width, height * width)
    for h in range(height):
        for w in range(width):
            for a in range(max(0, half[0] - h), min(mask[0], height + half[0] - h)):
                for b in range(max(0, half[1] - w), min(mask[1], width + half[1] - w)):
                    i, j = h * width + w, (a + h - half[0]) * width + b + w - half[1]
                    place = (j, i) if psa_type == 0 else (i, j)
                    out[:, place[0], place[1]] = x[:, a * mask[1] + b, h, w]
    return out.view(n, height * width, height, width)


odd = st.integers(0, 4).map(lambda half: 2 * half + 1)


@settings(max_examples=25)
@given(st.sampled_from([0, 1]), st.tuples(odd, odd), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_psamask_equals_a_loop_forward_and_backward(
    psa_type: int, mask: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, mask[0] * mask[1], *size, dtype=torch.float64, requires_grad=True)
    wanted = looped(x, psa_type, mask)
    sizes = {"num_": 2, "h_feature": size[0], "w_feature": size[1], "h_mask": mask[0], "w_mask": mask[1]}
    sizes |= {"half_h_mask": (mask[0] - 1) // 2, "half_w_mask": (mask[1] - 1) // 2}
    got = torch.empty_like(wanted)
    psamask_forward(x.detach(), got, psa_type=psa_type, **sizes)
    assert torch.equal(got, wanted)
    gradient = torch.randn_like(wanted)
    wanted.backward(gradient)
    given_back = torch.empty_like(x)
    psamask_backward(gradient, given_back, psa_type=psa_type, **sizes)
    assert torch.equal(given_back, x.grad)


@pytest.mark.parametrize("kind", ["collect", "distribute"])
def test_mmcvs_own_layer_uses_it(kind: str) -> None:
    if frameworks.missing("mmseg"):
        pytest.skip('mmsegmentation is not installed: pip install "mls[mmseg]"')
    frameworks.load("mmseg")
    from mmcv.ops import PSAMask

    x = torch.randn(2, 15, 4, 6, requires_grad=True)
    out = PSAMask(kind, (5, 3))(x)
    wanted = looped(x.detach(), int(kind == "distribute"), (5, 3))
    assert torch.equal(out, wanted)
    out.square().sum().backward()
    assert torch.equal(x.grad.nonzero(), (x.grad * x.detach()).nonzero())
    torch.testing.assert_close((x.grad * x.detach()).sum(), 2 * wanted.square().sum())


def test_any_other_operator_says_what_to_install_when_it_is_called() -> None:
    with pytest.raises(NotImplementedError, match="mmcv's nms is compiled code, .*: install mmcv instead"):
        Operators().nms(1, threshold=2)
