"""What several test files share: one small data set, small random CLIPs, and one CLIP of a real size."""

import copy
import logging
from pathlib import Path

import open_clip
import pytest
import torch

from czsl_heads import wrap
from czsl_heads.data import make_shapes
from czsl_heads.encoders.open_clip import OpenClipEncoder

torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other

# All sizes differ, so that a transposed or confused axis cannot go unnoticed.
SMALL_VISION = {"image_size": (42, 28), "patch_size": 7, "width": 48, "layers": 3, "head_width": 16}
SMALL_TEXT = {"context_length": 77, "width": 56, "heads": 4, "layers": 2}
SMALL_DIM = 40


_TOKENIZER = open_clip.SimpleTokenizer()  # reading its merges takes longer than most tests
_built = {}


def build_small(kind=open_clip.CLIP, *, vision=None, text=None, **kwargs):
    """A small random open_clip model in eval mode; ``vision`` and ``text`` change its configuration."""
    arguments = (SMALL_DIM, {**SMALL_VISION, **(vision or {})}, {**SMALL_TEXT, **(text or {})})
    key = repr((kind, arguments, kwargs))
    if key not in _built:  # a copy costs a tenth of drawing OpenAI's whole vocabulary again
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _built[key] = kind(*arguments, **kwargs).eval()
    return copy.deepcopy(_built[key])


@pytest.fixture(scope="session")
def small_clip_factory():
    """:func:`build_small`, for tests that need a configuration or a class of their own."""
    return build_small


@pytest.fixture
def small_encoder() -> OpenClipEncoder:
    """A small random CLIP, wrapped and frozen; new for every test, which may change it."""
    return wrap(build_small(), tokenizer=_TOKENIZER)


@pytest.fixture(scope="session")
def real_size_clip():
    """A random ViT-B-32, shared: no test may change it."""
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random, which is what is wanted
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-32", pretrained=None)
    logging.disable(logging.NOTSET)
    return model.eval()


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """A shapes data set of one image a pair, shared: no test may change it."""
    root = tmp_path_factory.mktemp("worlds") / "shapes"
    return make_shapes(root, train_per_pair=1, val_per_pair=1, test_per_pair=1)


@pytest.fixture(scope="session")
def configured(shapes_root):
    """Makes configurations of commands on that data set: one epoch a stage, on the CPU, unless told otherwise."""
    from czsl_heads.training.config import configure

    def make(method="sac", *, by=configure, options=None, **arguments):
        short = {"batch_size": 48, "condense_epochs": 1, "condense_augment": False}
        if method != "clip":
            short["epochs"] = 1
        if method == "sac":
            short["lora.rank"] = 1
        flags = {"accelerator": "cpu", "enable_progress_bar": False}
        known = {"data": str(shapes_root), "options": {**short, **(options or {})}, "trainer": flags}
        return by(method, **{**known, **arguments})

    return make


@pytest.fixture(scope="session")
def small_ablation(tmp_path_factory, configured) -> Path:
    """The folder of a finished ablation of one seed and one epoch a stage, shared: no test may change it."""
    from czsl_heads.training.ablate import run_ablation

    out = tmp_path_factory.mktemp("ablations") / "small"
    run_ablation(out, configured())
    return out


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
