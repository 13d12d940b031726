"""Names of CLIPs: what they look like, and how each is loaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from torch import nn

from czsl_heads.encoders.clip import ClipEncoder, Dense, Tokenizer
from czsl_heads.encoders.configurations import read_configuration
from czsl_heads.encoders.errors import quiet, reason, told
from czsl_heads.encoders.open_clip import OpenClipEncoder
from czsl_heads.encoders.tiny import RECORD, load_tiny
from czsl_heads.encoders.weights import WEIGHTS, fitting_architectures, read_weights

ENCODERS = "czsl_heads.encoders"  # the group of entry points by which other packages bring encoders
SCHEMES = ("hf", "hf-hub", "local-dir")
QUICK = "-quickgelu"  # how open_clip ends the name of an architecture that differs in its activation only
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN = 6  # of the tags of an architecture


def load(name: str, *, tokenizer: Any = None, frozen: bool = True, dense: Dense = "none") -> ClipEncoder:
    """The encoder that a name of this package stands for, in eval mode; :func:`czsl_heads.wrap` lists the forms.

    The activation follows the pretraining of the weights, by these rules:

    * A TAG says how its weights were trained, whether the architecture is asked for with ``-quickgelu`` or without.
    * A file in OpenAI's own layout is QuickGELU, whatever the architecture is called.
    * For any other file the ARCHITECTURE says it: ``"ViT-L-14:PATH"`` is GELU, ``"ViT-L-14-quickgelu:PATH"`` QuickGELU.
      So the path alone is refused, and the message has both names.

    How images are prepared follows the TAG, too, or the configuration of a ``hf:``, ``hf-hub:`` or ``local-dir:``
    model. For a file it is what all tags of its architecture and activation say. If they disagree, as those of
    ``ViT-L-14`` do, the name must say which tag's it is: ``"ViT-L-14:TAG=PATH"``, which gives the activation, too.
    Without any tag it is open_clip's default, which is OpenAI's.

    Args:
        name: The name.
        tokenizer: If there is one, no other is looked for.
        frozen, dense: Of :class:`~czsl_heads.encoders.clip.ClipEncoder`.

    Raises:
        ValueError: The name is unknown, its weights cannot be had, or its architecture is not supported.
        ModuleNotFoundError: A package is missing; the message has the extra that brings it.
    """
    head, colon, tail = name.partition(":")
    if colon and not tail and head in (*SCHEMES, "tiny", *architectures()):
        raise ValueError(f"expected `model_or_name` with something behind the colon, got {name!r}")
    if head == "hf" and tail:
        from czsl_heads.encoders import hugging_face

        return hugging_face.load(name, tokenizer=tokenizer, frozen=frozen, dense=dense)
    if head == "tiny":
        model, found = load_tiny(Path(tail).expanduser() if tail else None)
    elif head in ("hf-hub", "local-dir") and tail:
        model, found = _of_scheme(name, head, tail, tokenizer)
    elif head in architectures():
        model, found = _of_architecture(head, tail, tokenizer)
    elif Path(name).expanduser().is_file():
        model, found = _of_file(Path(name).expanduser()), None
    else:
        raise ValueError(_unknown(name))
    return OpenClipEncoder(model.eval(), tokenizer=tokenizer or found, frozen=frozen, dense=dense)


def absolute(name: str) -> str:
    """The same name, with a path in it as an absolute one: a folder of results is used from other places, too."""
    head, _, tail = name.partition(":")
    known = head in architectures()
    path, whole = (Path(text).expanduser() for text in (tail, name))
    tag, equals, kept = tail.partition("=")
    if known and equals and _home(head, tag) and Path(kept).expanduser().is_file():
        return f"{head}:{tag}={Path(kept).expanduser().resolve()}"
    if head != "hf-hub" and tail and path.exists() and not (known and _home(head, tail)):
        return f"{head}:{path.resolve()}"
    if not known and head != "tiny" and brought(head) is None and whole.is_file():
        return str(whole.resolve())
    return name


def brought(name: str) -> EntryPoint | None:
    """The entry point by which another package brings an encoder of that name; None if none does."""
    found = {entry.value: entry for entry in entry_points(group=ENCODERS) if entry.name == name}
    if not found:
        return None
    own = ["this package"] if name in ("tiny", *SCHEMES, *architectures()) else []
    if len(found) + len(own) > 1:
        raise ValueError(f"expected one package that brings the encoder {name}, got {' and '.join([*own, *found])}")
    return next(iter(found.values()))


def architectures() -> list[str]:
    """Those that open_clip knows."""
    import open_clip

    names: list[str] = open_clip.list_models()
    return names


def _check_architecture(name: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless an open_clip configuration is of a supported CLIP; nothing is built."""
    try:
        refused = read_configuration(name, config).reason
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected {name!r} with the configuration of an open_clip model, got one that cannot be read "
            f"({type(error).__name__}: {reason(error)})"
        ) from error
    if refused:
        raise ValueError(f"expected an architecture whose patches can be compared with texts, got {name}: {refused}")


def _plain(architecture: str) -> str:
    return architecture.removesuffix(QUICK)


def _home(architecture: str, tag: str) -> str | None:
    """Under which of an architecture's two names open_clip knows a tag."""
    import open_clip

    names = (_plain(architecture), architecture)
    return next((name for name in names if open_clip.get_pretrained_cfg(name, tag)), None)


def _of_architecture(architecture: str, tail: str, tokenizer: Any) -> tuple[nn.Module, Tokenizer]:
    """One of open_clip's architectures, and its tokenizer."""
    import open_clip

    home, path, like = _home(architecture, tail), Path(tail).expanduser(), None
    tag, equals, kept = tail.partition("=")
    if equals and not home and not path.is_file() and _home(architecture, tag):
        like, path = tag, Path(kept).expanduser()
        if not path.is_file():
            raise ValueError(f"expected weights of {architecture}:{tag} in the file {path}, where there is none")
    if tail and not home and not path.is_file():
        raise ValueError(_unknown_tag(architecture, tail))
    config = open_clip.get_model_config(architecture)
    _check_architecture(architecture, config)
    tokenizer = tokenizer or _open_clip_tokenizer(architecture, config)
    if home:
        model = _tagged(home, tail)
    elif tail:
        model = _from_file(architecture, path, like)
    else:
        model = _random(architecture)
    return model, tokenizer


def _random(architecture: str, **options: Any) -> nn.Module:
    """The same random weights each time, or no saved model would fit."""
    import open_clip

    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        # A text tower of transformers is the one thing that it would download.
        model: nn.Module = open_clip.create_model(architecture, pretrained=None, pretrained_text=False, **options)
    return model


def _tagged(architecture: str, tag: str) -> nn.Module:
    import open_clip

    said = open_clip.get_pretrained_cfg(architecture, tag)
    quick = bool(said.get("quick_gelu", False))
    by_path = f"{architecture}:{tag}=PATH"
    remedy = f'they are downloaded once where there is a network; a copy of them is named "{by_path}"'
    kept = Path("~/.cache/clip").expanduser() / Path(said.get("url", "")).name
    if kept.is_file():
        remedy += f'; "{architecture}:{tag}={kept}" is here'
    with told(f"weights of {architecture}:{tag} from {_source(said)}", remedy):
        model: nn.Module = open_clip.create_model(architecture, pretrained=tag, force_quick_gelu=quick)
    return model


def _source(said: Mapping[str, Any]) -> str:
    """Where open_clip looks for weights: first on this machine, then on the hub or at an address."""
    if hub := said.get("hf_hub"):
        return f"{_hub_cache()} or huggingface.co/{hub.rstrip('/')}"
    return f"{Path('~/.cache/clip').expanduser()} or {said.get('url', 'nowhere')}"


def _hub_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(HF_HUB_CACHE)


def _from_file(architecture: str, path: Path, tag: str | None = None) -> nn.Module:
    """An architecture with the weights of a file, which are those of a tag if one is given."""
    import open_clip

    from czsl_heads.encoders.openai import NUMBERS, is_openai_state

    state = None if path.suffix in (".npz", ".npy") else read_weights(path)
    openai = state is not None and is_openai_state(state)
    fitting = ", ".join(like for like, _ in fitting_architectures(state or {})) or "no architecture of open_clip"
    remedy = f"its sizes are those of {fitting}"
    if not openai:
        if tag is None:
            options: dict[str, Any] = {"force_preprocess_cfg": _agreed(architecture, path)}
        else:
            said = open_clip.get_pretrained_cfg(_home(architecture, tag), tag)
            options = {"force_preprocess_cfg": _way(said), "force_quick_gelu": bool(said.get("quick_gelu", False))}
            architecture = _plain(architecture)
        model = _random(architecture, **options)
        with told(f"weights of {architecture} in {path}", remedy):
            open_clip.load_checkpoint(model, str(path))
        return model

    assert state is not None
    model = _random(_plain(architecture), force_quick_gelu=True)
    with told(f"weights of {architecture} in {path}", remedy):
        model.load_state_dict({name: tensor for name, tensor in state.items() if name not in (*NUMBERS, "attn_mask")})
    return model


def _agreed(architecture: str, path: Path) -> dict[str, Any]:
    """How images are prepared by all tags of an architecture and its activation; ValueError if they disagree."""
    import open_clip

    quick = bool(open_clip.get_model_config(architecture).get("quick_gelu", False))
    names = {_plain(architecture), architecture}
    tags = sorted({tag for name in names for tag in open_clip.list_pretrained_tags_by_model(name)})
    ways: list[dict[str, Any]] = []
    examples: list[str] = []  # of each way, a tag
    for tag in tags:
        said = open_clip.get_pretrained_cfg(_home(architecture, tag), tag)
        way = _way(said)
        if bool(said.get("quick_gelu", False)) is quick and way not in ways:
            ways.append(way)
            examples.append(tag)
    if len(ways) > 1:
        which = " or ".join(f'"{architecture}:{tag}={path}"' for tag in examples)
        raise ValueError(
            f"expected `model_or_name` with the tag whose weights {path} are, or came from, for their pictures are "
            f"prepared in {len(ways)} ways: {which}, got the architecture alone"
        )
    return ways[0] if ways else {}


def _way(said: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared by a tag."""
    return {name: said.get(name) for name in ("mean", "std", "interpolation", "resize_mode", "fill_color")}


def _of_file(path: Path) -> nn.Module:
    """A file by itself, which must say what it is."""
    from czsl_heads.encoders.openai import clip_of_openai_state, is_openai_state

    state = read_weights(path)
    if is_openai_state(state):
        model: nn.Module = clip_of_openai_state(state)
        return model
    fitting = []
    for architecture, quick in fitting_architectures(state):
        activation = "QuickGELU" if quick else "GELU"
        fitting.append(f'"{architecture}:{path}" ({activation})')
    which = " or ".join(fitting) or f'such as "ViT-L-14:{path}" or "ViT-L-14-quickgelu:{path}"'
    raise ValueError(
        f"expected `model_or_name` with the architecture of {path}, which does not say its activation: {which}, "
        "got the path alone"
    )


def _of_scheme(name: str, scheme: str, where: str, tokenizer: Any) -> tuple[nn.Module, Tokenizer]:
    """open_clip's own folders, here or on the hub, which bring their configuration."""
    import open_clip

    if scheme == "local-dir":
        where = str(Path(where).expanduser())
        name = f"{scheme}:{where}"
        place, remedy = where, f"the folder needs {_OPEN_CLIP_CONFIG} and a file of weights, as open_clip saves them"
        if not (Path(where) / _OPEN_CLIP_CONFIG).is_file():
            raise ValueError(
                f"expected a folder with {_OPEN_CLIP_CONFIG} in `model_or_name`, got {name!r}{_of_folder(Path(where))}"
            )
    else:
        place = f"{_hub_cache()} or huggingface.co/{where}"
        remedy = 'it is downloaded once where there is a network; a copy of it is named "local-dir:DIR"'
    with told(f"the configuration of an open_clip model in {place}", remedy):
        config = open_clip.get_model_config(name)
        missing = [part for part in ("embed_dim", "vision_cfg", "text_cfg") if part not in config]
    if missing:
        raise ValueError(f"expected {name!r} with the configuration of an open_clip model, got none of {missing[0]}")
    _check_architecture(name, config)
    tokenizer = tokenizer or _open_clip_tokenizer(name, config)
    with told(f"weights of an open_clip model in {place}", remedy):
        model = open_clip.create_model(name, require_pretrained=True)
    return model, tokenizer


def _open_clip_tokenizer(name: str, config: Mapping[str, Any]) -> Tokenizer:
    import open_clip

    home = config["text_cfg"].get("hf_tokenizer_name")
    place = f" from {_hub_cache()} or huggingface.co/{home}" if home else ""
    remedy = "it is downloaded once where there is a network; wrap(..., tokenizer=) takes another copy"
    with told(f"the tokenizer of {name}{place}", remedy):
        tokenizer: Tokenizer = open_clip.get_tokenizer(name)
    return tokenizer


def _unknown(name: str) -> str:
    """What a name could have meant that is none."""
    head, _, tail = name.partition(":")
    path = Path(name).expanduser()
    asked = "expected `model_or_name` to be the name of a CLIP or the path of its weights"
    if name and path.is_dir():
        return f"{asked}, got {name!r}{_of_folder(path)}"
    if path.suffix in WEIGHTS:
        return f"{asked}, got {name!r}, which is no file"
    hints = [f"{like}:{tail}" if tail and _home(like, tail) else like for like in _like(head)]
    if _HUB_NAME.fullmatch(name) and not hints:
        hints = [f"hf:{name}", f"hf-hub:{name}"]
    hint = f"; did you mean {' or '.join(hints)}?" if hints else ""
    return f"{asked}, got {name!r}{hint} (`czsl encoders` lists what there is)"


def _like(head: str) -> list[str]:
    """Names that are nearly this one; OpenAI writes ViT-L/14@336px for what open_clip calls ViT-L-14-336."""
    others = {entry.name for entry in entry_points(group=ENCODERS)}
    known = {name.lower(): name for name in ("tiny", *SCHEMES, *sorted(others), *architectures())}
    spelled = head.lower().replace("/", "-").replace("@", "-").removesuffix("px")
    if spelled in known:
        return [known[spelled]]
    return [known[close] for close in difflib.get_close_matches(spelled, known, n=3, cutoff=0.75)]


def _unknown_tag(architecture: str, tag: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(_plain(architecture))
    known = ", ".join(tags[:_SHOWN]) or "none"
    if len(tags) > _SHOWN:
        known += f" and {len(tags) - _SHOWN} more"
    path, hint = Path(tag).expanduser(), ""
    if path.is_dir():
        hint = _of_folder(path)
    elif path.suffix in WEIGHTS:
        hint = ", where there is no file"
    elif close := difflib.get_close_matches(tag.lower().replace("-", "_"), tags, n=1):
        hint = f"; did you mean {architecture}:{close[0]}?"
    return (
        f"expected `model_or_name` with a tag of {architecture} (one of {known}) or the path of a checkpoint, "
        f"got {f'{architecture}:{tag}'!r}{hint}"
    )


def _of_folder(folder: Path) -> str:
    """By which name a folder is asked for."""
    if not folder.is_dir():
        return ", where there is no folder"
    schemes = {_OPEN_CLIP_CONFIG: "local-dir", RECORD: "tiny", "config.json": "hf"}
    found = next((scheme for name, scheme in schemes.items() if (folder / name).is_file()), None)
    return f'; that folder is "{found}:{folder}"' if found else ", a folder that holds no model"
