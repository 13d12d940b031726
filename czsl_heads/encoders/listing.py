"""What CLIPs there are on this machine: packages, architectures, encoders of other packages, files of weights."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from czsl_heads._files import read_json
from czsl_heads.encoders.configurations import read_configurations
from czsl_heads.encoders.hugging_face import MODEL_TYPES
from czsl_heads.encoders.names import ENCODERS
from czsl_heads.encoders.weights import WEIGHTS, is_torchscript

CONTAINERS = ("open_clip_torch", "timm", "transformers", "clip")  # by the names that pip knows


def list_encoders() -> dict[str, Any]:
    """What :func:`czsl_heads.wrap` can load here; plain values, found without network.

    Returns:
        ``containers``: packages and their versions, None where one is not installed. ``architectures``: those of
        open_clip by family, each with its tags; ``refused``: the others, each with the reason. ``packages``: encoders
        of other packages. ``weights``: files in the usual caches, as ``name`` (by which ``wrap`` takes it, or None),
        ``file`` and ``bytes``.

    Example:
        >>> found = list_encoders()
        >>> "openai" in found["architectures"]["ViT, class token"]["ViT-L-14"], found["refused"]["RN50"]
        (True, 'its attention pooling projects one vector, and not single patches')
    """
    import open_clip

    taken: dict[str, dict[str, list[str]]] = {}
    refused: dict[str, str] = {}
    for each in read_configurations():
        if each.reason:
            refused[each.name] = each.reason
        else:
            taken.setdefault(each.family, {})[each.name] = open_clip.list_pretrained_tags_by_model(each.name)
    return {
        "containers": {package: _version(package) for package in CONTAINERS},
        "architectures": taken,
        "refused": refused,
        "packages": {entry.name: entry.value for entry in entry_points(group=ENCODERS)},
        "weights": [*_of_clip_cache(), *_of_hub_cache()],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _of_clip_cache() -> list[dict[str, Any]]:
    """Where OpenAI's package and open_clip keep what they download."""
    import open_clip

    tags: dict[str, str] = {}  # by the file that is downloaded for each
    for architecture, tag in open_clip.list_pretrained():
        address = open_clip.get_pretrained_cfg(architecture, tag).get("url", "")
        tags.setdefault(Path(address).name, f"{architecture}:{tag}")
    folder = Path("~/.cache/clip").expanduser()
    files = sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS)
    return [_file(path, _by_path(path, tags.get(path.name))) for path in files]


def _by_path(path: Path, tag: str | None) -> str | None:
    """How a file is asked for: with its tag, or by itself if it is one of OpenAI's archives."""
    if tag is not None:
        return f"{tag}={path}" if _taken(tag) else None
    return str(path) if is_torchscript(path) else None


def _of_hub_cache() -> list[dict[str, Any]]:
    """Repositories of the Hugging Face hub, named by open_clip's tag, or by what their configuration says."""
    import open_clip
    from huggingface_hub.constants import HF_HUB_CACHE

    tags: dict[str, str] = {}  # by repository
    for architecture, tag in open_clip.list_pretrained():
        home = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "")
        tags.setdefault(home.rstrip("/"), f"{architecture}:{tag}")
    found = []
    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        for snapshot in sorted(path for path in folder.glob("snapshots/*") if path.is_dir()):
            name = _taken(tags.get(repository)) or _configured(repository, snapshot)
            found += [_file(path, name) for path in sorted(snapshot.iterdir()) if path.suffix in WEIGHTS]
    return found


def _configured(repository: str, snapshot: Path) -> str | None:
    """How a repository with a configuration is asked for; None if it is of no kind that is taken."""
    if (snapshot / "open_clip_config.json").is_file():
        return f"hf-hub:{repository}"
    try:
        kind = read_json(snapshot / "config.json").get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return f"hf:{repository}" if kind in MODEL_TYPES else None


def _taken(name: str | None) -> str | None:
    """A name of open_clip, unless its architecture is refused."""
    if name is None:
        return None
    architecture = name.partition(":")[0]
    refused = {each.name for each in read_configurations() if each.reason}
    return None if architecture in refused else name


def _file(path: Path, name: str | None) -> dict[str, Any]:
    size = path.stat().st_size if path.exists() else 0  # of a download that was cut, the link is left
    return {"name": name, "file": str(path), "bytes": size}
