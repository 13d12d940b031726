"""Which of open_clip's configurations can be wrapped, read and not built; and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from czsl_heads.encoders.open_clip import COCA_POOL, IDS_ONLY, NO_POOL, RESNET
from czsl_heads.encoders.timm_towers import OTHER_POOL, OTHER_TRUNK

COCA = "a CoCa pools by queries and by a class embedding of its own"
TRUNKS = ("vision_transformer", "vision_transformer_hybrid", "vitamin", "eva")  # modules of timm.models


class Configuration(NamedTuple):
    """What :func:`czsl_heads.wrap` makes of one of open_clip's configurations.

    Attributes:
        name: As in ``open_clip.list_models()``.
        family: What the vision tower is, and how it pools.
        reason: Why ``wrap`` refuses it; empty if it takes it.
        hub_tokenizer: True if its tokenizer comes from the Hugging Face hub, unless ``wrap`` is given one.
    """

    name: str
    family: str
    reason: str
    hub_tokenizer: bool


def read_configurations() -> list[Configuration]:
    """All configurations that open_clip brings, by its own names; none is built.

    Example:
        >>> of_name = {each.name: each for each in read_configurations()}
        >>> of_name["ViT-B-16-SigLIP"].family, of_name["ViT-B-16-SigLIP"].reason
        ('timm, attention pooling', '')
        >>> of_name["RN50"].reason
        'its attention pooling projects one vector, and not single patches'
    """
    import open_clip

    return [read_configuration(name, open_clip.get_model_config(name)) for name in open_clip.list_models()]


def read_configuration(name: str, config: Mapping[str, Any]) -> Configuration:
    """One configuration of open_clip, a dictionary as its JSON files hold them."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    family, reason = _of_timm(vision) if vision.get("timm_model_name") else _of_open_clip(vision)
    if "multimodal_cfg" in config:
        family, reason = "CoCa", COCA
    elif not reason and text.get("hf_model_name"):
        reason = IDS_ONLY
    elif not reason and text.get("embed_cls"):
        reason = COCA
    return Configuration(name, family, reason, "hf_tokenizer_name" in text)


def _of_open_clip(vision: Mapping[str, Any]) -> tuple[str, str]:
    """Family and reason against it, of open_clip's own towers."""
    if isinstance(vision["layers"], (list, tuple)):
        return "ResNet", RESNET
    if vision.get("attentional_pool"):
        return "ViT, attention pooling", COCA_POOL
    pool = vision.get("pool_type", "tok")
    if pool == "none":
        return "ViT, no pooling", NO_POOL
    return ("ViT, class token", "") if pool == "tok" else ("ViT, mean of patches", "")


def _of_timm(vision: Mapping[str, Any]) -> tuple[str, str]:
    """Family and reason against it, of timm's towers; what timm would build is told by the module that builds it."""
    from timm.models import is_model_in_modules

    name, pool = vision["timm_model_name"], vision.get("timm_pool", "avg")
    if not is_model_in_modules(name, TRUNKS):
        return f"timm, {name.partition('_')[0]}", OTHER_TRUNK
    if vision.get("timm_proj", "linear") and not pool:
        pool = "avg"  # the trunk keeps its own way, which is this one in all that open_clip has
    families = {"token": "class token", "map": "attention pooling", "avg": "mean of patches"}
    return (f"timm, {families[pool]}", "") if pool in families else (f"timm, {pool}", OTHER_POOL)
