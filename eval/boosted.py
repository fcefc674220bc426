"""BoostLU: a classifier whose positive class activations are boosted. It goes with any loss; the paper's is LL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mls.eval.classifier import Classifier, last_map


class BoostedClassifier(Classifier):
    """ "Bridging the Gap between Model Explanations in Partially Annotated Multi-label Classification"
    (https://arxiv.org/abs/2304.01804), as its released code (youngwk/BridgeGapExplanationPAMC) has it: a network
    that is trained from few of the positives attributes too little to where they are, so

        logit of class c = mean over positions of (boost a if a > 0 else a),   a = <weight_c, map> + bias_c

    in training and in the test. With boost 1 this is the linear classifier on the mean of the map. The released code's
    boost is 5.

    >>> from mls.eval.classifier import build_classifier
    >>> plain, images = build_classifier("random:resnet_tiny", classes=3), torch.rand(2, 3, 32, 32)
    >>> torch.allclose(BoostedClassifier(plain, boost=1.0).eval()(images), plain(images), atol=1e-5)
    True
    """

    def __init__(self, classifier: Classifier, boost: float) -> None:
        super().__init__(classifier.backbone, classifier.head)
        self.boost = boost

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        maps = last_map(self.backbone, images)
        attributed = F.conv2d(maps, self.head.weight[:, :, None, None], self.head.bias)
        return torch.where(attributed > 0, self.boost * attributed, attributed).mean((2, 3))
