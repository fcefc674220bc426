"""A backbone in ONNX, which needs onnxruntime and numpy. `mls export` fills in the capitals."""

from pathlib import Path

import numpy as np
import onnxruntime

MEAN = (0.485, 0.456, 0.406)  # of RGB, from 0 to 1
STD = (0.229, 0.224, 0.225)
SIZE = 224  # of the images that it was trained on
SMALLEST = 64  # side of an image; None: images have SIZE and no other


def load():
    return onnxruntime.InferenceSession(Path(__file__).with_name("backbone.onnx"), providers=["CPUExecutionProvider"])


def features(network, images):
    """[batch, dim], of uint8 RGB images [batch, 3, height, width]."""
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return network.run(["features"], {"images": (images.astype(np.float32) / 255 - mean) / std})[0]
