"""What CLIPs there are on this machine: packages, architectures, encoders of other packages, files of weights."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from czsl_heads.encoders.configurations import read_configurations
from czsl_heads.encoders.names import ENCODERS, WEIGHTS, is_torchscript

CONTAINERS = ("open_clip_torch", "timm", "transformers", "clip")  # by the names that pip knows
CONFIGURATIONS = {"open_clip_config.json": "hf-hub", "config.json": "hf"}  # of a repository, and how it is asked for


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
    folder = Path("~/.cache/clip").expanduser()
    files = sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS)
    # Of a file that is none of OpenAI's archives the architecture must be said.
    return [_file(path, str(path) if is_torchscript(path) else None) for path in files]


def _of_hub_cache() -> list[dict[str, Any]]:
    """Repositories of the Hugging Face hub, of those kinds that are asked for by the repository's name."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found = []
    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        for snapshot in sorted(folder.glob("snapshots/*")):
            schemes = [scheme for name, scheme in CONFIGURATIONS.items() if (snapshot / name).is_file()]
            name = f"{schemes[0]}:{repository}" if schemes else None
            found += [_file(path, name) for path in sorted(snapshot.iterdir()) if path.suffix in WEIGHTS]
    return found


def _file(path: Path, name: str | None) -> dict[str, Any]:
    size = path.stat().st_size if path.exists() else 0  # of a download that was cut, the link is left
    return {"name": name, "file": str(path), "bytes": size}
