"""Catalogue rows as timm models: `{backbone}_{attention}.{tag}`, registered on import."""

import difflib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from tamzoo.attention import ATTENTIONS
from tamzoo.backbones import BasicBlock, Bottleneck, ResNet
from tamzoo.catalogue import BACKBONES, ENTRIES, Backbone, Entry
from tamzoo.checkpoint import (
    check_finite,
    check_fit,
    check_weights_file,
    load_weights,
    model_arguments,
    told_entry,
)
from tamzoo.datasets import DATASETS, Dataset
from tamzoo.hub import fetch_weights
from tamzoo.paper import PAPER_TITLE
from tamzoo.wide_resnet import PreActBlock, WideResNet

__all__: list[str] = ["MODELS", "find_entry", "find_model"]

NETWORKS = {  # by the kind of block
    "basic": (ResNet, BasicBlock),
    "bottleneck": (ResNet, Bottleneck),
    "preact": (WideResNet, PreActBlock),
}


def find_model(name: str) -> str:
    """The name itself, where it names a model or an entry.

    Args:
        name: `architecture` or `architecture.tag`.
    Raises:
        ValueError: no such model or tag; names the nearest.
    """
    architecture, _, tag = name.partition(".")
    known = [f"{model}.{tag}" for model in default_cfgs for tag in DATASETS] if tag else list(default_cfgs)
    if name in known:
        return name
    if tag and architecture in default_cfgs:
        raise ValueError(f"{architecture} has no tag {tag!r}; expected one of {', '.join(DATASETS)}")
    raise ValueError(f"no model {name!r}{_nearest(name, known)}. All names: tamzoo list --all")


def find_entry(name: str) -> Entry:
    """The catalogue's row of that name.

    Raises:
        ValueError: no such entry; names the nearest.
    """
    if name not in ENTRIES:
        raise ValueError(f"no entry {name!r}{_nearest(name, ENTRIES)}. All names: tamzoo list")
    return ENTRIES[name]


def full_name(name: str) -> str:
    """`architecture.tag` of a model or an entry: where no tag is given, the architecture's default.

    Raises:
        ValueError: as `find_model`.
    """
    name = find_model(name)
    return name if "." in name else f"{name}.{default_cfgs[name].default_with_tag[0]}"


def model_from(weights: Path, name: str, **kwargs: Any) -> nn.Module:
    """A model in eval mode, as a safetensors file and the record beside it tell it.

    Args:
        name: `architecture.tag`.
        kwargs: Those of timm's `create_model`, before what file and record tell.
    Raises:
        ValueError: the file is damaged or not finite, or it or its record is of another model.
    """
    arguments = model_arguments(weights) | kwargs
    try:
        model = timm.create_model(name, **arguments).eval()
    except TypeError as error:  # another attention takes no group size
        raise ValueError(f"{weights}: {name} cannot be made with {arguments}: {error}") from error
    if (told := told_entry(weights) or name) != name:
        raise ValueError(f"{weights} says that it is of {told}, not of {name}; pass that name with it")
    load_weights(model, weights, name)
    check_finite(model.state_dict(), str(weights))
    return model


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name.lower(), known, n=3)
    return f"; nearest: {', '.join(found)}" if found else ""


def _pretrained_cfg(model: str, dataset: Dataset) -> dict[str, Any]:
    name = f"{model}.{dataset.tag}"
    entry = ENTRIES.get(name)
    cfg: dict[str, Any] = {
        "num_classes": dataset.num_classes,
        "input_size": dataset.input_size,
        "mean": dataset.mean,
        "std": dataset.std,
        "crop_pct": dataset.crop_pct,
        "interpolation": "bicubic",
        "first_conv": "conv1",
        "classifier": "fc",
        "label_names": dataset.class_names,
        "license": "apache-2.0",
        "paper_name": PAPER_TITLE,
    }
    if entry and entry.trained:
        cfg["hf_hub_id"] = f"{entry.hub_id}@{entry.trained.revision}"
    return cfg


def _check_source(name: str, cfg: PretrainedCfg, kwargs: dict[str, Any]) -> None:
    """Sees before building that there are weights, and that a file of ours or the caller's is whole.

    Raises:
        RuntimeError: the entry has no weights.
        ValueError: the file is damaged, or not the catalogue's.
        OSError: the Hub's file cannot be had.
    """
    entry = ENTRIES.get(name)
    if not (cfg.has_weights or cfg.state_dict):
        trained = ", ".join(entry.name for entry in ENTRIES.values() if entry.trained)
        ways = "Train it with `tamzoo train`, or pass" if entry else "Pass"
        raise RuntimeError(
            f"{name} has no trained weights yet; entries that have: {trained or 'none'}. "
            f"{ways} weights of your own, or pretrained=False for an untrained model"
        )
    ours = not (cfg.file or cfg.state_dict or cfg.source)  # which are the caller's, and timm reads them
    if ours and entry and entry.trained and cfg.hf_hub_id == f"{entry.hub_id}@{entry.trained.revision}":
        path = fetch_weights(entry, kwargs.get("cache_dir"))
        kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), "file": str(path)}
    elif cfg.file and cfg.source is None:
        check_weights_file(Path(cfg.file))


def _build(model: str, backbone: Backbone, attention: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    cfg = resolve_pretrained_cfg(model, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    name = f"{model}.{cfg.tag}" if cfg.tag else model
    if pretrained:
        _check_source(name, cfg, kwargs)
    small = DATASETS[cfg.tag].stem == "3x3" if cfg.tag in DATASETS else cfg.input_size[-1] < 128
    attn_layer = ATTENTIONS[attention]
    if attention == "tam" and "group_size" in kwargs:
        attn_layer = partial(ATTENTIONS[attention], group_size=kwargs.pop("group_size"))
    network, block = NETWORKS[backbone.block]
    shape: dict[str, Any] = {
        "block": block,
        "layers": backbone.layers,
        "channels": backbone.channels,
        "cardinality": backbone.cardinality,
        "base_width": backbone.base_width,
        "stem": "3x3" if small else "7x7",
        "stem_width": backbone.stem_width,
        "block_args": {"attn_layer": attn_layer},
        "zero_init_last": False,  # He initialisation throughout (paper, section 3.2)
    }

    def fit(weights: dict[str, Tensor], built: nn.Module) -> dict[str, Tensor]:
        check_fit(weights, built, name)
        return weights

    return build_model_with_cfg(
        network,
        model,
        pretrained,
        pretrained_filter_fn=fit,
        feature_cfg={"out_indices": tuple(range(len(backbone.layers) + 1))},
        **(shape | kwargs),
    )


def _entrypoint(backbone: Backbone, attention: str) -> Callable[..., nn.Module]:
    model = f"{backbone.name}_{attention}"

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(model, backbone, attention, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = model
    create.__doc__ = f"""{backbone.title}, attention: {attention}. Tags: {", ".join(DATASETS)}.

    Args:
        pretrained: Load the weights of the tag; an error where there are none.
        kwargs: Those of timm's `create_model`, `stem` ("3x3" or "7x7") and, for TAM, `group_size`.
    """
    return create


MODELS = {
    f"{backbone.name}_{attention}": (backbone, attention)
    for backbone in BACKBONES.values()
    for attention in ATTENTIONS
}
default_cfgs = generate_default_cfgs(
    {
        f"{model}.{tag}": _pretrained_cfg(model, dataset)
        for model in MODELS
        for tag, dataset in DATASETS.items()
    }
)
for _model, _row in MODELS.items():
    setattr(sys.modules[__name__], _model, register_model(_entrypoint(*_row)))
