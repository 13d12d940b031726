"""One small random model of every family of CLIP, of the container's real class and by its real configuration.

``FAMILIES`` goes from a name to a function that builds a wrapped, frozen CLIP in eval mode, always with the same
weights. Only the sizes are changed: few layers, narrow, small pictures, another vocabulary. To add a family, add such a
function; to ``WITH_BIAS`` if the model has a logit bias, to ``FIXED_SIZE`` if it takes images of one size only, and to
``OVERLAPPING`` if patches see pixels of their neighbours before the first block.
"""

import copy
from functools import partial
from unittest import mock

import open_clip
import timm
import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vitamin import VitCfg, VitConvCfg

from czsl_heads import wrap
from czsl_heads.encoders.open_clip import OpenClipEncoder
from tests.encoders.hugging_face import KINDS, hub_tokenizer, own_feature, small_model, text_inputs, vision_inputs

DIM = 40
TEXT = {"width": 48, "heads": 4, "layers": 2, "vocab_size": 120}
TRUNK = {"embed_dim": 48, "depth": 3, "num_heads": 4}


class Letters:
    """Stand-in for a tokenizer: [SOS] if there is one, a letter a token, [EOS] the highest id, zeros behind."""

    def __init__(self, context_length, vocabulary, sos=True):
        self.context_length, self.eos, self.sos = context_length, vocabulary - 1, sos

    def __call__(self, texts, context_length=None):
        length = context_length or self.context_length
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts):
            front = [self.eos - 1] if self.sos else []
            ids = [*front, *(1 + ord(letter) % 90 for letter in text)][: length - 1]
            row[: len(ids) + 1] = torch.tensor([*ids, self.eos])
        return rows


def small_configuration(name, **vision):
    """The configuration that open_clip has under a name, made small; the text tower's kind stays."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    text = {key: value for key, value in config["text_cfg"].items() if not key.startswith(("hf_", "tokenizer"))}
    logits = {key: config[key] for key in ("init_logit_bias",) if key in config}
    return {**config["vision_cfg"], **vision}, {**text, **TEXT}, logits


def seeded(build, *arguments, **options):
    """Eval mode, and weights of which all count: as they are made, some are zeros, ones, or next to nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(*arguments, **options)
        for name, weight in model.named_parameters():
            if "logit" in name:
                continue
            if weight.ndim < 2:
                weight.data += 0.2 * torch.randn_like(weight)
            elif name.startswith("visual."):
                fan_in = weight.shape[1:].numel()
                weight.data.normal_(std=0.5 if weight.ndim == 3 else fan_in**-0.5)  # tokens and positions, or products
    return model.eval()


def wrapped(model, text):
    letters = Letters(text["context_length"], text["vocab_size"], sos=text.get("pool_type") != "last")
    return OpenClipEncoder(model, tokenizer=letters)


def of_open_clip(name, kind=open_clip.CLIP, quick_gelu=False, **changes):
    """A VisionTransformer of open_clip."""
    small = {"image_size": (24, 16), "patch_size": 8, "width": 48, "layers": 3, "head_width": 16}
    vision, text, logits = small_configuration(name, **{**small, **changes})
    return wrapped(seeded(kind, DIM, vision, text, quick_gelu=quick_gelu, **logits), text)


def of_timm(name, trunk=None, **changes):
    """A TimmModel of open_clip, whose trunk timm makes small; ``trunk`` makes one where timm cannot."""
    create = timm.create_model

    def small(model_name, **options):
        return (
            trunk(**options) if trunk else create(model_name, **{**TRUNK, "img_size": (48, 32), **changes, **options})
        )

    vision, text, logits = small_configuration(name)
    dim = TRUNK["embed_dim"] if vision["timm_proj"] == "none" else DIM
    with mock.patch.object(timm, "create_model", small):
        model = seeded(open_clip.CustomTextCLIP, dim, vision, text, **logits)
    return wrapped(model, text)


def mobile_trunk(num_classes, global_pool, pretrained, **drops):
    """timm's vit_base_mci_224, which has its widths in the code, small."""
    stem = ConvStem(channels=(12, 12, 48), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=torch.nn.GELU)
    options = {"embed_layer": partial(HybridEmbed, backbone=stem, proj=False), "patch_size": 1, "no_embed_class": True}
    return VisionTransformer((48, 32), num_classes=num_classes, global_pool=global_pool, **TRUNK, **options, **drops)


_CONVOLUTIONS = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
VITAMIN = VitCfg(embed_dim=(8, 16, 48), depths=(1, 1, 1), stem_width=8, conv_cfg=_CONVOLUTIONS, head_type="1d")

FAMILIES = {
    "class token": partial(of_open_clip, "ViT-B-16"),
    "class token, QuickGELU": partial(of_open_clip, "ViT-L-14-quickgelu", quick_gelu=True),
    "class token, CustomTextCLIP": partial(of_open_clip, "ViT-B-32", open_clip.CustomTextCLIP),
    "CLIPA": partial(of_open_clip, "ViT-L-14-CLIPA"),
    "CLIPA, norm before the mean": partial(of_open_clip, "ViT-L-14-CLIPA", final_ln_after_pool=False),
    "EVA-01": partial(of_timm, "EVA01-g-14", patch_size=8, img_size=(24, 16)),
    "EVA-02": partial(of_timm, "EVA02-B-16"),
    "MobileCLIP-B": partial(of_timm, "MobileCLIP-B", mobile_trunk),
    "MobileCLIP2-L-14": partial(of_timm, "MobileCLIP2-L-14", patch_size=8, img_size=(24, 16)),
    "SigLIP": partial(of_timm, "ViT-B-16-SigLIP"),
    "SigLIP 2": partial(of_timm, "ViT-SO400M-14-SigLIP2", patch_size=8, img_size=(24, 16)),
    "PE-Core": partial(of_timm, "PE-Core-T-16-384"),
    "ViTamin": partial(of_timm, "ViTamin-S", embed_cfg=VITAMIN),
    "mean of patches": partial(of_timm, "vit_medium_patch16_gap_256"),
    "class token and registers": partial(of_timm, "MobileCLIP2-L-14", patch_size=8, img_size=(24, 16), reg_tokens=2),
}


def of_transformers(kind):
    """A model of transformers, with more rows than columns of patches."""
    return wrap(small_model(kind), tokenizer=hub_tokenizer(kind), image_size=(21, 14))


FAMILIES |= {kind: partial(of_transformers, kind) for kind in KINDS}

WITH_BIAS = {"SigLIP", "SigLIP 2", "SiglipModel", "Siglip2Model"}
FIXED_SIZE: set[str] = set()
OVERLAPPING = {"ViTamin"}

_built = {}


def build(name):
    """A copy of the family's model, which the test may change."""
    if name not in _built:
        _built[name] = FAMILIES[name]()
    return copy.deepcopy(_built[name])


def own_image_features(encoder, images):
    """What the container itself makes of images, ``[batch, dim]``."""
    if hasattr(encoder.model, "encode_image"):
        return encoder.model.encode_image(images)
    return own_feature(encoder.model.get_image_features(**vision_inputs(encoder, images)))


def own_text_features(encoder, texts):
    """What the container itself makes of texts, ``[texts, dim]``."""
    if hasattr(encoder.model, "encode_text"):
        return encoder.model.encode_text(encoder.tokenizer(texts))
    return own_feature(encoder.model.get_text_features(**text_inputs(encoder, texts)))


def own_scale(encoder):
    """The multiplier of the container's cosines."""
    if hasattr(encoder.model, "temperature"):
        return 1 / encoder.model.temperature
    return encoder.model.logit_scale.exp().reshape(())
