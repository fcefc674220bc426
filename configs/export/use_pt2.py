"""A backbone as a program of torch.export, which needs torch alone. `mls export` fills in the capitals."""

from pathlib import Path

import torch

MEAN = (0.485, 0.456, 0.406)  # of RGB, from 0 to 1
STD = (0.229, 0.224, 0.225)
SIZE = 224  # of the images that it was trained on
SMALLEST = 64  # side of an image; None: images have SIZE and no other


def load():
    return torch.export.load(Path(__file__).with_name("backbone.pt2")).module()


def features(network, images):
    """[batch, dim], of uint8 RGB images [batch, 3, height, width]."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return network((images / 255 - mean) / std)
