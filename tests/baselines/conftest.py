"""Golden files of the official models, as `from_official` takes them."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "golden" / "models"


@pytest.fixture(scope="session")
def golden():
    """Name to (tensors, attributes, objects); a CLIP's state is under "clip", the official module's under "state"."""

    def load(name, fill=0.0):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            names = [file.metadata()[kind].split("|") for kind in ("attributes", "objects")]
        rows = tensors["token_embedding.rows"]
        table = torch.full((49408, rows.shape[1]), fill)
        table[tensors["token_embedding.ids"]] = rows
        for kind, key in (("clip", "token_embedding.weight"), ("state", "clip.token_embedding.weight")):
            own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{kind}.")}
            tensors[kind] = {key.removeprefix(f"{kind}."): tensor for key, tensor in own.items()} | {key: table}
        return tensors, *names

    return load
