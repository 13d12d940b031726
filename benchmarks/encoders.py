"""What do all tokens cost beside the image feature? ``python -m benchmarks.encoders`` (about 15 minutes on one core).

CLIPs of every family at their true sizes, with random weights: ``encode_tokens`` against the container's own encoding
of images, which gives the image feature alone, in turn. What is written is the median over rounds of the ratio of the
two, with its quartiles, and the floating-point operations of both, as torch counts them, for one image. Where a class
token is pooled, the patches want one product with the projection; where attention pools, each patch wants its way
through the pooling head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import seconds_in_turn, write_results
from czsl_heads import wrap
from czsl_heads.encoders.clip import ClipEncoder
from czsl_heads.encoders.listing import CONTAINERS

SEED = 0
OPEN_CLIP = {
    "ViT-B-32": "class token",
    "ViT-B-16-quickgelu": "class token",
    "ViT-L-14-quickgelu": "class token",
    "EVA02-B-16": "class token",
    "MobileCLIP-B": "class token",
    "vit_medium_patch16_gap_256": "mean of patches",
    "ViT-L-14-CLIPA": "mean of patches",
    "ViT-B-16-SigLIP": "attention",
    "PE-Core-S-16-384": "attention",
}
B16 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
B16 |= {"image_size": 224, "patch_size": 16}
SHORT_TEXT = {"num_hidden_layers": 1}  # which is not run


def stand_in(texts: list[str]) -> Tensor:
    """In place of tokenizers that live on the hub; no text is encoded."""
    return torch.ones(len(texts), 8, dtype=torch.long)


def of_open_clip(name: str) -> ClipEncoder:
    encoder: ClipEncoder = wrap(name, tokenizer=stand_in)
    return encoder


def of_transformers(kind: str) -> ClipEncoder:
    import transformers

    configuration = getattr(transformers, f"{kind}Config")(vision_config=B16, text_config=SHORT_TEXT)
    torch.manual_seed(SEED)
    model: nn.Module = getattr(transformers, f"{kind}Model")(configuration)
    encoder: ClipEncoder = wrap(model.eval(), tokenizer=stand_in)
    return encoder


def encoders() -> dict[str, tuple[str, Callable[[], ClipEncoder]]]:
    """By name: how it pools, and what makes it."""
    found: dict[str, tuple[str, Callable[[], ClipEncoder]]] = {
        f"{name} (open_clip)": (pool, partial(of_open_clip, name)) for name, pool in OPEN_CLIP.items()
    }
    found["CLIP B/16 (transformers)"] = ("class token", partial(of_transformers, "CLIP"))
    found["SigLIP B/16 (transformers)"] = ("attention", partial(of_transformers, "Siglip"))
    return found


def count_operations(run: Callable[[], object]) -> int:
    """Of products and convolutions; attention as two products, which the counter sees in its plain form only."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return int(counter.get_total_flops())


@torch.no_grad()
def measure(encoder: ClipEncoder, batch: int, rounds: int) -> dict[str, Any]:
    height, width = encoder.vision.image_size
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(SEED))
    images = images.to(encoder.logit_scale.device)
    tokens, own = encoder.encode_tokens(images), encoder.vision.pool(images)
    difference = float((tokens[:, 0] - own).abs().max() / own.abs().max())

    one = images[:1]
    counts = [count_operations(partial(run, one)) for run in (encoder.encode_tokens, encoder.vision.pool)]
    rivals: dict[str, Callable[[], object]] = {
        "encode_tokens": partial(encoder.encode_tokens, images),
        "own": partial(encoder.vision.pool, images),
    }
    seconds = seconds_in_turn(rivals, rounds=rounds)
    ratios = [ours / own for ours, own in zip(seconds["encode_tokens"], seconds["own"])]
    first, _, third = quantiles(ratios, n=4)
    return {
        "patches": tokens.shape[1] - 1,
        "dim": encoder.dim,
        "gigaflops_of_own": round(counts[1] / 1e9, 2),
        "extra_flops": round(counts[0] / counts[1] - 1, 5),
        "time_ratio": round(median(ratios), 3),
        "quartiles": [round(first, 3), round(third, 3)],
        "images_per_second": float(f"{batch / median(seconds['encode_tokens']):.3g}"),
        "relative_difference_of_token_0": difference,
    }


def main(batch: int = 4, rounds: int = 15, only: str = "", name: str = "encoders") -> None:
    """Measure, print and write ``results/NAME-DEVICE.json``.

    Args:
        batch: Images at once.
        rounds: How often each way is timed.
        only: Run those whose name has this in it, to try the script.
        name: Of the results.
    """
    from importlib.metadata import version

    logging.disable(logging.WARNING)  # the weights are random, which is what is wanted
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for title, (pool, make) in encoders().items():
        if only not in title:
            continue
        found[title] = {"pool": pool, **measure(make().to(device), batch, rounds)}
        print(title, found[title], flush=True)
    packages = {package: version(package) for package in CONTAINERS if package != "clip"}
    content = {"batch": batch, "rounds": rounds, "dtype": "float32", "threads": torch.get_num_threads()}
    write_results(
        f"{name}-{device}",
        "What do all tokens cost beside the image feature?",
        SEED,
        {**content, "packages": packages, "encoders": found},
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
