"""One folder, one ablation: nothing is written before all its settings were tried, and other settings are refused."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from czsl_heads._files import write_json
from czsl_heads.data.integrity import broken_images
from czsl_heads.data.layout import CompositionDataset, DataError, layout_files, read_dataset
from czsl_heads.data.shapes import make_shapes, shapes_space
from czsl_heads.heads.sparse_align import Reduce
from czsl_heads.space import CompositionSpace
from czsl_heads.training.config import OPEN_WORLD, AblationConfig
from czsl_heads.training.open_world import FEASIBILITY, feasibility_table, keep_feasibility
from czsl_heads.training.run import build_head, build_sac
from czsl_heads.training.stage import check_validation
from czsl_heads.training.trainer import check_trainer

CONFIG = "config.json"
# May differ when an ablation is taken up again: they decide which numbers there are, or how fast, but beyond rounding
# none of them.
_FREE = ("seeds", "studies", "options.workers", "options.checkpoint", "trainer.enable_progress_bar")


def open_folder(out: Path, config: AblationConfig) -> CompositionDataset:
    """Claim ``out`` for an ablation, or take it up again, and give its data set.

    A new folder is made only after the data was read, every image of it decoded, the model and the trainer built once,
    and the feasibility of pairs found where it is asked for; so a wrong argument leaves nothing behind.

    Raises:
        ValueError: The data, the encoder, an option or a flag is wrong; or ``out`` is of another ablation.
        OSError: ``out`` holds something else, or cannot be written.
    """
    path = out / CONFIG
    table = None
    if path.exists():
        dataset = None if config.shapes else read_dataset(config.data)
        _compare(out, json.loads(path.read_text()), _settings(config))
        check_trainer(config.trainer)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"expected `out` to be a new or empty folder or one of an ablation, got {out}")
    else:
        dataset = None if config.shapes else _checked_dataset(config.data)
        space = shapes_space() if dataset is None else dataset.space
        _rehearse(config, space)
        table = None if config.world == "closed" else feasibility_table(config, space)
    try:
        write_json(path, _settings(config))
        if dataset is None:
            dataset = _drawn_dataset(out / "shapes", config)
        if config.world == "open" and not (out / FEASIBILITY).exists():
            keep_feasibility(out, feasibility_table(config, dataset.space) if table is None else table)
    except OSError as error:
        raise OSError(f"expected `out` to be a folder that can be written, got {out} ({error.strerror})") from error
    return dataset


def _drawn_dataset(root: Path, config: AblationConfig) -> CompositionDataset:
    assert config.shapes is not None
    if not root.exists():
        print(f"drawing the shapes data set in {root}", file=sys.stderr, flush=True)
        make_shapes(root, **asdict(config.shapes))
    return read_dataset(root)


def _checked_dataset(root: str) -> CompositionDataset:
    dataset = read_dataset(root)
    check_validation(dataset)
    print(f"decoding all images of {root} once", file=sys.stderr, flush=True)
    if broken := broken_images(dataset):
        more = f" (and {len(broken) - 1} more; czsl check lists them)" if len(broken) > 1 else ""
        raise DataError(broken[0] + more)
    return dataset


def _rehearse(config: AblationConfig, space: CompositionSpace) -> None:
    check_trainer(config.trainer)
    sac = build_sac(config.encoder, space, config.options, condenser=True)
    size = sac.encoder.image_size
    blank = torch.zeros(1, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        tokens = sac.encoder.encode_tokens(blank)
        for reduce in get_args(Reduce) if "reductions" in config.studies else ("cls", "max"):
            build_head(sac.encoder, config.options, reduce)(tokens, tokens[:, 0])


def _settings(config: AblationConfig) -> dict[str, Any]:
    """What is kept in the folder: the configuration, and what the files of the data set say."""
    settings: dict[str, Any] = json.loads(json.dumps(config.as_dict()))
    if config.shapes is None:
        content = b"".join(path.read_bytes() for path in layout_files(Path(config.data)))
        settings["data_digest"] = hashlib.sha256(content).hexdigest()
    return settings


def _compare(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    before, now = (dict(_leaves({**OPEN_WORLD, **settings})) for settings in (found, wanted))
    for name in sorted(before.keys() | now.keys()):
        if name not in _FREE and before.get(name) != now.get(name):
            raise ValueError(
                f"expected `out` to be new or of the same settings, got {out}, whose {name} is {before.get(name)!r} "
                f"instead of {now.get(name)!r}"
            )


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
