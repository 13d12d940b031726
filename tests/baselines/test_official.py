"""States of the released code: its numbers, in any size, and what is refused."""

import pytest
import torch

from baselines.clip import CLIP
from baselines.coop import CoOp
from baselines.csp import CSP
from baselines.official import read_clip, read_vocabulary
from baselines.troika import Troika
from tests.baselines import reference

ATTRIBUTES, OBJECTS = ["sliced", "Faux.Leather", "old"], ["apple", "dog"]
SIZES = [
    {"vision": 192, "text": 64, "dim": 128, "vision_layers": 1, "text_layers": 3, "patch": 5, "grid": 3, "context": 7},
    {"vision": 96, "text": 128, "dim": 64, "vision_layers": 3, "text_layers": 1, "patch": 4, "grid": 2, "context": 16},
]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def same_gradient(actual, expected, relative=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * expected.abs().max().item())


def some_images(sizes, count=3):
    side = sizes["patch"] * sizes["grid"]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def some_pairs():
    return torch.tensor([[2, 1], [0, 0], [1, 1], [0, 1]])


def test_csp_gives_the_golden_numbers(golden):
    tensors, attributes, objects = golden("csp_tiny")
    csp = CSP.from_official(tensors["clip"], tensors["soft_embeddings"], attributes, objects)
    close(csp(tensors["images"], tensors["pairs"]), tensors["logits"])
    close(csp.scores(tensors["images"], tensors["pairs"]), tensors["logits"])
    loss = csp.loss(tensors["images"], tensors["pairs"], tensors["targets"])
    close(loss, tensors["loss"].squeeze())
    loss.backward()
    same_gradient(csp.official_tensors()["soft_embeddings"].grad, tensors["grad.soft_embeddings"])
    assert [name for name, parameter in csp.named_parameters() if parameter.requires_grad] == ["prompts.primitives"]


def test_coop_gives_the_golden_numbers(golden):
    tensors, attributes, objects = golden("coop_tiny")
    saved = tensors["clip"], tensors["soft_embeddings"], tensors["frozen_embeddings"]
    coop = CoOp.from_official(*saved, attributes, objects)
    close(coop(tensors["images"], tensors["pairs"]), tensors["logits"])
    loss = coop.loss(tensors["images"], tensors["pairs"], tensors["targets"])
    close(loss, tensors["loss"].squeeze())
    loss.backward()
    same_gradient(coop.official_tensors()["soft_embeddings"].grad, tensors["grad.soft_embeddings"])
    assert [name for name, parameter in coop.named_parameters() if parameter.requires_grad] == ["prompts.pair_context"]


def test_troika_gives_the_golden_numbers(golden):
    tensors, attributes, objects = golden("troika_tiny")
    troika = Troika.from_official(tensors["state"], attributes, objects)
    logits = troika(tensors["images"], tensors["pairs"])
    for name, rows in zip(("comp", "attr", "obj"), logits):
        close(rows, tensors[f"logits.{name}"])
    close(troika.scores(tensors["images"], tensors["pairs"]), tensors["scores"])
    loss = troika.loss(tensors["images"], tensors["pairs"], tensors["targets"])
    close(loss, tensors["loss"].squeeze())
    loss.backward()
    gradients = [name for name in tensors if name.startswith("grad.")]
    assert len(gradients) == 6
    for name in gradients:
        same_gradient(troika.official_tensors()[name.removeprefix("grad.")].grad, tensors[name])


@pytest.mark.parametrize("encode", ["plain", "prefix"])
def test_golden_numbers_do_not_depend_on_how_prompts_are_run(golden, encode):
    tensors, attributes, objects = golden("troika_tiny", fill=float("nan"))  # no other embedding has a say
    troika = Troika.from_official(tensors["state"], attributes, objects)
    troika.prompts.encode = encode
    close(troika.scores(tensors["images"], tensors["pairs"]), tensors["scores"])


@pytest.mark.parametrize("sizes", SIZES)
def test_csp_and_coop_of_any_size_agree_with_the_reference(sizes):
    state = reference.random_clip(**sizes)
    table = torch.randn(5, sizes["text"], generator=torch.Generator().manual_seed(3))
    context = torch.randn(2, sizes["text"], generator=torch.Generator().manual_seed(4))
    images, pairs, names = some_images(sizes).double(), some_pairs(), (ATTRIBUTES, OBJECTS)
    wide = reference.doubled(state)
    csp = CSP.from_official(state, table, *names).double()
    expected = reference.csp_logits(wide, table.double(), 3, images, pairs)
    close(csp(images, pairs), expected, atol=1e-9)
    coop = CoOp.from_official(state, context, table, *names).double()
    expected = reference.csp_logits(wide, table.double(), 3, images, pairs, context.double())
    close(coop(images, pairs), expected, atol=1e-9)


@pytest.mark.parametrize(("sizes", "cmt", "adapter"), [(SIZES[0], 3, 5), (SIZES[1], 1, 11), (SIZES[1], 0, 1)])
def test_troika_of_any_size_agrees_with_the_reference(sizes, cmt, adapter):
    contexts = (3, 2, 4) if sizes["context"] > 8 else (3, 2, 1)
    state = reference.random_troika(primitives=5, cmt=cmt, adapter=adapter, contexts=contexts, **sizes)
    images, pairs, targets = some_images(sizes).double(), some_pairs(), torch.tensor([3, 0, 0])
    wide = reference.doubled(state)
    leaves = {
        name: wide[name].requires_grad_() for name in wide if name in ("soft_att_obj", "lamda") or "_proj.w" in name
    }
    expected = reference.troika_logits(wide, 3, images, pairs)
    troika = Troika.from_official(state, ATTRIBUTES, OBJECTS, loss_weights=(2.0, 0.5, 0.3)).double()
    for actual, rows in zip(troika(images, pairs), expected):
        close(actual, rows, atol=1e-9)
    fused = [
        rows + attribute.softmax(0)[pairs[:, 0]] * obj.softmax(0)[pairs[:, 1]]
        for rows, attribute, obj in zip(*expected)
    ]
    close(troika.scores(images, pairs), torch.stack(fused), atol=1e-9)
    rows = zip((2.0, 0.5, 0.3), expected, (targets, pairs[targets, 0], pairs[targets, 1]))
    loss = sum(weight * torch.nn.functional.cross_entropy(logits, wanted) for weight, logits, wanted in rows)
    loss.backward()
    troika.loss(images, pairs, targets).backward()
    own = troika.official_tensors()
    for name in leaves.keys() & own.keys():
        torch.testing.assert_close(own[name].grad, leaves[name].grad, atol=1e-9, rtol=1e-6)
    assert len(leaves.keys() & own.keys()) > 6


def test_a_state_in_half_precision_is_computed_in_float32():
    state = reference.random_clip(**SIZES[0])
    table, images, names = torch.randn(5, 64), some_images(SIZES[0]), (ATTRIBUTES, OBJECTS)
    half = {name: tensor.half() for name, tensor in state.items()}
    rounded = {name: tensor.float() for name, tensor in half.items()}
    logits = CSP.from_official(half, table.half(), *names)(images, some_pairs())
    assert logits.dtype == torch.float32
    assert torch.equal(logits, CSP.from_official(rounded, table.half().float(), *names)(images, some_pairs()))


def test_a_jit_state_and_prefixed_names_are_read(golden):
    tensors, attributes, objects = golden("csp_tiny")
    state = {f"clip.{name}": tensor for name, tensor in tensors["clip"].items()}
    state |= {f"clip.{name}": torch.tensor(8) for name in ("input_resolution", "context_length", "vocab_size")}
    csp = CSP.from_official(state, tensors["soft_embeddings"], attributes, objects)
    close(csp(tensors["images"], tensors["pairs"]), tensors["logits"])


def test_parts_of_clip_named_twice_are_read_once(golden):
    tensors, attributes, objects = golden("troika_tiny")
    state = tensors["state"]
    twice = {
        f"text_encoder.{name[5:]}": tensor for name, tensor in state.items() if name.startswith("clip.transformer")
    }
    troika = Troika.from_official(state | twice, attributes, objects)
    close(troika.scores(tensors["images"], tensors["pairs"]), tensors["scores"])


def test_a_saved_state_is_not_changed_by_training(golden):
    tensors, attributes, objects = golden("csp_tiny")
    before = tensors["soft_embeddings"].clone()
    csp = CSP.from_official(tensors["clip"], tensors["soft_embeddings"], attributes, objects)
    with torch.no_grad():
        csp.prompts.primitives.add_(1)
        csp.encoder.model.logit_scale.add_(1)
    assert torch.equal(tensors["soft_embeddings"], before)


def test_names_keep_their_order_and_may_be_cleaned_before(golden):
    tensors, attributes, objects = golden("csp_tiny")
    cleaned = [name.replace(".", " ").lower() for name in objects]
    assert cleaned != objects
    models = [
        CSP.from_official(tensors["clip"], tensors["soft_embeddings"], attributes, names)
        for names in (objects, cleaned)
    ]
    first, second = (model(tensors["images"], tensors["pairs"]) for model in models)
    assert torch.equal(first, second)
    assert models[0].prompts.attributes == tuple(attributes)


def test_names_longer_than_the_context_are_no_obstacle_once_a_table_is_saved():
    state = reference.random_clip(**SIZES[0])
    longest = ["sliced", "ripe", "a name of many more words than eight positions take in"]
    assert (
        CSP.from_official(state, torch.randn(5, 64), longest, OBJECTS)(some_images(SIZES[0]), some_pairs())
        .isfinite()
        .all()
    )


def test_clip_from_a_state_says_each_pair_in_words():
    state = reference.random_clip(**SIZES[1])
    state["token_embedding.weight"] = torch.randn(49408, 128, generator=torch.Generator().manual_seed(5))
    clip = CLIP.from_official(state, ATTRIBUTES, OBJECTS)
    features = clip.encoder.encode_texts(["a photo of old dog", "a photo of faux leather apple"])
    close(clip.texts(torch.tensor([[2, 1], [1, 0]])).pairs, features / features.norm(dim=1, keepdim=True))
    images = some_images(SIZES[1])
    cosines = reference.unit(clip.encoder.encode_images(images)) @ reference.unit(features).T
    close(clip(images, torch.tensor([[2, 1], [1, 0]])), clip.encoder.logit_scale * cosines)


def test_loading_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    encoder = read_clip(reference.random_clip(**SIZES[0]))
    assert torch.equal(torch.get_rng_state(), before)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "visual.proj"), "no 'visual.proj'"),
        (lambda state: without(state, "ln_final.weight"), "no 'ln_final.weight'"),
        (lambda state: without(state, "visual.transformer.resblocks.0.mlp.c_fc.bias"), "no 'visual.transformer"),
        (lambda state: state | {"visual.extra": torch.zeros(1)}, "also 'visual.extra'"),
        (lambda state: state | {"visual.positional_embedding": torch.zeros(9, 192)}, "a square of patches, got 9 rows"),
        (lambda state: state | {"token_embedding.weight": torch.zeros(100, 64)}, r"\(49408, text_width\)"),
        (lambda state: state | {"text_projection": torch.zeros(32, 128)}, "`text_projection` of shape"),
        (lambda state: state | {"ln_final.bias": torch.zeros(65)}, "`ln_final.bias` of shape"),
    ],
)
def test_a_state_of_clip_that_cannot_be_right_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_clip(change(reference.random_clip(**SIZES[0])))


def test_a_width_without_heads_is_refused():
    with pytest.raises(ValueError, match="width // 64 heads divide, got 32"):
        read_clip(reference.random_clip(text=32))
    with pytest.raises(ValueError, match="width // 64 heads divide, got 229"):
        read_clip(reference.random_clip(vision=229))


def test_what_is_no_state_is_refused():
    with pytest.raises(TypeError, match="`clip_state` to be a mapping"):
        read_clip("ViT-B-32.pt")
    with pytest.raises(TypeError, match=r"ln_final\.weight"):
        read_clip({"ln_final.weight": 3})


def test_tables_and_contexts_that_do_not_fit_are_refused():
    state = reference.random_clip(**SIZES[0])
    with pytest.raises(ValueError, match=r"`soft_embeddings` of shape \(5, 64\).*got \(4, 64\)"):
        CSP.from_official(state, torch.zeros(4, 64), ATTRIBUTES, OBJECTS)
    with pytest.raises(ValueError, match=r"`frozen_embeddings` of shape \(5, 64\)"):
        CoOp.from_official(state, torch.zeros(3, 64), torch.zeros(5, 65), ATTRIBUTES, OBJECTS)
    with pytest.raises(ValueError, match=r"`context` of 1 to 3 vectors.*got 4"):
        CoOp.from_official(state, torch.zeros(4, 64), torch.zeros(5, 64), ATTRIBUTES, OBJECTS)
    with pytest.raises(TypeError, match=r"`soft_embeddings` to be a torch\.Tensor"):
        CSP.from_official(state, None, ATTRIBUTES, OBJECTS)
    with pytest.raises(ValueError, match="`attributes` without repeats"):
        read_vocabulary(["old", "old"], OBJECTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "comp_ctx_vectors"), "no 'comp_ctx_vectors'"),
        (lambda state: without(state, "cmt.1.mlp.3.bias"), "no 'cmt.1.mlp.3.bias'"),
        (lambda state: state | {"cmt.2.norm.bias": torch.zeros(128)}, "no 'cmt.2"),
        (lambda state: state | {"prototypes": torch.zeros(1)}, "also 'prototypes'"),
        (lambda state: without(state, "additional_visual_params.1.up_proj.bias"), "no 'additional_visual_params.1"),
        (lambda state: state | {"lamda": torch.zeros(64)}, r"`lamda` of shape \(128,\), got \(64,\)"),
        (lambda state: state | {"soft_att_obj": torch.zeros(6, 64)}, r"`soft_att_obj` of shape \(5, 64\)"),
        (lambda state: without(state, "clip.visual.proj"), "no 'visual.proj'"),
    ],
)
def test_a_state_of_troika_that_cannot_be_right_is_refused(change, message):
    state = reference.random_troika(primitives=5, contexts=(3, 3, 3), **SIZES[0])
    with pytest.raises(ValueError, match=message):
        Troika.from_official(change(state), ATTRIBUTES, OBJECTS)
    with pytest.raises(TypeError, match="`state` to be a mapping"):
        Troika.from_official(list(state), ATTRIBUTES, OBJECTS)
