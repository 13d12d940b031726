import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from czsl_heads.data.drawing import (
    ATTRIBUTE_KINDS,
    ATTRIBUTES,
    NAMED_COLORS,
    OBJECTS,
    OUTLINES,
    Figure,
    Scene,
    compose,
    render,
)
from czsl_heads.data.shapes import companions, split_pairs, unseen_pairs

EVERY_PAIR = [(attribute, obj) for attribute in ATTRIBUTES for obj in OBJECTS]


def scene_of(attribute, obj, seed, imbalance):
    return compose(attribute, obj, np.random.default_rng(seed), imbalance=imbalance, companions=companions())


def lone_figure(obj="circle", attributes=(), color=(200, 60, 60), radius=0.3, angle=0.0):
    return Scene(Figure(obj, attributes, color, (0.5, 0.5), radius, angle), (), clutter=0.0)


def drawn(scene, size=48, seed=0):
    image, mask = render(scene, size, np.random.default_rng(seed))
    return np.asarray(image).astype(int), np.asarray(mask) > 0


def grown(mask, steps):
    """The mask and everything within so many pixels of it."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def polygon_area(points):
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(points, np.roll(points, -1, axis=0)))) / 2


def test_there_are_twelve_attributes_of_four_kinds_and_twelve_objects():
    assert len(ATTRIBUTES) == len(OBJECTS) == 12
    assert list(ATTRIBUTES) == sorted(ATTRIBUTE_KINDS)
    assert Counter(ATTRIBUTE_KINDS.values()) == {"color": 4, "texture": 3, "contour": 3, "fill": 2}
    assert set(NAMED_COLORS) == {name for name, kind in ATTRIBUTE_KINDS.items() if kind == "color"}


@pytest.mark.parametrize("obj", OBJECTS)
def test_outlines_are_of_comparable_size_around_the_centre(obj):
    outline = OUTLINES[obj]
    assert 0.8 < np.abs(outline).max() < 1.3
    assert 0.5 < polygon_area(outline) < 3.2
    assert np.hypot(*outline.T).max() < 1.45  # within the box that a figure is drawn in


@settings(max_examples=40, deadline=None)
@given(pair=st.sampled_from(EVERY_PAIR), seed=st.integers(0, 10**6), imbalance=st.floats(0, 1))
def test_a_scene_shows_the_named_pair_inside_the_frame(pair, seed, imbalance):
    named = scene_of(*pair, seed, imbalance).named
    assert named.obj == pair[1]
    assert named.wears(pair[0])
    assert len(named.attributes) <= 2
    assert all(named.radius <= place <= 1 - named.radius for place in named.center)
    assert 0.2 <= named.radius <= 0.36


@settings(max_examples=40, deadline=None)
@given(pair=st.sampled_from(EVERY_PAIR), seed=st.integers(0, 10**6), imbalance=st.floats(0, 1))
def test_no_unseen_pair_is_shown_unsaid(pair, seed, imbalance):
    scene = scene_of(*pair, seed, imbalance)
    shown = {(attribute, scene.named.obj) for attribute in scene.named.attributes} - {pair}
    shown |= {(attribute, figure.obj) for figure in scene.distractors for attribute in figure.attributes}
    assert shown <= set(split_pairs("train"))
    assert not shown & set(unseen_pairs())


def test_every_seen_pair_is_shown_unsaid_somewhere():
    scenes = [scene_of(*EVERY_PAIR[seed % 144], seed, 1.0) for seed in range(700)]
    shown = {
        (attribute, figure.obj) for scene in scenes for figure in scene.distractors for attribute in figure.attributes
    }
    assert shown == set(split_pairs("train"))


def test_what_is_worn_unsaid_is_of_another_kind():
    for pair in EVERY_PAIR:
        for seed in range(10):
            kinds = [ATTRIBUTE_KINDS[name] for name in scene_of(*pair, seed, 1.0).named.attributes]
            assert len(set(kinds)) == len(kinds)


def test_without_imbalance_nothing_is_unsaid_but_the_colour():
    for pair in EVERY_PAIR:
        scene = scene_of(*pair, 0, 0.0)
        assert scene.distractors == ()
        assert scene.clutter == 0
        assert scene.named.attributes == pair[:1]
        assert (scene.named.center, scene.named.radius, scene.named.angle) == ((0.5, 0.5), 0.3, 0.0)


def test_more_imbalance_leaves_more_unsaid():
    def unsaid(imbalance):
        scenes = [scene_of(*EVERY_PAIR[seed % 144], seed, imbalance) for seed in range(432)]
        return (
            np.mean([len(scene.distractors) for scene in scenes]),
            np.mean([len(scene.named.attributes) - 1 for scene in scenes]),
            np.mean([math.dist(scene.named.center, (0.5, 0.5)) for scene in scenes]),
            np.std([scene.named.radius for scene in scenes]),
            np.std([scene.named.angle for scene in scenes]),
            np.mean([scene.clutter for scene in scenes]),
        )

    levels = [unsaid(imbalance) for imbalance in (0.0, 0.25, 0.5, 1.0)]
    for less, more in pairwise(levels):
        assert all(low < high for low, high in zip(less, more))
    assert 2.0 < levels[-1][0] <= 3.0
    assert 0.4 < levels[-1][1] < 0.6


def test_the_colour_is_the_named_one_or_no_named_one():
    def hue_distance(color, name):
        return math.dist(color, NAMED_COLORS[name])

    for attribute, obj in EVERY_PAIR:
        named = scene_of(attribute, obj, 0, 0.0).named
        nearest = min(NAMED_COLORS, key=lambda name: hue_distance(named.color, name))
        if attribute in NAMED_COLORS:
            assert nearest == attribute
            assert hue_distance(named.color, attribute) < 70


def test_distractors_do_not_stand_on_the_named_object():
    for seed in range(100):
        scene = scene_of(*EVERY_PAIR[seed % 144], seed, 1.0)
        for figure in scene.distractors:
            assert math.dist(figure.center, scene.named.center) > scene.named.radius + 0.8 * figure.radius


def test_a_drawing_is_an_rgb_image_and_a_mask_of_its_size():
    for size in (48, 61):
        image, mask = render(scene_of("red", "fish", 1, 1.0), size, np.random.default_rng(1))
        assert (image.mode, image.size) == ("RGB", (size, size))
        assert (mask.mode, mask.size) == ("L", (size, size))
        assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_the_same_generator_draws_the_same_pixels():
    scene = scene_of("dotted", "heart", 3, 1.0)
    first, second, other = (render(scene, 48, np.random.default_rng(seed))[0] for seed in (5, 5, 6))
    assert first.tobytes() == second.tobytes() != other.tobytes()


@pytest.mark.parametrize("obj", OBJECTS)
def test_the_mask_is_where_the_object_is(obj):
    red, mask = drawn(lone_figure(obj, color=(250, 20, 20)))
    blue, same = drawn(lone_figure(obj, color=(20, 20, 250)))
    assert np.array_equal(mask, same)
    painted = np.abs(red - blue).max(axis=2) > 100
    assert (painted & ~grown(mask, 1)).sum() == 0
    assert (mask & ~grown(painted, 1)).sum() == 0
    scaled = 0.3 * 48 * OUTLINES[obj]
    length = np.hypot(*(np.roll(scaled, -1, axis=0) - scaled).T).sum()
    assert abs(mask.sum() - polygon_area(scaled)) < 0.5 * length  # the edge is right to half a pixel


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_attribute_changes_the_looks_near_the_object_only(attribute):
    plain, mask = drawn(lone_figure("house"))
    worn = lone_figure("house", (attribute,), color=NAMED_COLORS.get(attribute, (200, 60, 60)))
    image, same = drawn(worn)
    changed = np.abs(image - plain).max(axis=2) > 12
    assert np.array_equal(mask, same)
    if attribute != "red":
        assert changed.sum() > 0.08 * mask.sum()
    reach = {"glowing": 12, "outlined": 3, "dashed": 3}.get(attribute, 1)
    assert not (changed & ~grown(mask, reach)).any()


def test_attributes_look_different_from_each_other():
    looks = [
        drawn(lone_figure("square", (name,), color=NAMED_COLORS.get(name, (150, 150, 150))))[0] for name in ATTRIBUTES
    ]
    for index, image in enumerate(looks):
        for other in looks[:index]:
            assert (np.abs(image - other).max(axis=2) > 40).sum() > 40


def test_a_hollow_object_shows_the_ground_inside():
    ground, _ = drawn(Scene(Figure("circle", (), (0, 0, 0), (0.0, 0.0), 0.001, 0.0), (), 0.0))
    hollow, mask = drawn(lone_figure("circle", ("hollow",), radius=0.4))
    filled, _ = drawn(lone_figure("circle", radius=0.4))
    centre = (slice(20, 28), slice(20, 28))
    assert mask[centre].all()
    assert np.abs(hollow - ground)[centre].max() <= 12
    assert np.abs(filled - ground)[centre].max() > 12


def test_the_named_object_is_drawn_over_distractors():
    alone = lone_figure("square", radius=0.3)
    behind = Figure("circle", (), (20, 220, 20), (0.5, 0.5), 0.12, 0.0)
    image, mask = drawn(Scene(alone.named, (behind,), 0.0))
    green = (image[..., 1] > 150) & (image[..., 0] < 100)
    assert not (green & mask).any()
    beside = Figure("circle", (), (20, 220, 20), (0.12, 0.12), 0.12, 0.0)
    image, mask = drawn(Scene(alone.named, (beside,), 0.0))
    assert ((image[..., 1] > 150) & (image[..., 0] < 100)).sum() > 20
    assert np.array_equal(mask, drawn(alone)[1])


def test_a_figure_over_the_edge_is_cut_off():
    outside = Figure("circle", ("glowing",), (250, 20, 20), (0.0, 1.0), 0.3, 0.0)
    image, mask = drawn(Scene(outside, (), 0.0))
    assert mask.sum() == pytest.approx(math.pi * (0.92 * 0.3 * 48) ** 2 / 4, rel=0.15)
    assert mask[-1, 0]
    assert image.shape == (48, 48, 3)


def test_clutter_and_ground_vary_with_the_generator():
    scene = lone_figure()
    grounds = [drawn(scene, seed=seed)[0][:6, :6].mean() for seed in range(20)]
    assert np.std(grounds) > 5


def test_clutter_grows_with_its_knob():
    named = lone_figure().named
    plain = [drawn(Scene(named, (), 0.0), seed=seed)[0] for seed in range(20)]

    def changed(clutter):
        images = [drawn(Scene(named, (), clutter), seed=seed)[0] for seed in range(20)]
        return np.mean([(np.abs(image - ground).max(axis=2) > 40).sum() for image, ground in zip(images, plain)])

    assert 0 == changed(0.0) < changed(0.3) < changed(0.6) < changed(1.0)


def test_a_larger_drawing_shows_the_same_scene():
    scene = scene_of("red", "house", 2, 0.0)
    small, large = (render(scene, size, np.random.default_rng(0))[1] for size in (48, 96))
    shrunk = np.asarray(large.resize((48, 48), Image.Resampling.BOX)) > 127
    assert (shrunk != (np.asarray(small) > 0)).sum() < 30
