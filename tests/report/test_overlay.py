"""Pictures show the map that they are of, at a size that can be seen, and never break on a name."""

import base64
import io

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from czsl_heads.report.maps import TokenMap
from czsl_heads.report.overlay import (
    MARK,
    SIDE,
    cosine_panel,
    data_uri,
    enlarge,
    mark_winner,
    overlay,
    panels,
    save_strip,
    share_panel,
)

PATCHES = torch.tensor([[0.25, 0.5, 0.0], [0.75, 1.0, 0.125]])


@pytest.fixture
def image():
    return Image.new("RGB", (48, 32), (0, 0, 0))


def patches_of(picture):
    """The middle pixel of each of 2 x 3 patches."""
    pixels = np.asarray(picture).astype(int)
    height, width = pixels.shape[:2]
    return pixels[height // 4 :: height // 2, width // 6 :: width // 3][:2, :3]


@pytest.mark.parametrize(
    ("size", "expected"), [((48, 48), (192, 192)), ((48, 32), (288, 192)), ((224, 300), (224, 300))]
)
def test_small_images_grow_by_whole_multiples(size, expected):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    grown = enlarge(picture)
    assert grown.size == expected
    assert min(grown.size) >= SIDE
    step = expected[0] // size[0]
    assert np.array_equal(np.asarray(grown)[::step, ::step], np.asarray(picture))


def test_patches_are_coloured_from_the_lowest_to_the_highest(image):
    shown = patches_of(overlay(image, PATCHES))
    expected = 0.6 * colormaps["viridis"](PATCHES.numpy(), bytes=True)[..., :3]
    assert np.abs(shown - expected).max() <= 1.5
    assert np.array_equal(shown, patches_of(overlay(image, 5 * PATCHES - 3)))


def test_a_constant_map_is_dark_all_over(image):
    shown = patches_of(overlay(image, torch.ones(2, 3)))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 1
    assert np.array_equal(shown[0, 0], patches_of(overlay(image, PATCHES))[0, 2])


@pytest.mark.parametrize(
    ("prefix", "box"), [(0.5, (96, 96, 192, 192)), (2.0, (0, 0, 288, 192))], ids=["a patch wins", "[CLS] wins"]
)
def test_the_winner_is_outlined(image, prefix, box):
    found = TokenMap(torch.tensor([prefix]), PATCHES)
    plain = overlay(image, PATCHES)
    before = np.asarray(plain).copy()
    marked = np.asarray(mark_winner(plain, found))
    rows, columns = (marked == np.array(MARK)).all(axis=2).nonzero()
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box
    assert np.array_equal(np.asarray(plain), before)
    assert np.array_equal(patches_of(marked), patches_of(plain))


def test_notes_hold_the_range_of_the_map(image):
    found = TokenMap(torch.tensor([0.3]), PATCHES)
    assert cosine_panel("t", image, found).note == "patches 0.00 to 1.00, [CLS] 0.30: a patch wins"
    assert cosine_panel("t", image, TokenMap(torch.tensor([1.5]), PATCHES)).note.endswith("[CLS] 1.50: [CLS] wins")
    assert share_panel("t", image, TokenMap(torch.tensor([0.3]), PATCHES / 10)).note == (
        "patches 0.0 % to 10.0 %, [CLS] 30.0 %"
    )


def test_a_model_without_condenser_has_no_panel_of_it(image):
    found = TokenMap(torch.tensor([0.3]), PATCHES)
    maps = {"alignment": found, "attention": found}
    assert len(panels(image, maps)) == 3
    assert len(panels(image, {**maps, "condenser": found})) == 4


def test_an_address_holds_the_picture(image):
    kind, _, content = data_uri(overlay(image, PATCHES)).partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert np.abs(patches_of(picture) - patches_of(overlay(image, PATCHES))).max() < 12


def test_a_strip_is_written_whatever_the_title(image, tmp_path):
    found = TokenMap(torch.tensor([0.3]), PATCHES)
    strip = panels(image, {"alignment": found, "condenser": found, "attention": found})
    save_strip("$x_{", [strip[0]._replace(title="\\frac$"), *strip[1:]], tmp_path / "new" / "maps.png")
    with Image.open(tmp_path / "new" / "maps.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 4 * SIDE
        # the brightest patch of each of three maps, and what is around it
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 8
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["maps.png"]
