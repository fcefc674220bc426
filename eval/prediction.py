"""Predictions of what an evaluation has trained (classifier, probe, detector, segmenter) on any images. What is done is
kept, so that the same call goes on; images that cannot be read are named and left out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load as tensors_of
from torch import Tensor, nn

from mls import card
from mls.chunks import chunks
from mls.data import Source
from mls.data.listing import FileSource
from mls.data.sources import hash_of_images
from mls.data.unreadable import Unreadable, decoded, reason_of
from mls.distributed import start
from mls.errors import CheckpointError, ConfigError, Stopped
from mls.eval.boosted import BoostedClassifier
from mls.eval.classifier import build_classifier
from mls.eval.data import LabelledImages
from mls.eval.dense import pictures
from mls.eval.dense.coco_ap import detections_as_coco
from mls.eval.dense.detector import Detector
from mls.eval.dense.schema import Dense, Detection, FrozenDense
from mls.eval.dense.segmenter import Segmenter
from mls.eval.images import Batches
from mls.eval.protocol import AnyProtocol, Frozen, Supervised, load_protocol
from mls.eval.training import build_loss
from mls.eval.weights import check_weights, read
from mls.files import read_json, runs_folder, save_picture, write_atomically
from mls.frozen.features import cached_features
from mls.frozen.neighbours import read_again, source_from
from mls.models import load_backbone
from mls.progress import counting
from mls.signals import StopFlag

FILE = "classifier.safetensors"
BATCH, DENSE_BATCH = 64, 8  # images
BLOCK = 64  # rows of scores that are kept together
UNREADABLE = "unreadable"  # begins the line of an image that cannot be read, and says why


@dataclass(frozen=True)
class Predictions:
    """Of a classifier: one row for each image that could be read, of all images or of a batch."""

    paths: list[str]
    class_names: list[str]
    scores: Float[Tensor, "images classes"]


@dataclass(frozen=True)
class Kept:
    """What an evaluation kept: the tensors that were tested, its protocol, and the card beside them."""

    folder: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @classmethod
    def open(cls, named: str | Path) -> Kept:
        """The folder of an evaluation, or weights (a run, a file, a name) of which just one was kept."""
        folder = Path(named).expanduser()
        if (folder / "protocol.yaml").is_file() and not (folder / FILE).is_file():
            raise ConfigError(f"{folder} keeps no classifier: its task trains none, or it is not done")
        if not (folder / FILE).is_file():
            check_weights(str(named))
            folder = _trained_on(str(named))
        found = card.read(folder / FILE)
        if found is None:
            raise CheckpointError(f"{folder} keeps no class names (an earlier version): run its evaluation --again")
        kept = cls(folder, tensors_of(found[0]), found[1])
        if isinstance(kept.protocol, FrozenDense):
            raise ConfigError(
                f"{folder} classifies places of frozen maps, not images: `mls embed --dense` gives the maps"
            )
        return kept

    @cached_property
    def protocol(self) -> AnyProtocol:
        return load_protocol(self.folder / "protocol.yaml")

    @property
    def class_names(self) -> list[str]:
        return self.facts["classes"]


def _trained_on(weights: str) -> Path:
    """Of the evaluations in $MLS_RUNS the one that trained on these weights."""
    same = lambda other: (
        other == weights or (Path(other).exists() and os.path.realpath(other) == os.path.realpath(weights))
    )
    cards = sorted((runs_folder() / "eval").glob(f"*/{Path(FILE).with_suffix('.json')}"))
    found = [path.parent for path in cards if same(str(read_json(path, "evaluate again").get("weights")))]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{weights} has {len(found)} classifiers: name one of {', '.join(map(str, found[-3:]))}")
    raise ConfigError(
        f"{weights} has features and no classes: train a classifier on images with labels, `mls eval run linear "
        f"data.root=FOLDER --weights {weights}`, and give the folder that it prints"
    )


def predict(classifier: str | Path, images: str | Path | Source, quiet: bool = False) -> Predictions:
    """Scores of an evaluation's classifier, or of its probe: probabilities, as they were measured; a support vector
    machine's are its margins. `images`: anything that pretraining reads. After a stop the same call goes on.

    >>> predict("runs/eval/linear-seed0-d5df3119e8c5", "/data/new").scores  # doctest: +SKIP
    """
    scores = _Scores(classifier, images)
    rest = lambda first: scores.of(range(first, len(scores.source)))
    title = f"predictions for {scores.source.name}"
    found = cached_features(scores.facts(), len(scores.source), rest, title, quiet, BLOCK).features
    read_again(found, scores.of, scores.unreadable)
    return scores.named(range(len(found)), found)


def predict_batches(
    classifier: str | Path, images: str | Path | Source, quiet: bool = False
) -> Generator[Predictions, None, None]:
    """The same a batch at a time, each when it is asked for. Nothing is kept.

    >>> for batch in predict_batches("runs/eval/linear-seed0-d5df3119e8c5", "/data/new"):  # doctest: +SKIP
    ...     print(batch.paths, batch.scores.argmax(1))
    """
    scores = _Scores(classifier, images)
    count = len(scores.source)

    def batches() -> Generator[Predictions, None, None]:
        with counting(f"predictions for {scores.source.name}", count, not quiet) as progress:
            for part, found in zip(chunks(count, BATCH), scores.of(range(count)), strict=True):
                yield scores.named(range(count)[part], found)
                progress(part.stop)

    return batches()  # what is wrong is told before the first batch is asked for


class _Scores:
    """What a classifier says of the images of a source; those that cannot be read are noted."""

    def __init__(self, classifier: str | Path, images: str | Path | Source) -> None:
        self.kept, self.source = _opened(classifier, images)
        if isinstance(self.kept.protocol, Dense):
            raise ConfigError(
                f"{self.kept.folder} is of {self.kept.protocol.task}: name a folder with --out (Python: predict_dense)"
            )
        self.score, self.protocol = _scorer(self.kept)
        self.unreadable = _unreadable(self.kept, self.source)
        labelled = LabelledImages(self.source, torch.zeros(len(self.source), dtype=torch.int64), self.kept.class_names)
        self.batches = Batches(labelled, self.protocol, 0, start().device, self.unreadable)

    def facts(self) -> dict[str, Any]:
        """All that scores follow from."""
        crop = [self.protocol.augment.size, self.protocol.data.test_crop, self.protocol.data.test_resize]
        return {"classifier": self.kept.facts["sha256"], "images": hash_of_images(self.source), "crop": crop}

    @torch.no_grad()
    def of(self, ids: Sequence[int]) -> Generator[Float[Tensor, "batch classes"], None, None]:
        """A batch at a time; zeros for an image that cannot be read."""
        for numbers, views in self.batches.plain(torch.tensor(ids), BATCH):
            scores = self.score(views).float().cpu()
            scores[[number in self.unreadable.found for number in numbers.tolist()]] = 0
            yield scores

    def named(self, ids: Sequence[int], scores: Float[Tensor, "images classes"]) -> Predictions:
        """Of the images that can be read."""
        rows = self.unreadable.others(ids)
        paths = [self.source.describe(ids[row]) for row in rows]
        return Predictions(paths, self.kept.class_names, scores if len(rows) == len(ids) else scores[rows])


def _opened(classifier: str | Path, images: str | Path | Source) -> tuple[Kept, Source]:
    kept = Kept.open(classifier)
    return kept, source_from(str(images)) if isinstance(images, str | Path) else images


def _unreadable(kept: Kept, source: Source) -> Unreadable:
    """As many as its evaluation accepted."""
    return Unreadable(len(source), kept.protocol.data.max_unreadable)


def _scorer(kept: Kept) -> tuple[Callable[[Tensor], Tensor], Supervised | Frozen]:
    """Standardised images to scores, and the protocol with the statistics of the weights."""
    protocol, facts, device = kept.protocol, kept.facts, start().device
    assert isinstance(protocol, Supervised | Frozen)
    protocol = replace(protocol, augment=replace(protocol.augment, mean=tuple(facts["mean"]), std=tuple(facts["std"])))
    single = facts["single_label"]
    if isinstance(protocol, Supervised):
        loss = build_loss(protocol)
        head = "cosine" if loss.takes == "cosines" else "linear"
        network = build_classifier(f"random:{facts['architecture']}", len(kept.class_names), head)
        if protocol.training.boost != 1:
            network = BoostedClassifier(network, protocol.training.boost)
        own = lambda part: {key.removeprefix(part): one for key, one in kept.tensors.items() if key.startswith(part)}
        network.load_state_dict(own("classifier."))
        learnt = own("loss.")
        loss.load_state_dict({key: learnt[key] for key in loss.state_dict()})
        network, loss = network.to(device).eval(), loss.to(device)
        return lambda views: network(views).softmax(1) if single else loss.predict(network(views).float()), protocol
    backbone = _backbone(kept).to(device)
    weight, bias = (kept.tensors[name].to(device) for name in ("weight", "bias"))
    if protocol.task == "svm":  # of features of unit length; its scores are margins
        return lambda views: F.linear(F.normalize(backbone(views).float(), dim=1), weight, bias), protocol
    finish = _softmax if single else Tensor.sigmoid
    return lambda views: finish(F.linear(backbone(views).float(), weight, bias)), protocol


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(1)


def _backbone(kept: Kept) -> nn.Module:
    """That of a probe, which keeps its last layer alone."""
    weights, options = kept.facts["weights"], kept.facts.get("weights_options", {})  # not in earlier versions' cards
    found = read(weights, kept.protocol.model.backbone, **options, tensors=False)
    if found.name.startswith("random:"):
        raise ConfigError(f"{kept.folder} is a probe of {found.name}, a control that is not kept: use other weights")
    if found.hash != kept.facts["weights_hash"]:
        raise CheckpointError(f"{weights} holds other weights than {kept.folder} was trained on: evaluate it again")
    return load_backbone(weights, **options)


# ----------------------------------------------------------------------------------------------- objects and regions


def predict_dense(
    detector: str | Path, images: str | Path | Source, out: Path, draw: bool = True, quiet: bool = False
) -> int:
    """Writes into the folder `out` and returns the number of images. Of a detector: predictions.json in COCO's format,
    with a score for each annotation. Of a segmenter: masks/NAME.png with the number of each pixel's class, and
    classes.yaml. With `draw` pictures/NAME.png, too. After a stop the same call goes on."""
    kept, source = _opened(detector, images)
    if not isinstance(kept.protocol, Dense):
        raise ConfigError(f"{kept.folder} gives scores of classes: write them with --out preds.csv, or .parquet")
    network, count, unreadable = _network(kept), len(source), _unreadable(kept, source)
    identity = {"classifier": kept.facts["sha256"], "images": hash_of_images(source)}
    _begin(out, identity | {"pictures": draw})
    folder, found = _Folder(out, kept, _names(source), draw), out / "found.jsonl"
    done = _whole_batches(found, source, unreadable)
    with StopFlag() as stop, counting("predictions", count, not quiet, done) as progress, open(found, "ab") as lines:
        for part in chunks(count - done, DENSE_BATCH):
            batch = range(done, count)[part]
            pixels = decoded(source, batch, unreadable)
            seen = dict(zip(pixels, network.predict([*pixels.values()]) if pixels else [], strict=True))
            for number in batch:
                broken = {UNREADABLE: unreadable.found.get(number), "id": number}
                one = folder.write(number, pixels[number], seen[number]) if number in seen else broken
                lines.write(json.dumps(one).encode() + b"\n")
            lines.flush()
            progress(batch.stop)
            if stop.exit_code:
                words = f"a signal came: {batch.stop:,} of {count:,} images are done; the same command goes on"
                raise Stopped(words, stop.exit_code)
    if isinstance(kept.protocol, Detection):
        _write_coco(out / "predictions.json", found, kept.class_names)
    else:
        write_atomically(out / "classes.yaml", json.dumps({"names": kept.class_names}).encode() + b"\n")
    return len(unreadable.others(range(count)))


def _network(kept: Kept) -> Detector | Segmenter:
    protocol, facts = kept.protocol, kept.facts
    assert isinstance(protocol, Dense)
    if protocol.backend != "torchvision":
        raise ConfigError(f"{kept.folder} was trained by {protocol.backend}: predict with its own tools")
    kind = Detector if isinstance(protocol, Detection) else Segmenter
    backbone = load_backbone(f"random:{facts['architecture']}")
    network = kind(backbone, protocol, len(kept.class_names), facts["mean"], facts["std"])  # type: ignore[arg-type]
    network.load_state_dict(kept.tensors)
    return network.to(start().device).eval()


def _begin(out: Path, identity: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file = out / "predict.json"
    if not file.is_file():
        if any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no predictions: choose another --out")
        write_atomically(file, json.dumps(identity).encode())
    elif read_json(file, "choose another --out") != identity:
        raise ConfigError(
            f"{out} holds predictions of another network, of other images or with other pictures: choose another --out"
        )


def _names(source: Source) -> list[str]:
    """What the source calls each image."""
    if not isinstance(source, FileSource):
        return [f"{number:09d}" for number in range(len(source))]
    return [os.fsdecode(os.path.normpath(path)) for path in source.relative_paths]


def _below(number: int, name: str) -> str:
    """A path below a folder of files about images: that of the image, unless it lies elsewhere.

    >>> _below(7, "street/a.jpg"), _below(7, "/data/a.jpg"), _below(7, "../a.jpg")
    ('street/a.jpg', '000000007-a.jpg', '000000007-a.jpg')
    """
    inside = not os.path.isabs(name) and name.split(os.sep)[0] != os.pardir
    return name if inside else f"{number:09d}-{os.path.basename(name)}"


def _whole_batches(file: Path, source: Source, unreadable: Unreadable) -> int:
    """How many images are done, and which of them cannot be read. A batch that a kill has torn is cut off: what is
    found in an image may depend, in the last bits, on those beside it. So is all from the batch on in which an image
    could not be read that can be read now."""
    if not file.is_file():
        return 0
    ends, broken = [0], list[tuple[int, str]]()
    with open(file, "rb") as lines:
        for line in (line for line in lines if line.endswith(b"\n")):
            if line.startswith(b'{"%s"' % UNREADABLE.encode()):
                broken.append((len(ends) - 1, json.loads(line)[UNREADABLE]))
            ends.append(ends[-1] + len(line))
    done = next((number for number, _ in broken if reason_of(source, number) is None), len(ends) - 1)
    done -= done % DENSE_BATCH if done < len(source) else 0
    os.truncate(file, ends[done])
    unreadable.note(one for one in broken if one[0] < done)
    return done


@dataclass
class _Folder:
    """What is written of each image."""

    out: Path
    kept: Kept
    names: list[str]
    draw: bool

    def __post_init__(self) -> None:
        places = [_below(number, name) for number, name in enumerate(self.names)]
        stems = [os.path.splitext(place)[0] for place in places]
        self.stems = stems if len(set(stems)) == len(stems) else places  # a.jpg beside a.png

    def write(self, number: int, image: Tensor, one: Any) -> dict[str, Any]:
        """Its line in found.jsonl."""
        line = {"id": number, "file_name": self.names[number], "height": image.shape[1], "width": image.shape[2]}
        protocol, stem, names = self.kept.protocol, self.stems[number], self.kept.class_names
        if isinstance(protocol, Detection):
            line["found"] = [_entry(entry) for entry in detections_as_coco([one], protocol.model.masks)]
            drawn = pictures.with_boxes(image, one, names) if self.draw else None
        else:
            save_picture(Image.fromarray(one.numpy().astype(np.uint8)), self.out / "masks" / f"{stem}.png")
            drawn = pictures.painted(image, one) if self.draw else None
        if drawn is not None:
            save_picture(drawn, self.out / "pictures" / f"{stem}.png")
        return line


def _entry(found: dict[str, Any]) -> dict[str, Any]:
    """An annotation that json can hold."""
    from faster_coco_eval import mask

    if (shape := found.get("segmentation")) is None:
        return found | {"area": found["bbox"][2] * found["bbox"][3]}
    return found | {"area": float(mask.area(shape)), "segmentation": shape | {"counts": shape["counts"].decode()}}


def _write_coco(file: Path, found: Path, class_names: Sequence[str]) -> None:
    """An instances file: images and annotations count from 1, each annotation has its score."""
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    seen = (line for line in _lines(found) if UNREADABLE not in line)
    for number, line in enumerate(seen, start=1):
        annotations += [
            one | {"id": len(annotations) + place, "image_id": number, "iscrowd": 0}
            for place, one in enumerate(line.pop("found"), start=1)
        ]
        images.append(line | {"id": number})
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_atomically(file, json.dumps(content).encode())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, "rb") as lines:
        yield from map(json.loads, lines)
