import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from czsl_heads.data import DataError, images
from czsl_heads.data.images import as_rgb, depth, open_image, orientation

GREY16 = np.linspace(0, 65535, 30).round().astype(np.uint16).reshape(5, 6)


def test_images_are_opened_as_rgb_of_any_mode(tmp_path):
    for mode in ("RGB", "L", "RGBA", "1", "P", "CMYK"):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, (5, 3)).save(path)
        image = open_image(str(path))
        assert (image.mode, image.size) == ("RGB", (5, 3))


def test_files_that_are_no_images_raise(tmp_path):
    with pytest.raises(DataError, match=r"none.png: expected an image file, got none"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text.png: expected an image, got a file of another kind"):
        open_image(tmp_path / "text.png")
    with pytest.raises(DataError, match="expected a whole image, got one that cannot be decoded"):
        open_image(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_images_cut_short_raise_a_data_error(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 29, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, kind)
    path = tmp_path / "image"
    for length in np.linspace(0, 0.9 * len(whole.getvalue()), 20).astype(int):
        path.write_bytes(whole.getvalue()[:length])
        with pytest.raises(DataError, match=f"{path}: expected"):
            open_image(path)


def decodes_or_names_the_file(path):
    try:
        return open_image(path).mode == "RGB"
    except DataError as error:
        return str(path) in str(error)


@settings(max_examples=40, deadline=None)
@given(position=st.integers(8, 400), value=st.integers(0, 255))
def test_images_with_a_wrong_byte_decode_or_raise_a_data_error(tmp_path_factory, position, value):
    pixels = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, "PNG")
    damaged = bytearray(whole.getvalue())
    damaged[position % len(damaged)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(bytes(damaged))
    assert decodes_or_names_the_file(path)


def test_an_image_too_large_to_decode_safely_raises_a_data_error(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # 30 pixels are then more than twice the limit
    with pytest.raises(DataError, match=r"1.png: expected a whole image, got one that cannot be decoded"):
        open_image(root / "images" / "wet_dog" / "1.png")


@pytest.mark.parametrize("kind", ["png", "tif", "jp2"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, kind):
    path = tmp_path / f"grey.{kind}"
    Image.fromarray(GREY16).save(path)
    expected = np.rint(GREY16 / 257).astype(np.uint8)
    found = np.asarray(open_image(path))
    assert found.shape == (5, 6, 3)
    assert np.array_equal(found, np.repeat(expected[:, :, None], 3, axis=2))


def test_a_grey_map_of_any_maximum_is_scaled_by_it(tmp_path):
    for most in (255, 4095, 65535):
        values = (GREY16 // (65536 // (most + 1))).astype(">u2" if most > 255 else np.uint8)
        head = f"P5 6 5 {most}\n".encode()
        (tmp_path / "grey.pgm").write_bytes(head + values.tobytes())
        found = np.asarray(open_image(tmp_path / "grey.pgm"))[:, :, 0]
        assert np.abs(found - values.astype(float) * 255 / most).max() <= 1


@pytest.mark.parametrize(("kind", "words"), [(np.int32, "32-bit integers"), (np.float32, "floats")])
def test_pixels_without_a_known_range_are_refused_by_name(tmp_path, kind, words):
    Image.fromarray(GREY16.astype(kind)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=rf"deep.tif: expected an image of 8 or 16 bits a channel, got {words}"):
        open_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_pictures_are_turned_as_a_viewer_turns_them(tmp_path, kind, tag):
    path, exif = tmp_path / f"turned.{kind}", Image.Exif()
    exif[0x0112] = tag
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as opened:
        assert orientation(opened) == tag
        stored = opened.convert("RGB")
        shown = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(shown))
    assert np.array_equal(np.asarray(open_image(path, upright=False)), np.asarray(stored))


def test_a_turned_deep_picture_is_turned_and_scaled(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY16).save(tmp_path / "turned.png", exif=exif)
    expected = np.rot90(np.rint(GREY16 / 257).astype(np.uint8), -1)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png"))[:, :, 0], expected)


def test_an_orientation_that_is_none_leaves_the_picture_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 77
    Image.new("RGB", (5, 3)).save(tmp_path / "odd.jpg", exif=exif)
    assert open_image(tmp_path / "odd.jpg").size == (5, 3)


def transparent(mode):
    """Left column invisible over black, right column half of a red or grey 200."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 200, 200, 128))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pictures_lie_on_white(tmp_path, mode):
    picture = transparent("RGBA" if mode == "PA" else mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if mode == "PA":
            picture = picture.quantize()
        picture.save(tmp_path / "clear.png")
        found = open_image(tmp_path / "clear.png")
    assert found.getpixel((0, 0)) == (255, 255, 255)
    expected = round(200 * 128 / 255 + 255 * 127 / 255)
    assert found.getpixel((1, 0))[0] == pytest.approx(expected, abs=2)


def test_one_transparent_colour_shows_the_background(tmp_path):
    picture = Image.new("RGB", (2, 1), (9, 8, 7))
    picture.putpixel((1, 0), (50, 60, 70))
    picture.save(tmp_path / "key.png", transparency=(9, 8, 7))
    found = open_image(tmp_path / "key.png")
    assert [found.getpixel((column, 0)) for column in (0, 1)] == [(255, 255, 255), (50, 60, 70)]


def test_a_large_jpeg_is_decoded_at_a_reduced_scale(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((160, 96), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "large.jpg", quality=98)
    whole = open_image(tmp_path / "large.jpg")
    for pixels_at_most, factor in ((160 * 96, 1), (160 * 96 - 1, 2), (160 * 96 // 5, 4), (160 * 96 // 60, 8), (9, 8)):
        monkeypatch.setattr(images, "LARGE", pixels_at_most)
        found = open_image(tmp_path / "large.jpg")
        assert found.size == (160 // factor, 96 // factor)
        distance = np.asarray(found.resize((20, 12)), float) - np.asarray(whole.resize((20, 12)), float)
        assert np.abs(distance).mean() < 6


def test_a_jpeg_beyond_the_limit_of_pillow_is_reduced_and_one_far_beyond_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (160, 96), "red").save(tmp_path / "huge.jpg")
    Image.new("RGB", (160, 96), "red").save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(images, "LARGE", 1000)
    assert open_image(tmp_path / "huge.jpg").size == (40, 24)
    with pytest.raises(DataError, match=r"huge.png: expected a whole image, got one that cannot be decoded"):
        open_image(tmp_path / "huge.png")
    monkeypatch.setattr(images, "LARGE", 100)
    with pytest.raises(DataError, match=r"huge.jpg: expected a whole image, .*of more than 6400 pixels"):
        open_image(tmp_path / "huge.jpg")


def test_pictures_in_memory_are_read_alike():
    assert as_rgb(Image.fromarray(GREY16)).getpixel((5, 4)) == (255, 255, 255)
    assert as_rgb(transparent("RGBA")).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(TypeError, match="expected `image` to be a Image, got ndarray"):
        as_rgb(GREY16)


def test_the_depth_of_a_picture_is_known():
    assert depth(Image.new("RGB", (1, 1))) == 8
    assert depth(Image.fromarray(GREY16)) == 16
    assert depth(Image.new("F", (1, 1))) == 32
