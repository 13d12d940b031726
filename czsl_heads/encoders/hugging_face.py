"""CLIP models of Hugging Face transformers behind the Encoder protocol, 4.48 and 5 alike.

transformers itself is imported only to load a model by name: where a model of it is there, so is the package.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from czsl_heads.encoders.clip import ClipEncoder, Dense, Tokenizer
from czsl_heads.encoders.errors import missing_transformers
from czsl_heads.encoders.hub import asked_once
from czsl_heads.encoders.hugging_face_towers import (
    ClipText,
    ClipVision,
    HuggingFaceText,
    HuggingFaceVision,
    MetaClip2Text,
    Siglip2Vision,
    SiglipText,
    SiglipVision,
    Tipsv2Text,
    Tipsv2Vision,
)
from czsl_heads.encoders.open_clip import OPENAI_VOCABULARY
from czsl_heads.encoders.transforms import CLIP_MEAN, CLIP_STD, Interpolation, Preprocess, ResizeMode

_INTERPOLATIONS: dict[Any, Interpolation] = {
    2: "bilinear",
    3: "bicubic",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
}


class HuggingFaceEncoder(ClipEncoder):
    """A CLIP of transformers, :class:`czsl_heads.encoders.clip.ClipEncoder` of its container.

    Args:
        model: A ``CLIPModel``, ``MetaClip2Model``, ``SiglipModel``, ``Siglip2Model`` or ``Tipsv2Model``.
        tokenizer: Its tokenizer, as ``AutoTokenizer.from_pretrained`` returns it, or a function from strings to token
            ids ``[n, context_length]``. Default: that of ``processor``; else, for a ``CLIPModel`` with a vocabulary of
            OpenAI's size, open_clip's, which gives the same ids.
        processor: Its processor or image processor, which says how images are prepared, and of which size. Without
            one this is assumed: CLIP and MetaCLIP 2 resize the shorter side (bicubic), crop the centre, and
            normalise by OpenAI's mean and standard deviation. SigLIP (bicubic), SigLIP 2 NaFlex and TIPSv2 (bilinear)
            resize both sides; SigLIP normalises by 0.5 and 0.5, TIPSv2 not at all.
        frozen: Switch off the gradients of all parameters; ``False`` leaves their flags as they are.
        dense: As in :class:`~czsl_heads.encoders.clip.ClipEncoder`.

    Images are prepared by PIL, as in pretraining; the processors of transformers 5 resize tensors instead, which
    differs by a grey level here and there, and crop at most one pixel beside the centre. A NaFlex SigLIP 2 was
    pretrained on pictures in their own aspect ratio; here all pictures have one size, which its vision tower's
    ``resize`` changes. Texts are written in lower case for SigLIP and SigLIP 2, as in their pretraining, and all of
    their positions are run, without a padding mask.

    Raises:
        TypeError: A model of another kind; the message says why.
        ValueError: No tokenizer; a processor that prepares images in a way that is not supported; a SigLIP without
            its pooling head; an attention that takes no mask of its own.

    References:
        Wolf et al., Transformers, EMNLP 2020 demos; Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV
        2023; Tschannen et al., SigLIP 2, 2025. The patches of SigLIP go through the value path of its pooling head,
        as Zhou et al., Extract Free Dense Labels from CLIP, ECCV 2022, do it in CLIP's ResNet.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        processor: Any = None,
        frozen: bool = True,
        dense: Dense = "none",
    ) -> None:
        family = _family(model)
        vision = family.vision(model)
        if tokenizer is None:
            tokenizer = getattr(processor, "tokenizer", None)
        context_length = int(model.text_model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
        tokenizer = _as_tokenizer(model, tokenizer, context_length, family)
        super().__init__(
            model,
            vision,
            family.text(model, tokenizer),
            tokenizer=tokenizer,
            preprocess=_preprocess(vision, processor, family),
            frozen=frozen,
            dense=dense,
        )

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of the cosines; of TIPSv2 one over its temperature. Scalar tensor."""
        temperature: Tensor | None = getattr(self.model, "temperature", None)
        return super().logit_scale if temperature is None else 1 / temperature.reshape(())

    def _check_length(self, texts: list[str]) -> None:
        if not isinstance(self.tokenizer, HuggingFaceTokenizer):
            return super()._check_length(texts)
        for text in texts:
            length = self.tokenizer.count(text)
            if length > self.context_length:
                raise ValueError(
                    f"expected `texts` of at most {self.context_length} tokens, got {length} tokens in {text!r}"
                )


def supports(model: Any) -> bool:
    """True of a model of transformers, for which this file speaks: it wraps the model or says why it cannot."""
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


class HuggingFaceTokenizer:
    """A tokenizer of transformers as a function from strings to token ids ``[n, context_length]``.

    Args:
        tokenizer: As ``AutoTokenizer.from_pretrained`` returns it.
        context_length: Positions that the text tower has; shorter texts are filled up behind, longer ones cut off.
        lower: Write texts in lower case first.
    """

    def __init__(self, tokenizer: Any, context_length: int, *, lower: bool = False) -> None:
        self.tokenizer, self.context_length, self.lower = tokenizer, context_length, lower

    def __call__(self, texts: list[str]) -> Tensor:
        encoded = self.tokenizer(
            [self._cased(text) for text in texts],
            padding="max_length",
            padding_side="right",  # some tokenizers fill up in front unless they are told
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        ids: Tensor = encoded["input_ids"]
        return ids

    def count(self, text: str) -> int:
        """Tokens of one text, those at its ends included, before anything is cut off."""
        return len(self.tokenizer(self._cased(text), verbose=False)["input_ids"])

    def _cased(self, text: str) -> str:
        return text.lower() if self.lower else text


@dataclass(frozen=True)
class _Family:
    """What is known of the models of one class.

    Attributes:
        vision, text: Its towers.
        lower: Texts were written in lower case in pretraining.
        resize_mode, interpolation, mean, std: How images are prepared, unless a processor says otherwise.
    """

    vision: Callable[[Any], HuggingFaceVision]
    text: Callable[[Any, Tokenizer], HuggingFaceText]
    lower: bool = False
    resize_mode: ResizeMode = "squash"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


_CLIP = _Family(ClipVision, ClipText, resize_mode="shortest", mean=CLIP_MEAN, std=CLIP_STD)
_ZEROS, _ONES = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # which leave pixels in [0, 1]
_FAMILIES = {
    "CLIPModel": _CLIP,
    "MetaClip2Model": replace(_CLIP, text=MetaClip2Text),
    "SiglipModel": _Family(SiglipVision, SiglipText, lower=True),
    "Siglip2Model": _Family(Siglip2Vision, SiglipText, lower=True, interpolation="bilinear"),
    "Tipsv2Model": _Family(Tipsv2Vision, Tipsv2Text, interpolation="bilinear", mean=_ZEROS, std=_ONES),
}
MODEL_TYPES = ("clip", "metaclip_2", "siglip", "siglip2", "tipsv2")  # of the same classes, in configurations
_BERT = "its text tower is a BERT, which reads token types and a padding mask: soft prompts cannot be put in"
_ONE_TOWER = "it is one tower of two"
_REASONS = {
    "AltCLIPModel": _BERT,
    "ChineseCLIPModel": _BERT,
    "CLIPVisionModel": _ONE_TOWER,
    "CLIPVisionModelWithProjection": _ONE_TOWER,
    "CLIPTextModel": _ONE_TOWER,
    "CLIPTextModelWithProjection": _ONE_TOWER,
    "SiglipVisionModel": _ONE_TOWER,
    "SiglipTextModel": _ONE_TOWER,
}


def _family(model: Any) -> _Family:
    name = _name(model)
    if name not in _FAMILIES:
        why = _REASONS.get(name, "where its patch tokens and its image feature meet is not known here")
        raise TypeError(f"expected `model` to be a {', '.join(_FAMILIES)} of transformers, got {name}: {why}")
    return _FAMILIES[name]


def _name(model: Any) -> str:
    """The class of transformers that a model is of, also where it is of a class derived from it."""
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
    names = [kind.__name__ for kind in kinds if kind.__name__ in (*_FAMILIES, *_REASONS)]
    return names[0] if names else type(model).__name__


def _as_tokenizer(model: Any, tokenizer: Any, context_length: int, family: _Family) -> Tokenizer:
    if hasattr(tokenizer, "convert_tokens_to_ids"):  # a tokenizer of transformers
        return HuggingFaceTokenizer(tokenizer, context_length, lower=family.lower)
    if tokenizer is not None:
        given: Tokenizer = tokenizer
        return given
    vocabulary = model.text_model.config.vocab_size
    if _name(model) == "CLIPModel" and vocabulary == OPENAI_VOCABULARY:
        from open_clip import SimpleTokenizer

        default: Tokenizer = SimpleTokenizer(context_length=context_length)
        return default
    raise ValueError(
        f"expected `tokenizer` of a {_name(model)} with a vocabulary of {vocabulary}, got None; it lives where the "
        'weights live: pass transformers.AutoTokenizer.from_pretrained("OWNER/NAME"), or wrap "hf:OWNER/NAME"'
    )


def _preprocess(vision: HuggingFaceVision, processor: Any, family: _Family) -> Preprocess:
    """How images are prepared; a tower whose images have another size than the processor's is resized."""
    processor = getattr(processor, "image_processor", processor)
    if processor is None:
        return Preprocess(vision.image_size, family.mean, family.std, family.interpolation, family.resize_mode)

    known = _INTERPOLATIONS.get(getattr(processor.resample, "value", processor.resample))
    if known is None:
        raise ValueError(
            f"expected `processor` with bilinear or bicubic interpolation, got resample={processor.resample!r}"
        )
    scale = getattr(processor, "rescale_factor", None) or 1 / 255
    if not math.isclose(scale, 1 / 255, rel_tol=1e-3):
        raise ValueError(f"expected `processor` with rescale_factor=1/255, got {scale}")
    normalizes = bool(processor.do_normalize)
    mean = tuple(processor.image_mean) if normalizes else _ZEROS
    std = tuple(processor.image_std) if normalizes else _ONES
    size, resize_mode = _geometry(processor)
    if size is not None:  # of NaFlex, the number of patches is known only
        vision.resize(size)
    return Preprocess(vision.image_size, mean, std, known, resize_mode)


def _geometry(processor: Any) -> tuple[tuple[int, int] | None, ResizeMode]:
    """Height and width of what a processor gives, None if that varies, and how it comes about."""
    size = getattr(processor, "size", None)
    shortest, height, width = (_side(size, name) for name in ("shortest_edge", "height", "width"))
    crops = getattr(processor, "do_center_crop", None)
    crop = [_side(getattr(processor, "crop_size", None), name) for name in ("height", "width")] if crops else None
    if shortest is not None and crop == [shortest, shortest]:
        return (shortest, shortest), "shortest"
    if height is not None and width is not None and crop in (None, [height, width]):
        return (height, width), "squash"
    if shortest is None and height is None and hasattr(processor, "max_num_patches"):
        return None, "squash"
    raise ValueError(
        f"expected `processor` that resizes to height and width, or the shortest edge to the size of its centre crop, "
        f"got size={size} and crop_size={crop}"
    )


def _side(size: Any, name: str) -> int | None:
    side = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return None if side is None else int(side)


def load(
    name: str, *, tokenizer: Any = None, processor: Any = None, frozen: bool = True, dense: Dense = "none"
) -> HuggingFaceEncoder:
    """A CLIP by its name, in eval mode and in float32, with its tokenizer and its image processor.

    Args:
        name: ``"hf:OWNER/NAME"``, a repository of the Hugging Face hub, from the cache or the network
            (``HF_HUB_OFFLINE=1``: from the cache only); or ``"hf:DIR"``, a folder that ``save_pretrained`` wrote.
        tokenizer, processor: As in :class:`HuggingFaceEncoder`, in place of those that are found there.
        frozen, dense: As in :class:`HuggingFaceEncoder`.

    Raises:
        ImportError: transformers is not installed.
        ValueError: Nothing of that name, a model of another kind, weights that are damaged or not complete, or no
            tokenizer or image processor beside them; in one line, and before the weights are read where that can be.
    """
    transformers = _transformers(name)
    where = name.removeprefix("hf:")
    config = _read(transformers.AutoConfig, where, "config.json")
    if config.model_type not in MODEL_TYPES:
        kinds = ", ".join(MODEL_TYPES)
        raise ValueError(f"expected {name!r} to be a model of type {kinds}, got {config.model_type}")

    if processor is None:
        processor = _read(transformers.AutoImageProcessor, where, "preprocessor_config.json")
    tokenizer = tokenizer or getattr(processor, "tokenizer", None) or _read_tokenizer(transformers, where, config)
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are told below
    with _quiet(transformers):
        model, found = _read(transformers.AutoModel, where, "model.safetensors", config=config, **options)
    if found["mismatched_keys"]:
        first, *shapes = min(found["mismatched_keys"])
        there, here = (tuple(shape) for shape in shapes[:2])
        raise ValueError(
            f"expected {name!r} with weights of the sizes in its config.json, {here} for {first!r}, got {there}"
        )
    absent = sorted(found["missing_keys"])
    if absent:
        raise ValueError(f"expected {name!r} with all weights of a {type(model).__name__}, got none of {absent[0]!r}")
    return HuggingFaceEncoder(
        model.float().eval(), tokenizer=tokenizer, processor=processor, frozen=frozen, dense=dense
    )


def _transformers(name: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise missing_transformers(repr(name)) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its table of what did not fit, and its progress bar."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _read(kind: Any, where: str, file: str, **options: Any) -> Any:
    """``kind.from_pretrained``; ValueError in one line that says what was looked for, where, and how to get it."""
    folder = Path(where).expanduser()
    try:
        with asked_once():
            return kind.from_pretrained(str(folder) if folder.is_dir() else where, **options)
    except Exception as error:  # of more kinds than can be listed: of the hub, of safetensors, of configurations
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(f"expected {file} {_how_to_get(where, folder)} ({reason})") from error


def _how_to_get(where: str, folder: Path) -> str:
    if folder.is_dir():
        return f"in the folder {folder.resolve()}, as save_pretrained writes it, got none that can be read"
    if where.startswith((".", "/", "~")) or where.count("/") > 1:
        return f"in a folder, got {folder.absolute()}, which is none"
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        f"of {where} in the cache {HF_HUB_CACHE} or on the Hugging Face hub, got none; where there is a network, run "
        f"`hf download {where} --local-dir DIR`, and wrap 'hf:DIR'"
    )


def _read_tokenizer(transformers: Any, where: str, config: Any) -> Any:
    """The tokenizer beside the weights; None for a CLIP that has OpenAI's vocabulary and none beside it."""
    wanted = config.text_config.vocab_size
    try:
        tokenizer = _read(transformers.AutoTokenizer, where, "tokenizer.json")
        if len(tokenizer) > wanted // 2:
            return tokenizer
        # transformers 5 makes an empty tokenizer where there is no file.
        reason = f"a tokenizer of {len(tokenizer)} tokens for a vocabulary of {wanted}"
    except ValueError as error:
        reason = str(error)
    if config.model_type == "clip" and wanted == OPENAI_VOCABULARY:
        return None
    raise ValueError(f"expected a tokenizer beside the weights of 'hf:{where}', got {reason}; or pass `tokenizer`")
