import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw

from czsl_heads import wrap
from czsl_heads.encoders.transforms import CLIP_MEAN, CLIP_STD, Preprocess
from czsl_heads.report.maps import crop_transform

FLAT = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def noise_image(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seeded(transform, image, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(image)


sides = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.one_of(st.integers(1, 40).map(lambda side: (side, side)), sides),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    fill=st.sampled_from([0, 255]),
)
def test_evaluation_equals_open_clips_own_on_every_shape(height, width, size, resize_mode, interpolation, fill):
    config = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0), "fill_color": fill}
    config |= {"resize_mode": resize_mode, "interpolation": interpolation}
    image, preprocess = noise_image(height, width), Preprocess.of_open_clip(size, config)
    theirs = outcome(image_transform_v2(PreprocessCfg(size=size, **config), is_train=False), image)
    ours = outcome(preprocess.transform(), image)
    assert type(ours) is type(theirs)  # a side that becomes zero pixels is an error in both
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
        assert ours.shape == (3, *size)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(20, 90), width=st.integers(20, 90), size=sides)
def test_training_gives_the_same_shape(height, width, size):
    tensor = seeded(Preprocess(size).transform(train=True), noise_image(height, width), 0)
    assert tensor.shape == (3, *size)
    assert tensor.dtype == torch.float32
    assert tensor.isfinite().all()


def outcome(transform, image):
    """What it gives, or the error that it raises."""
    try:
        return transform(image)
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({}, CLIP_MEAN, CLIP_STD),
        (
            {"mean": None, "std": None, "resize_mode": None, "interpolation": None, "fill_color": None},
            CLIP_MEAN,
            CLIP_STD,
        ),
        ({"mean": 0.5, "std": [0.5, 0.25, 1.0]}, (0.5, 0.5, 0.5), (0.5, 0.25, 1.0)),
    ],
)
def test_a_configuration_may_lack_any_part(config, mean, std):
    assert Preprocess.of_open_clip((8, 9), config) == Preprocess((8, 9), mean, std, "bicubic", "shortest", 0)


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)])
@pytest.mark.parametrize("mode", ["shortest", "longest"])
def test_a_disc_stays_a_disc_unless_the_picture_was_squashed(size, mode):
    disc = Image.new("RGB", (100, 100))
    ImageDraw.Draw(disc).ellipse((25, 25, 75, 75), fill="white")
    rows, columns = (Preprocess(size, **FLAT, resize_mode=mode).transform()(disc)[0] > 0.5).nonzero(as_tuple=True)
    extent = [int(places.max() - places.min()) for places in (rows, columns)]
    assert abs(extent[0] - extent[1]) <= 1
    squashed = Preprocess(size, **FLAT, resize_mode="squash").transform()(disc)[0] > 0.5
    rows, columns = squashed.nonzero(as_tuple=True)
    extent = [int(places.max() - places.min()) + 1 for places in (rows, columns)]
    assert extent == pytest.approx([size[0] / 2, size[1] / 2], abs=1.1)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(24, 24), (24, 40)])
def test_the_crop_is_the_geometry_of_the_transform(small_encoder, mode, size):
    small_encoder.preprocess = Preprocess(size, **FLAT, resize_mode=mode, fill=255)
    image = noise_image(70, 50)
    pixels = torch.from_numpy(np.asarray(crop_transform(small_encoder)(image)).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(small_encoder.transform()(image), pixels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(24, 24), (24, 40)])
def test_a_mask_is_cropped_without_new_values_and_nothing_is_inside_where_it_is_filled_up(small_encoder, mode, size):
    small_encoder.preprocess = Preprocess(size, **FLAT, resize_mode=mode, fill=255)
    mask = Image.new("L", (50, 70), 7)
    mask.paste(9, (10, 10, 40, 60))
    cropped = np.asarray(crop_transform(small_encoder, nearest=True)(mask))
    assert cropped.shape == size
    assert set(np.unique(cropped)) <= {7, 9} | ({0} if mode == "longest" else set())
    whole = crop_transform(small_encoder)
    assert {step.interpolation.value for step in whole.transforms if hasattr(step, "interpolation")} == {"bicubic"}


def test_an_image_of_the_right_size_is_scaled_and_normalised_only():
    image = noise_image(13, 17)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(Preprocess((13, 17), mean, std).transform()(image), expected, rtol=0, atol=1e-6)


def test_the_shorter_side_is_resized_and_the_centre_kept():
    # Left third black, the middle white, right third black: of a 3:1 image only the middle square is left.
    stripes = np.zeros((20, 60, 3), dtype=np.uint8)
    stripes[:, 20:40] = 255
    tensor = Preprocess((10, 10), **FLAT).transform()(Image.fromarray(stripes))
    assert tensor[:, :, 2:8].min() > 0.95
    whole = Preprocess((10, 30), **FLAT).transform()(Image.fromarray(stripes))
    assert whole[:, :, 0:8].max() < 0.05


def test_evaluation_draws_nothing():
    image, transform = noise_image(31, 37), Preprocess((23, 23)).transform()
    state = torch.get_rng_state()
    assert torch.equal(transform(image), transform(image))
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_depends_on_the_seed_alone():
    image, transform = noise_image(31, 37), Preprocess((23, 23)).transform(train=True)
    views = [seeded(transform, image, seed) for seed in range(12)]
    again = [seeded(transform, image, seed) for seed in range(12)]
    assert all(torch.equal(view, twin) for view, twin in zip(views, again))
    assert len({view.numpy().tobytes() for view in views}) == 12  # the angle of the rotation always differs


def test_augmentation_flips_about_half_of_the_images():
    left = np.zeros((16, 16, 3), dtype=np.uint8)
    left[:, :8] = 255
    transform = Preprocess((16, 16), **FLAT).transform(train=True)
    views = torch.stack([seeded(transform, Image.fromarray(left), seed) for seed in range(200)])
    flipped = (views[..., 8:].mean(dim=(1, 2, 3)) > views[..., :8].mean(dim=(1, 2, 3))).sum()
    assert 70 <= flipped <= 130  # 100 on average, deviation 7


@pytest.mark.parametrize("train", [False, True])
def test_transforms_travel_to_worker_processes(train):
    transform, image = Preprocess((19, 19)).transform(train), noise_image(31, 37)
    twin = pickle.loads(pickle.dumps(transform))
    assert torch.equal(seeded(twin, image, 5), seeded(transform, image, 5))


def test_an_encoder_normalises_as_its_model_was_pretrained(small_clip_factory):
    model = small_clip_factory()
    image = noise_image(42, 28)
    without = wrap(model).transform()(image)
    torch.testing.assert_close(without, Preprocess((42, 28), CLIP_MEAN, CLIP_STD).transform()(image))
    model.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0), "size": (42, 28)}
    own = wrap(model).transform()(image)
    torch.testing.assert_close(own, Preprocess((42, 28), (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)).transform()(image))
    assert not torch.allclose(own, without)


def test_evaluation_equals_open_clips_own_preprocessing(real_size_clip):
    own = image_transform_v2(PreprocessCfg(**real_size_clip.visual.preprocess_cfg), is_train=False)
    image = noise_image(301, 257)
    torch.testing.assert_close(wrap(real_size_clip, frozen=False).transform()(image), own(image), rtol=0, atol=0)


def test_an_encoder_takes_what_its_transform_gives(small_encoder):
    for train in (False, True):
        images = seeded(small_encoder.transform(train), noise_image(64, 64), 0)[None]
        assert small_encoder.encode_tokens(images).shape == (1, 25, 40)
