import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from czsl_heads import wrap
from czsl_heads.encoders.transforms import CLIP_MEAN, CLIP_STD, image_transform


def noise_image(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seeded(transform, image, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(image)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    train=st.booleans(),
)
def test_any_image_becomes_a_tensor_of_the_asked_size(height, width, size, train):
    tensor = seeded(image_transform(size, train=train), noise_image(height, width), 0)
    assert tensor.shape == (3, *((size, size) if isinstance(size, int) else size))
    assert tensor.dtype == torch.float32
    assert tensor.isfinite().all()


def test_an_image_of_the_right_size_is_scaled_and_normalised_only():
    image = noise_image(13, 17)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(image_transform((13, 17), mean=mean, std=std)(image), expected, rtol=0, atol=1e-6)


def test_the_shorter_side_is_resized_and_the_centre_kept():
    # Left third black, the middle white, right third black: of a 3:1 image only the middle square is left.
    stripes = np.zeros((20, 60, 3), dtype=np.uint8)
    stripes[:, 20:40] = 255
    tensor = image_transform(10, mean=(0, 0, 0), std=(1, 1, 1))(Image.fromarray(stripes))
    assert tensor[:, :, 2:8].min() > 0.95
    whole = image_transform((10, 30), mean=(0, 0, 0), std=(1, 1, 1))(Image.fromarray(stripes))
    assert whole[:, :, 0:8].max() < 0.05


def test_evaluation_draws_nothing():
    image, transform = noise_image(31, 37), image_transform(23)
    state = torch.get_rng_state()
    assert torch.equal(transform(image), transform(image))
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_depends_on_the_seed_alone():
    image, transform = noise_image(31, 37), image_transform(23, train=True)
    views = [seeded(transform, image, seed) for seed in range(12)]
    again = [seeded(transform, image, seed) for seed in range(12)]
    assert all(torch.equal(view, twin) for view, twin in zip(views, again))
    assert len({view.numpy().tobytes() for view in views}) == 12  # the angle of the rotation always differs


def test_augmentation_flips_about_half_of_the_images():
    left = np.zeros((16, 16, 3), dtype=np.uint8)
    left[:, :8] = 255
    transform = image_transform(16, train=True, mean=(0, 0, 0), std=(1, 1, 1))
    views = torch.stack([seeded(transform, Image.fromarray(left), seed) for seed in range(200)])
    flipped = (views[..., 8:].mean(dim=(1, 2, 3)) > views[..., :8].mean(dim=(1, 2, 3))).sum()
    assert 70 <= flipped <= 130  # 100 on average, deviation 7


@pytest.mark.parametrize("train", [False, True])
def test_transforms_travel_to_worker_processes(train):
    transform, image = image_transform(19, train=train), noise_image(31, 37)
    twin = pickle.loads(pickle.dumps(transform))
    assert torch.equal(seeded(twin, image, 5), seeded(transform, image, 5))


def test_an_encoder_normalises_as_its_model_was_pretrained(small_clip_factory):
    model = small_clip_factory()
    image = noise_image(42, 28)
    without = wrap(model).transform()(image)
    torch.testing.assert_close(without, image_transform((42, 28), mean=CLIP_MEAN, std=CLIP_STD)(image))
    model.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0), "size": (42, 28)}
    own = wrap(model).transform()(image)
    torch.testing.assert_close(own, image_transform((42, 28), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))(image))
    assert not torch.allclose(own, without)


def test_evaluation_equals_open_clips_own_preprocessing(real_size_clip):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    own = image_transform_v2(PreprocessCfg(**real_size_clip.visual.preprocess_cfg), is_train=False)
    image = noise_image(301, 257)
    torch.testing.assert_close(wrap(real_size_clip, frozen=False).transform()(image), own(image), rtol=0, atol=0)


def test_an_encoder_takes_what_its_transform_gives(small_encoder):
    for train in (False, True):
        images = seeded(small_encoder.transform(train), noise_image(64, 64), 0)[None]
        assert small_encoder.encode_tokens(images).shape == (1, 25, 40)
