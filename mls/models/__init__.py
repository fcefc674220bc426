"""Networks: the encoder pair of a run, and a backbone by itself for everybody else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mls import card as cards
from mls.config import AugmentConfig, ModelConfig
from mls.errors import CheckpointError, ConfigError, unknown_name
from mls.files import runs_folder
from mls.models import backbones, foreign, pretrained
from mls.models.backbones import Backbone
from mls.models.finite import refuse_non_finite
from mls.models.heads import projection_head
from mls.models.momentum import Encoder, EncoderPair, Precision
from mls.recipes import load_config
from mls.streams import initialisation

__all__ = [
    "Backbone",
    "Encoder",
    "EncoderPair",
    "Precision",
    "build_encoder",
    "build_pair",
    "card",
    "card_of",
    "card_of_name",
    "check_name",
    "extracted",
    "load_backbone",
    "published_name",
    "save_backbone",
    "untrained",
    "weights_file",
]
PREFIXES = ("random", "scratch", "timm", "torchvision")


def build_encoder(config: ModelConfig, seed: int, precision: Precision = "fp32") -> Encoder:
    """Backbone and projection head with the weights that the seed's `init` stream gives, or the backbone's from
    `model.weights`."""
    with initialisation(seed):
        backbone = backbones.build(config.backbone, config.drop_path)
        width = backbone.feature_dim
        head = projection_head(width, config.hidden or width, config.projection, config.head_norm)
    if config.weights:
        start_from(backbone, config.weights, config.backbone)
    if config.freeze_patches:
        backbones.freeze_patches(backbone, config.backbone)
    return Encoder(backbone, head, precision)


def build_pair(config: ModelConfig, seed: int, precision: Precision = "fp32") -> EncoderPair[Encoder]:
    """The query encoder and its copy, the key encoder."""
    return EncoderPair(build_encoder(config, seed, precision))


def start_from(backbone: nn.Module, weights: str, name: str) -> None:
    """`name` is the backbone's: what a file without a card holds, where its shapes do not tell (a transformer's)."""
    file = weights_file(weights)
    architecture = name if file is not None and cards.facts_of(file) is None else None
    try:
        loaded = load_backbone(weights, architecture)
        backbone.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ConfigError(f"model.weights={weights} does not fit model.backbone: {reason}") from None


def save_backbone(
    folder: Path,
    backbone: Backbone,
    card: dict[str, Any],
    augment: AugmentConfig,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """`backbone.safetensors` and `backbone.json`: all that a user of the weights has to know. `weights` may be a copy
    of the backbone's state: while it trains, its own changes."""
    from safetensors.torch import save

    weights = backbone.state_dict() if weights is None else weights
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    facts = {
        **card,
        "feature_dim": backbone.feature_dim,
        "input_size": augment.size,
        "mean": list(augment.mean),
        "std": list(augment.std),
    }
    cards.write(folder / "backbone.safetensors", save(state), facts)


def load_backbone(weights: str | Path, architecture: str | None = None, prefix: str | None = None) -> Backbone:
    """A backbone, in evaluation mode, with `.feature_dim`; one from a file also with `.card`, which says what its input
    is and where it comes from. `weights` says which, and where its weights come from:

    a run folder, a .safetensors file      what pretraining saved (a `.json` lies beside)
    any other checkpoint file              of MoCo, DenseCL, solo-learn, lightly, timm, ... (mls/models/foreign.py);
                                           `architecture` and `prefix` where they cannot be found in the file
    torchvision:NAME, torchvision:NAME@SET a classification network of torchvision with its published weights: the best
                                           set, or this one
    timm:NAME, timm:NAME.TAG               a network of timm with the weights published under this name
    random:NAME                            the same networks (random:resnet50, random:timm:NAME) and those of mls
                                           (random:resnet_tiny), randomly initialised; also NAME, where mls knows it

    >>> load_backbone("resnet_tiny").feature_dim
    128
    """
    path = weights_file(weights)
    backbone = (_by_name(str(weights)) if path is None else _from_file(path, architecture, prefix)).eval()
    refuse_non_finite(backbone, str(weights))
    return backbone


def _by_name(name: str) -> Backbone:
    prefix, _, rest = name.partition(":")
    if name in backbones.names():
        return backbones.build(name)
    check_name(name)
    if prefix == "timm":
        return backbones.timm_network(rest, published=True)
    if prefix == "random" and (rest in backbones.names() or rest.startswith("timm:")):
        return backbones.build(rest)
    if prefix in ("random", "scratch"):
        return pretrained.build(rest, None)
    network, _, published = rest.partition("@")
    return pretrained.build(network, published or "DEFAULT")


def _from_file(path: Path, architecture: str | None, prefix: str | None) -> Backbone:
    data, facts = cards.read(path) or (None, None)
    architecture = architecture or (facts or {}).get("architecture")
    _know(architecture, path.parent)
    found = foreign.find(foreign.read(path, data), path, architecture, prefix)
    backbone = backbones.build(found.architecture)
    backbone.load_state_dict(found.state)
    backbone.card = facts or _card_of(found, path)
    return backbone


def _know(architecture: str | None, folder: Path) -> None:
    """A backbone of a plug-in: the configuration of its run, in the same folder, says which. No code is imported for
    a backbone that is known without."""
    known = architecture is None or ":" in architecture or architecture in backbones.names()
    if not known and (folder / "config.yaml").is_file():
        load_config(folder / "config.yaml")


def weights_file(weights: str | Path) -> Path | None:
    """The file behind a run folder, a run's name under $MLS_RUNS, or a path; None for another name."""
    path = Path(weights).expanduser()
    if not path.exists() and ":" not in str(weights) and str(weights) not in backbones.names():
        run = runs_folder() / path
        path = run if (run / "config.yaml").is_file() else path
    if path.is_dir():
        path = path / "backbone.safetensors"
        if not path.is_file():
            raise CheckpointError(f"{path.parent} holds no backbone.safetensors: it is not a run, or saved nothing yet")
    return path if path.is_file() else None


def card(file: Path) -> dict[str, Any]:
    """What is known of the weights: architecture, input size, mean, std and where they come from. `save_backbone` wrote
    it beside them; of a checkpoint from elsewhere it is what the file shows, and the field's usual input."""
    return cards.facts_of(file) or _card_of(foreign.find(foreign.read(file), file), file)


def card_of(weights: str | Path) -> dict[str, Any] | None:
    """The card of any weights that have one: a run, a file, published weights of timm. None for other names."""
    if str(weights).startswith("timm:"):
        return backbones.timm_card(str(weights).removeprefix("timm:"))
    file = weights_file(weights)
    return None if file is None else card(file)


def card_of_name(name: str) -> dict[str, Any]:
    """What is known of the weights that have this name: of published ones their input, of others the field's usual."""
    full = published_name(name)
    network = full.removeprefix("random:").removeprefix("scratch:").removeprefix("torchvision:").partition("@")[0]
    network = network.partition(".")[0] if network.startswith("timm:") else network
    usual = AugmentConfig()
    facts = {"input_size": usual.size, "mean": list(usual.mean), "std": list(usual.std)}
    return facts | (card_of(full) or {}) | {"architecture": network, "origin": full}


def extracted(file: Path, data: bytes, architecture: str | None, prefix: str | None) -> tuple[bytes, dict[str, Any]]:
    """One network of a checkpoint from elsewhere, as a file that holds nothing else, and its card."""
    from safetensors.torch import save

    found = foreign.find(foreign.read(file, data), file, architecture, prefix)
    facts = (cards.facts_of(file) or {}) | _card_of(found, file)
    return save({name: tensor.contiguous() for name, tensor in found.state.items()}), facts


def published_name(weights: str) -> str:
    """With the set of weights that a name without one stands for, which is other weights in other versions.

    >>> published_name("torchvision:resnet50"), published_name("random:resnet50")
    ('torchvision:resnet50@IMAGENET1K_V2', 'random:resnet50')
    """
    prefix, _, rest = weights.partition(":")
    if prefix == "timm":
        return f"timm:{backbones.timm_name(rest)}"
    if prefix != "torchvision":
        return weights
    network, _, entry = rest.partition("@")
    return f"torchvision:{network}@{pretrained.published(network, entry or 'DEFAULT').name}"


def check_name(weights: str) -> None:
    """Whether there is such a network, and such a set of published weights; nothing is built or downloaded."""
    prefix, _, rest = weights.partition(":")
    if weights in backbones.names():
        return
    if not rest:
        raise unknown_name("weights (a run folder, a checkpoint file or a backbone)", weights, backbones.names())
    if prefix not in PREFIXES:
        raise unknown_name(f"kind of weights in {weights}", prefix, PREFIXES)
    if prefix in ("timm", "torchvision"):
        published_name(weights)
    elif rest.startswith("timm:"):
        backbones.timm_name(rest.removeprefix("timm:"))
    elif rest not in backbones.names():
        pretrained.check_network(rest)


def untrained(backbone: str) -> str:
    """The name of a protocol's backbone as random weights.

    >>> untrained("timm:convnext_atto"), untrained("torchvision:resnet50@IMAGENET1K_V1"), untrained("scratch:vgg11")
    ('random:timm:convnext_atto', 'random:resnet50', 'scratch:vgg11')
    """
    prefix, _, rest = backbone.partition(":")
    return {"timm": f"random:{backbone}", "torchvision": f"random:{rest.partition('@')[0]}"}.get(prefix, backbone)


def is_untrained(weights: str) -> bool:
    """Whether they are the initial weights of a network, and no file's or anybody's published ones."""
    return weights_file(weights) is None and not weights.startswith(("torchvision:", "timm:"))


def _card_of(found: foreign.Found, file: Path) -> dict[str, Any]:
    """The field's usual input; of a checkpoint of ours that of its run."""
    folder = file.absolute().parent
    ours = folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
    augment = load_config(folder.parent / "config.yaml").augment if ours else AugmentConfig()
    facts = {"architecture": found.architecture, "origin": str(found), "prefix": found.prefix}
    return {**facts, "input_size": augment.size, "mean": list(augment.mean), "std": list(augment.std)}
