"""Tokens of encoders that are not trained, kept on disk: encoded once for all rows, epochs and commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from czsl_heads.data.layout import CompositionDataset, ImageSplit
from czsl_heads.data.packed import built_once, content_key, new_array
from czsl_heads.encoders.digest import identity, weights_digest
from czsl_heads.encoders.transforms import split_transform
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method
from czsl_heads.training.loaders import eval_loader

LIMIT = 20 * 10**9  # bytes of one file
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class FrozenTokens(Dataset[Any]):
    """Tokens of images ``[tokens, dim]`` and the columns of their pairs, from a memory-mapped file.

    Indexed by lists of numbers or of ``(epoch, number)``. It is pickled without the tokens.
    """

    def __init__(self, path: Path, columns: Tensor) -> None:
        self.path, self.columns = path, columns
        self._tokens: Any = None

    def __len__(self) -> int:
        return len(self.columns)

    def __getitems__(self, indices: list[int] | list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        if self._tokens is None:
            self._tokens = np.load(self.path, mmap_mode="r")  # [n, tokens, dim]
        rows = [index[1] if isinstance(index, tuple) else index for index in indices]
        tokens = torch.from_numpy(self._tokens[rows])
        return tokens.view(torch.bfloat16) if tokens.dtype == torch.int16 else tokens, self.columns[rows]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None}


def encoded(method: Method, images: Tensor) -> Any:
    """What a method makes of images ``[batch, 3, height, width]``, or of tokens, which are encoded already."""
    return images if images.ndim == 3 else method.encode(images)


def evaluation_images(
    dataset: CompositionDataset,
    split: str,
    method: Method,
    context: Callable[[], AbstractContextManager[Any]],
    *,
    precision: str,
    batch_size: int,
    workers: int | None,
) -> ImageSplit | FrozenTokens:
    """The images of a split without augmentation; or their tokens, where these are the same in every epoch and row.

    They are where the data set has a ``cache_dir``, and the method encodes images by its CLIP alone, whose weights are
    the pretrained ones. A file is named by the pictures, the transform, the CLIP, the precision and the batch size, so
    tokens equal those of a run without to the bit.

    Args:
        dataset: The data set.
        split: Which images.
        method: Encodes them, in eval mode.
        context: Of the trainer's precision.
        precision: The name of that.
        batch_size: Images at once.
        workers: Processes that load images.
    """
    images = dataset.images(split, method.encoder.transform())
    inner = method.method if isinstance(method, Condensed) else method
    if dataset.cache_dir is None or type(inner).encode is not Method.encode:
        return images
    parts = split_transform(method.encoder.transform())
    if parts is None or weights_digest(cast(nn.Module, method.encoder)) != inner.encoder_digest:
        return images

    device = method.encoder.logit_scale.device
    dtype = next(method.parameters()).dtype
    about: list[Any] = [
        precision,
        dtype,
        device.type,
        torch.__version__,
        batch_size,
        getattr(method.encoder, "dense", "none"),
    ]
    about += [PIL.__version__, images.upright]
    about += [_ADDRESS.sub("", repr(part)) for part in parts]
    about.append(identity(method.encoder, inner.encoder_digest))
    loader = eval_loader(images, batch_size, workers=workers)

    @torch.no_grad()
    def fill(path: Path) -> None:
        with evaluating(method):
            write(path)

    def write(path: Path) -> None:
        file, start = None, 0
        for batch, _ in loader:
            with context():
                tokens = method.encode(batch.to(device, dtype)).cpu()  # [batch, tokens, dim]
            plain = tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens
            if file is None:
                if plain[0].nbytes * len(images) > LIMIT:
                    raise _TooLargeError
                file = new_array(path, plain.numpy().dtype, (len(images), *plain.shape[1:]))
            file[start : start + len(plain)] = plain.numpy()
            start += len(plain)
        assert file is not None
        file.flush()

    try:
        path = built_once(dataset.cache_dir, f"tokens-{content_key(images, repr(about))}.npy", fill)
    except _TooLargeError:
        return images
    return FrozenTokens(path, images.columns)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all of a model into eval mode, and then each part into its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _TooLargeError(Exception):
    """The tokens would take more than is kept."""
