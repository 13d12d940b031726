"""Every test compares with ``encode="plain"``, which runs each prompt by itself and is tested in ``test_soft.py``."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from czsl_heads import CompositionSpace, SoftPrompts, add_lora, wrap
from czsl_heads.prompts import soft

ATTRIBUTES, OBJECTS = ["old", "wet", "red", "blue", "tiny"], ["dog", "circle", "cat"]
WORLD = [(attribute, obj) for attribute in ATTRIBUTES for obj in OBJECTS]
TOWERS = {
    "gelu": {},
    "quick_gelu": {"quick_gelu": True},
    "deep": {"text": {"layers": 5, "width": 44, "heads": 11}},
    "layer_scale": {"text": {"ls_init_value": 0.3}},
    "pooled_by_id": {"text": {"pool_type": "eos", "eos_id": 49407}},
    "text_class": {"kind": open_clip.CustomTextCLIP, "text": {"proj_bias": True}},
    "no_projection": {"kind": open_clip.CustomTextCLIP, "text": {"proj_type": "none", "width": 40}},
}
MATRICES = ("q", "k", "v", "o", "fc", "proj")


@pytest.fixture
def space():
    """Out of order: three attributes of several pairs, one of one, and one of none."""
    columns = [10, 3, 11, 0, 5, 9, 4]
    return CompositionSpace(ATTRIBUTES, OBJECTS, seen=[WORLD[column] for column in columns])


def draw(modules, scale=0.3, seed=0):
    """Give all parameters that train values of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return modules


def both_ways(encoder, space, **options):
    """Trained prompts whose parameters are all apart, twice: from a shared prefix, and plain."""
    shared, plain = (SoftPrompts(encoder, space, encode=encode, **options) for encode in ("prefix", "plain"))
    draw([shared], scale=0.02)
    plain.load_state_dict(shared.state_dict())
    return shared, plain


def weighted_sum(features):
    generator = torch.Generator().manual_seed(0)
    return sum((part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum() for part in features)


def learned(prompts, encoder):
    named = {**dict(prompts.named_parameters()), **dict(encoder.model.named_parameters())}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def gradients(prompts, encoder, space):
    parameters = learned(prompts, encoder)
    found = torch.autograd.grad(weighted_sum(prompts(space)), list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found) if gradient is not None}


def assert_alike(encoder, shared, plain, space):
    """Features to 1e-5, and gradients to 1e-5 of the largest."""
    for part, expected in zip(shared(space), plain(space)):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)
    found, expected = gradients(shared, encoder, space), gradients(plain, encoder, space)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        bound = 1e-5 * max([1.0, *gradient.abs().flatten().tolist()])
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=bound, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_shared_prefix_changes_neither_features_nor_gradients(small_clip_factory, space, tower):
    encoder = wrap(small_clip_factory(**TOWERS[tower]))
    assert_alike(encoder, *both_ways(encoder, space), space)


def test_a_real_size_tower_is_encoded_alike(real_size_clip, space):
    encoder = wrap(real_size_clip, frozen=False)
    shared, plain = both_ways(encoder, space)
    with torch.no_grad():
        for part, expected in zip(shared(space), plain(space)):
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("matrices", [("q", "v"), ("o", "fc"), MATRICES])
def test_adapters_in_the_text_tower_learn_alike(small_encoder, space, matrices):
    bare = both_ways(small_encoder, space)[0](space).pairs
    draw(add_lora(small_encoder, matrices=matrices, rank=3, alpha=5.0, tower="text"), scale=0.1)
    shared, plain = both_ways(small_encoder, space)
    assert not torch.allclose(shared(space).pairs, bare, atol=1e-3)
    assert sum("deltas" in name for name in gradients(shared, small_encoder, space)) == 2 * 2 * len(matrices)
    assert_alike(small_encoder, shared, plain, space)


def test_adapters_may_be_in_some_blocks_and_merged(small_encoder, space):
    (adapter,) = draw(add_lora(small_encoder, layers=1, tower="text"), scale=0.1)
    shared, plain = both_ways(small_encoder, space)
    assert_alike(small_encoder, shared, plain, space)
    before = shared(space).pairs
    adapter.merge()
    torch.testing.assert_close(shared(space).pairs, before, rtol=0, atol=1e-5)
    adapter.train()
    with pytest.raises(ValueError, match="expected updates unmerged in training mode"):
        shared(space)


def test_adapters_that_come_later_are_seen(small_encoder, space):
    shared, plain = both_ways(small_encoder, space)
    draw(add_lora(small_encoder, matrices=MATRICES, tower="text"), scale=0.1)
    assert_alike(small_encoder, shared, plain, space)


def test_a_tower_that_trains_gets_the_same_gradients(small_clip_factory, space):
    encoder = wrap(small_clip_factory(), frozen=False)
    shared, plain = both_ways(encoder, space)
    assert {"transformer.resblocks.1.attn.in_proj_weight", "positional_embedding", "ln_final.weight"} <= set(
        gradients(shared, encoder, space)
    )
    assert_alike(encoder, shared, plain, space)


@pytest.mark.parametrize("context", ["", "a", "an old picture that somebody once took of"])
def test_the_prefix_may_be_of_any_length(small_encoder, space, context):
    assert_alike(small_encoder, *both_ways(small_encoder, space, context=context), space)


def test_the_three_contexts_may_differ_in_length(small_encoder, space, generator):
    ways = [SoftPrompts(small_encoder, space, encode=encode) for encode in ("prefix", "plain")]
    for name, length in [("pair_context", 5), ("attribute_context", 0), ("object_context", 2)]:
        context = 0.02 * torch.randn(length, 56, generator=generator)
        for prompts in ways:
            setattr(prompts, name, nn.Parameter(context.clone()))
    assert_alike(small_encoder, *ways, space)


def test_the_prefix_may_leave_room_for_a_pair_only(small_encoder, space):
    shared, plain = both_ways(small_encoder, space, context=" ".join(["dog"] * 73))
    with torch.no_grad():
        for part, expected in zip(shared(space), plain(space)):
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "objects"), [(["red"], OBJECTS), (ATTRIBUTES, ["dog"]), (["red"], ["dog"])], ids=str
)
def test_a_single_attribute_or_object_is_no_exception(small_encoder, attributes, objects):
    space = CompositionSpace(attributes, objects, seen=[(attributes[0], objects[0])]).open_world()
    assert_alike(small_encoder, *both_ways(small_encoder, space), space)


def test_names_of_several_tokens_are_one_position(small_encoder):
    space = CompositionSpace(["very old", "red"], ["traffic light", "dog"], seen=[("very old", "dog")]).open_world()
    assert_alike(small_encoder, *both_ways(small_encoder, space), space)


def test_any_pairs_in_any_order_are_encoded_alike(small_encoder):
    world = CompositionSpace(ATTRIBUTES, OBJECTS, seen=WORLD)
    shared, plain = both_ways(small_encoder, world)
    expected = plain(world).pairs

    @settings(max_examples=25, deadline=None)
    @given(columns=st.lists(st.integers(0, 14), min_size=1, max_size=15, unique=True))
    def check(columns):
        chosen = CompositionSpace(ATTRIBUTES, OBJECTS, seen=[WORLD[column] for column in columns])
        torch.testing.assert_close(shared(chosen).pairs, expected[columns], rtol=0, atol=1e-5)

    check()


def test_auto_shares_the_prefix_where_it_can(small_encoder, space):
    shared, _ = both_ways(small_encoder, space)
    auto = SoftPrompts(small_encoder, space)
    auto.load_state_dict(shared.state_dict())
    for part, expected in zip(auto(space), shared(space)):
        assert torch.equal(part, expected)


def test_only_the_positions_that_differ_are_run(small_encoder, space):
    """[SOS] and context once, each attribute once, object and [EOS] for each pair; the same for the primitives."""
    positions = [0, 0]
    for layer, block in enumerate(small_encoder.blocks("text")):

        def count(module, inputs, output, layer=layer):
            positions[layer] += output.shape[0] * output.shape[1]

        block.mlp.register_forward_hook(count)
    SoftPrompts(small_encoder, space, encode="prefix")(space)
    fronts, stems, leaves = 3 * 4, 5, 7 + 5 + 3
    assert positions == [fronts + stems + 2 * leaves, leaves]  # of the last block [EOS] alone is read


@pytest.mark.parametrize("rows", [1, 3, 7, 14, 15])
@pytest.mark.parametrize("encode", ["prefix", "plain"])
def test_checkpointing_in_parts_changes_nothing(small_encoder, space, monkeypatch, rows, encode):
    monkeypatch.setattr(soft, "_CHECKPOINTED_ROWS", rows)
    draw(add_lora(small_encoder, tower="text"), scale=0.1)
    _, plain = both_ways(small_encoder, space)
    prompts = SoftPrompts(small_encoder, space, encode=encode, checkpoint=True)
    prompts.load_state_dict(plain.state_dict())
    assert_alike(small_encoder, prompts, plain, space.open_world())


@pytest.mark.parametrize("rows", [1, 7, 14, 15])
def test_encoding_in_parts_without_gradients_changes_nothing(small_encoder, space, monkeypatch, rows):
    shared, plain = both_ways(small_encoder, space)
    expected = plain(space.open_world())
    monkeypatch.setattr(soft, "_ROWS", rows)
    with torch.no_grad():
        for part, reference in zip(shared(space.open_world()), expected):
            torch.testing.assert_close(part, reference, rtol=0, atol=1e-5)


def kept_numbers(prompts, space):
    """How many numbers a forward pass keeps for the backward pass; views of one storage count once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = weighted_sum(prompts(space))
    del loss
    return sum(storage.nbytes() // 4 for storage in storages.values())


def wide_space():
    """Thirteen attributes and eleven objects, all pairs."""
    attributes, objects = ([f"{letter}{number}" for number in range(n)] for letter, n in (("a", 13), ("b", 11)))
    return CompositionSpace(attributes, objects, seen=[(attributes[0], objects[0])]).open_world()


def test_activations_shrink_with_the_positions(small_clip_factory):
    encoder, space = wrap(small_clip_factory(text={"layers": 4})), wide_space()
    weights = sum(parameter.numel() for parameter in encoder.model.transformer.parameters())
    shared, plain = (kept_numbers(way, space) - weights for way in both_ways(encoder, space))
    positions = 3 * 4 + 13 + 2 * (143 + 13 + 11)
    assert shared / plain < 1.1 * positions / (7 * 143 + 6 * (13 + 11))


@pytest.mark.parametrize("by_encoder", [False, True])
def test_checkpoints_keep_no_activations_of_single_prompts(small_encoder, by_encoder):
    space = wide_space()
    kept = kept_numbers(SoftPrompts(small_encoder, space), space)
    if by_encoder:
        small_encoder.model.set_grad_checkpointing()
    checkpointed = SoftPrompts(small_encoder, space, checkpoint=not by_encoder)
    weights = sum(parameter.numel() for parameter in small_encoder.model.transformer.parameters())
    assert kept_numbers(checkpointed, space) - weights < 0.2 * (kept - weights)


def test_checkpointing_runs_each_part_again_in_the_backward_pass(small_encoder, space, monkeypatch):
    monkeypatch.setattr(soft, "_CHECKPOINTED_ROWS", 5)
    sizes = []
    small_encoder.blocks("text")[0].mlp.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    features = SoftPrompts(small_encoder, space, checkpoint=True)(space)
    assert sizes == [3, 5, 5, 2, 5, 3]  # three fronts; attributes as stems, and 7 pairs; 5 attributes; 3 objects
    sizes.clear()
    weighted_sum(features).backward()
    assert sorted(sizes) == [2, 3, 5, 5]


def test_the_derivative_is_that_of_finite_differences(small_clip_factory):
    encoder = wrap(small_clip_factory(text={"width": 12, "heads": 2}).double())
    draw(add_lora(encoder, matrices=MATRICES, rank=1, tower="text"), scale=0.3)
    space = CompositionSpace(["old", "red"], ["dog", "cat"], seen=[("old", "dog"), ("red", "dog"), ("red", "cat")])
    shared = SoftPrompts(encoder, space, context="a", encode="prefix").double()
    draw([shared], scale=0.5)
    names, values = zip(*shared.named_parameters())

    def features(*parameters):
        return tuple(torch.func.functional_call(shared, dict(zip(names, parameters)), (space,)))

    assert torch.autograd.gradcheck(features, values, fast_mode=True)


def test_dropout_of_primitives_is_the_same_either_way(small_encoder, space):
    shared, plain = (way.train() for way in both_ways(small_encoder, space, dropout=0.4))
    torch.manual_seed(3)
    features = shared(space)
    torch.manual_seed(3)
    for part, expected in zip(features, plain(space)):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


def test_dropout_inside_the_tower_is_drawn_anew_at_each_call(small_encoder, space):
    for adapter in draw(add_lora(small_encoder, dropout=0.5, tower="text"), scale=0.2):
        adapter.train()
    prompts = SoftPrompts(small_encoder, space, encode="prefix")
    torch.manual_seed(0)
    first, second = prompts(space).pairs, prompts(space).pairs
    assert not torch.allclose(first, second, atol=1e-4)
    torch.manual_seed(0)
    assert torch.equal(prompts(space).pairs, first)


def drop_front(module, inputs):
    """Dropout on the first four positions of what has them: [SOS] and context."""
    (hidden,) = inputs
    return torch.cat([F.dropout(hidden[:, :4]), hidden[:, 4:]], dim=1) if hidden.shape[1] >= 4 else None


@pytest.mark.parametrize("encode", ["prefix", "plain"])
def test_dropout_of_what_is_shared_is_drawn_once(small_encoder, encode):
    space = CompositionSpace(["red"], OBJECTS, seen=[("red", "dog")]).open_world()
    (adapter,) = draw(add_lora(small_encoder, matrices=["v"], layers=1, tower="text"), scale=0.5)
    adapter.deltas["v"].register_forward_pre_hook(drop_front)
    prompts = SoftPrompts(small_encoder, space, encode=encode)
    with torch.no_grad():
        prompts.primitives[1:] = prompts.primitives[1]  # the three pairs then read alike
    torch.manual_seed(0)
    pairs, again = prompts(space).pairs, prompts(space).pairs
    assert torch.allclose(pairs, pairs[:1].expand(3, -1), atol=1e-5) is (encode == "prefix")
    assert not torch.allclose(pairs, again, atol=1e-4)


def test_checkpoints_draw_the_same_dropout_again(small_encoder, space, monkeypatch):
    monkeypatch.setattr(soft, "_CHECKPOINTED_ROWS", 64)  # in one part, so that the draws come in the same order
    for adapter in draw(add_lora(small_encoder, dropout=0.5, tower="text"), scale=0.2):
        adapter.train()
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        prompts = SoftPrompts(small_encoder, space, encode="prefix", checkpoint=checkpoint)
        found.append(gradients(prompts, small_encoder, space))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5)


def test_attention_dropout_acts_in_training_only(small_encoder, space):
    shared, plain = both_ways(small_encoder, space)
    for block in small_encoder.blocks("text"):
        block.attn.dropout = 0.5
    torch.testing.assert_close(shared(space).pairs, plain(space).pairs, rtol=0, atol=1e-5)
    small_encoder.train()
    torch.manual_seed(0)
    assert not torch.allclose(shared(space).pairs, shared(space).pairs, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_autocast_is_followed_within_its_precision(small_encoder, space, adapted):
    if adapted:
        draw(add_lora(small_encoder, matrices=MATRICES, tower="text"), scale=0.1)
    shared, plain = both_ways(small_encoder, space)
    exact = plain(space)
    with torch.autocast("cpu", torch.bfloat16):
        half, plain_half = shared(space), plain(space)
    weighted_sum(half).backward()
    assert shared.primitives.grad.dtype == torch.float32
    for part, other, expected in zip(half, plain_half, exact):
        assert part.dtype == other.dtype
        torch.testing.assert_close(part.float(), expected, rtol=0, atol=0.03)  # bf16 keeps 8 bits of unit rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_weights_is_followed(small_encoder, space, dtype):
    shared, plain = both_ways(small_encoder, space)
    expected = plain(space)
    small_encoder.to(dtype)
    bound = 0.05 if dtype is torch.bfloat16 else 1e-6
    for part, reference in zip(shared.to(dtype)(space), expected):
        assert part.dtype == dtype
        torch.testing.assert_close(part.float(), reference, rtol=0, atol=bound)


def test_meta_tensors_are_encoded_to_their_shapes(small_encoder, space):
    add_lora(small_encoder, tower="text")
    prompts = SoftPrompts(small_encoder, space, encode="prefix").to("meta")
    small_encoder.to("meta")
    features = prompts(space)
    assert all(part.device.type == "meta" for part in features)
    assert [tuple(part.shape) for part in features] == [(7, 40), (5, 40), (3, 40)]


def test_compiling_gives_one_graph_and_the_same_features(small_encoder, space):
    add_lora(small_encoder, layers=1, tower="text")
    shared, _ = both_ways(small_encoder, space)
    expected = shared(space)
    compiled = torch.compile(shared, fullgraph=True, backend="eager")
    for part, reference in zip(compiled(space), expected):
        torch.testing.assert_close(part, reference, rtol=0, atol=1e-6)
    weighted_sum(compiled(space)).backward()
    assert shared.pair_context.grad.abs().sum() > 0


class Experts(nn.Module):
    """Two linear layers, mixed for each token by a share that the token decides; changes what a layer gives by it."""

    def __init__(self, width, out):
        super().__init__()
        self.gate, self.first, self.second = nn.Linear(width, 1), nn.Linear(width, out), nn.Linear(width, out)

    def forward(self, tokens):
        share = self.gate(tokens).sigmoid()
        return share * self.first(tokens) + (1 - share) * self.second(tokens)


class ExpertAttention(nn.Module):
    """An adapter that is no LoRA and has nothing but what the protocol asks for, and the call of the block."""

    per_token = True

    def __init__(self, base):
        super().__init__()
        self.base, self.num_heads, self.attention_dropout = base, base.num_heads, base.dropout
        self.into, self.out = Experts(base.embed_dim, 3 * base.embed_dim), Experts(base.embed_dim, base.embed_dim)

    def project_in(self, tokens):
        fused = F.linear(tokens, self.base.in_proj_weight, self.base.in_proj_bias) + self.into(tokens)
        return fused.chunk(3, dim=-1)

    def project_out(self, mixed):
        return self.base.out_proj(mixed) + self.out(mixed)

    def forward(self, query, key, value, need_weights=False, attn_mask=None):
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.project_in(query)]
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=attn_mask)
        return self.project_out(mixed.transpose(1, 2).flatten(2)), None


class ExpertMLP(nn.Module):
    """The same beside an MLP."""

    per_token = True

    def __init__(self, base, width):
        super().__init__()
        self.base, self.beside = base, Experts(width, width)

    def forward(self, tokens):
        return self.base(tokens) + self.beside(tokens)


def add_experts(encoder):
    torch.manual_seed(0)
    block = encoder.blocks("text")[1]
    block.attn, block.mlp = ExpertAttention(block.attn), ExpertMLP(block.mlp, 56)
    return block


def test_adapters_of_any_package_share_a_prefix_if_they_say_how(small_encoder, space):
    bare = both_ways(small_encoder, space)[0](space).pairs
    add_experts(small_encoder)
    shared, plain = both_ways(small_encoder, space)
    assert not torch.allclose(shared(space).pairs, bare, atol=1e-3)
    assert sum("gate" in name for name in gradients(shared, small_encoder, space)) == 3 * 2
    assert_alike(small_encoder, shared, plain, space)


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_an_adapter_that_reads_several_tokens_is_run_on_whole_prompts(small_encoder, space, part):
    layer = getattr(add_experts(small_encoder), part)
    layer.per_token = False
    with pytest.raises(ValueError, match=rf"a layer that may read several tokens at once \({type(layer).__name__}\)"):
        SoftPrompts(small_encoder, space, encode="prefix")
    auto, plain = (SoftPrompts(small_encoder, space, encode=encode) for encode in ("auto", "plain"))
    for found, expected in zip(auto(space), plain(space)):
        assert torch.equal(found, expected)


class Other(ResidualAttentionBlock):
    """Not open_clip's own: it may do anything."""


def replace_block(encoder):
    encoder.blocks("text")[1] = Other(56, 4)


def replace_attention(encoder):
    encoder.blocks("text")[1].attn = nn.MultiheadAttention(56, 4, batch_first=True, add_bias_kv=True)


def hook_block(encoder):
    encoder.blocks("text")[1].register_forward_hook(lambda module, inputs, output: None)


def hook_attention(encoder):
    encoder.blocks("text")[1].attn.register_forward_pre_hook(lambda module, inputs: None)


OBSTACLES = [
    (replace_block, "got text blocks of kind Other"),
    (replace_attention, r"attention of another layout \(MultiheadAttention\)"),
    (hook_block, "got hooks on a text block or its attention"),
    (hook_attention, "got hooks on a text block or its attention"),
]


@pytest.mark.parametrize(("change", "reason"), OBSTACLES)
def test_other_blocks_raise_and_auto_runs_all_positions(small_encoder, space, change, reason):
    shared, plain = both_ways(small_encoder, space)
    auto = SoftPrompts(small_encoder, space)
    auto.load_state_dict(plain.state_dict())
    change(small_encoder)
    with pytest.raises(ValueError, match=rf'can share a prefix \(encode="prefix"\), got .*{reason[4:]}'):
        SoftPrompts(small_encoder, space, encode="prefix")
    with pytest.raises(ValueError, match=reason[4:]):
        shared(space)
    for part, expected in zip(auto.eval()(space), plain(space)):
        assert torch.equal(part, expected)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"no_causal_mask": True}, "got a text tower that is not causal"),
        ({"qk_norm": True}, "got text blocks of kind CustomResidualAttentionBlock"),
    ],
)
def test_other_towers_raise_and_auto_runs_all_positions(small_clip_factory, space, text, reason):
    encoder = wrap(small_clip_factory(text=text))
    with pytest.raises(ValueError, match=reason):
        SoftPrompts(encoder, space, encode="prefix")
    auto, plain = (SoftPrompts(encoder, space, encode=encode) for encode in ("auto", "plain"))
    for part, expected in zip(auto(space), plain(space)):
        assert torch.equal(part, expected)


class Closed:
    """An Encoder of somebody else, which offers what the protocol asks for and no more."""

    def __init__(self, encoder):
        self._inner = encoder

    def __getattr__(self, name):
        if name in ("enter_text_blocks", "leave_text_blocks", "checkpoints_text"):
            raise AttributeError(name)
        return getattr(self._inner, name)


def test_an_encoder_that_cannot_be_run_from_outside_raises_and_auto_runs_all_positions(small_encoder, space):
    encoder = Closed(small_encoder)
    with pytest.raises(ValueError, match="got Closed, whose text blocks cannot be run from outside"):
        SoftPrompts(encoder, space, encode="prefix")
    plain = SoftPrompts(small_encoder, space, encode="plain")
    assert torch.equal(SoftPrompts(encoder, space)(space).pairs, plain(space).pairs)


def test_fronts_of_several_lengths_run_apart(small_encoder, space):
    shared, plain = both_ways(small_encoder, space)
    rows = [space.pairs, torch.arange(5)[:, None]]
    found = []
    for prompts in (shared, plain):
        attributes, objects = prompts.primitives.split([5, 3])
        contexts = [prompts.pair_context, prompts.attribute_context[:1]]
        features = prompts.encode_kinds(contexts, [(attributes, objects), (attributes,)], rows)
        weighted_sum(features).backward()
        found.append(
            [
                *(part.detach() for part in features),
                prompts.pair_context.grad,
                prompts.attribute_context.grad,
                prompts.primitives.grad,
            ]
        )
    for part, expected in zip(*found):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("encode", ["prefix", "plain"])
def test_a_context_that_leaves_no_room_is_told(small_encoder, space, encode):
    prompts = SoftPrompts(small_encoder, space, encode=encode)
    length = len(small_encoder.model.positional_embedding)
    for spare in (0, 1):
        context = torch.zeros(length - 4 + spare, small_encoder.text_dim)  # beside [SOS], two words and [EOS]
        kinds = [context], [(prompts.primitives[:5], prompts.primitives[5:])], [space.pairs]
        if spare == 0:
            assert prompts.encode_kinds(*kinds)[0].shape == (7, small_encoder.dim)
        else:
            with pytest.raises(ValueError, match="expected"):
                prompts.encode_kinds(*kinds)
