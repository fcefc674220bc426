"""How good are frozen features? A linear probe and kNN on the embedded scenes, or on your own images and backbone:

python examples/linear_probe.py
python examples/linear_probe.py --weights runs/mls_coco_r50-… --data cub200
python examples/linear_probe.py --weights torchvision:resnet50 --data /path/to/folders
"""

import argparse

import torch

import mls
import mls.eval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="resnet_tiny", help="a run, a file, torchvision:NAME, a backbone")
    parser.add_argument("--data", default="scenes", help="a data set's name, or a folder of class folders")
    arguments = parser.parse_args()

    torch.manual_seed(0)  # a backbone's name alone means random weights
    backbone = mls.load_backbone(arguments.weights)
    train = mls.eval.extract(backbone, arguments.data, "train")
    test = mls.eval.extract(backbone, arguments.data, "test")

    probe = mls.eval.linear_probe(train.features, train.labels, test.features, test.labels)
    votes = mls.eval.knn(train.features, train.labels, test.features, test.labels)

    print(f"images: {len(train.features)}")
    print(f"dim: {train.features.shape[1]}")
    assert probe.value is not None  # it is, where the test images have labels
    print(f"linear_{probe.metric}: {100 * probe.value:.2f}")
    for k, value in votes.values.items():
        print(f"knn_{votes.metric}_k{k}: {100 * value:.2f}")


if __name__ == "__main__":
    main()
