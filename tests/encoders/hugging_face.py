"""Small random models of transformers, of their real classes, and stand-ins for the tokenizers, which live on the hub.

All sizes differ, so that a transposed or confused axis cannot go unnoticed.
"""

import string

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VISION = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 7}
TEXT = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"vocab_size": 64, "max_position_embeddings": 24}

# What stands at the ends of a text in pretraining, and as which id.
ENDS = {
    "CLIPModel": {"pad": ("<end>", 63), "bos": ("<start>", 62), "eos": ("<end>", 63)},
    "MetaClip2Model": {"pad": ("<pad>", 0), "bos": ("<start>", 3), "eos": ("<end>", 2)},
    "SiglipModel": {"pad": ("<end>", 2), "eos": ("<end>", 2)},
    "Siglip2Model": {"pad": ("<pad>", 0), "eos": ("<end>", 2)},
    "Tipsv2Model": {"pad": ("<pad>", 0)},
}
KINDS = [kind for kind in ENDS if hasattr(transformers, kind)]  # the oldest version has two of them


def hub_tokenizer(kind, **options):
    """A tokenizer of transformers, a letter a token, blanks left out, with the ends that a kind of models wants."""
    ends = ENDS[kind]
    ids = {"<unk>": 1, **dict(ends.values())}
    ids |= {letter: place for place, letter in enumerate(string.ascii_letters, start=5)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = [ends[name] for name in ("bos", "eos") if name in ends]
    template = " ".join([*(["<start>"] if "bos" in ends else []), "$A", *(["<end>"] if "eos" in ends else [])])
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    tokens = {f"{name}_token": token for name, (token, _) in ends.items()}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **{**tokens, **options})


def small_config(kind, *, vision=None, text=None, **options):
    """The configuration of :func:`small_model`; ``vision`` and ``text`` change it."""
    vision, sizes = {**VISION, **(vision or {})}, dict(TEXT)
    ids = {f"{name}_token_id": place for name, (_, place) in ENDS[kind].items()}
    if kind in ("CLIPModel", "MetaClip2Model"):
        options = {"projection_dim": 40, **options}
    elif kind == "Tipsv2Model" or VERSION < (5, 0):
        sizes["hidden_size"] = VISION["hidden_size"]  # there is no projection
    else:
        sizes["projection_size"] = VISION["hidden_size"]
    if kind == "Siglip2Model":
        del vision["image_size"]
        vision["num_patches"] = 16
    if kind == "Tipsv2Model":
        del vision["intermediate_size"]
        vision = {"num_register_tokens": 2, **vision}
    config = getattr(transformers, kind.replace("Model", "Config"))
    return config(text_config={**sizes, **ids, **(text or {})}, vision_config=vision, **options)


def small_model(kind, *, attention="sdpa", **changes):
    """A small random model in eval mode, always with the same weights, all of which count."""
    config = small_config(kind, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)._from_config(config, attn_implementation=attention)
        for weight in model.parameters():  # as they are made, some are zeros or ones
            weight.data += (0.3 if weight.ndim == 1 else 0.05) * torch.randn_like(weight)
    if hasattr(model, "temperature"):
        model.temperature.data.fill_(0.02)
    return model.eval()


def own_feature(output):
    """What get_image_features and get_text_features give: a tensor in transformers 4, an output object in 5."""
    return getattr(output, "pooler_output", output)


def patchified(images, size=7):
    """Patches row by row, the colours of a pixel side by side, as a NaFlex model takes them."""
    _, _, height, width = images.shape
    rows = range(0, height, size)
    patches = [images[:, :, row : row + size, col : col + size] for row in rows for col in range(0, width, size)]
    return torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in patches], dim=1)


def vision_inputs(encoder, images):
    """What the container's own functions take."""
    kind, (height, width) = type(encoder.model).__name__, images.shape[-2:]
    if kind == "Siglip2Model":
        patches, shapes = patchified(images), torch.tensor([[height // 7, width // 7]] * len(images))
        mask = torch.ones(patches.shape[:2])
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if kind == "Tipsv2Model" or (height, width) == (28, 28):
        return {"pixel_values": images}
    return {"pixel_values": images, "interpolate_pos_encoding": True}


def text_inputs(encoder, texts):
    """Padded as in pretraining: with a mask for TIPSv2, without one elsewhere."""
    encoded = encoder.tokenizer.tokenizer(
        texts, padding="max_length", max_length=encoder.context_length, return_tensors="pt"
    )
    names = ("input_ids", "attention_mask") if type(encoder.model).__name__ == "Tipsv2Model" else ("input_ids",)
    return {name: encoded[name] for name in names}
