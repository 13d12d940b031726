import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from czsl_heads.heads.condenser import VACondenser
from tests.references import reference_condenser

DIM = 15
OPTIONS = [
    {},
    {"num_heads": 3},
    {"num_heads": 5, "depth": 2, "mlp_ratio": 1.4},
    {"depth": 3, "num_heads": 3, "dropout": 0.3},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def draw(batch=2, tokens=7, dim=DIM, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, dim, generator=generator).to(dtype)


def build(dim=DIM, *, seed=0, **options):
    """In eval mode, with parameters that have left their initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        condenser = VACondenser(dim, **options).eval()
        with torch.no_grad():
            for parameter in condenser.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return condenser


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 7)),
    num_heads=st.sampled_from([1, 3, 5, 15]),
    depth=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=25)
def test_condenser_equals_loops_over_images_heads_and_tokens(sizes, num_heads, depth, seed):
    tokens = draw(*sizes, dtype=torch.float64, seed=seed)
    condenser = build(num_heads=num_heads, depth=depth, seed=seed).double()
    vectors, attention = reference_condenser(condenser, tokens)
    torch.testing.assert_close(condenser(tokens), vectors)
    torch.testing.assert_close(condenser.attention(tokens), attention)


def test_block_is_multi_head_attention_and_an_mlp_around_the_query():
    tokens = draw(dim=128, dtype=torch.float64)
    condenser = build(128).double()  # two heads
    (block,) = condenser.blocks
    twin = nn.MultiheadAttention(128, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        projections = (block.query_proj, block.key_proj, block.value_proj)
        twin.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        twin.out_proj.load_state_dict(block.out_proj.state_dict())
    query = condenser.query.expand(2, 1, -1)
    normed = condenser.token_norm(tokens)
    read, weights = twin(query, normed, normed)
    query = query + read
    hidden = block.mlp_in(block.mlp_norm(query))
    query = query + block.mlp_out(hidden * torch.sigmoid(1.702 * hidden))
    torch.testing.assert_close(condenser(tokens), F.normalize(query[:, 0], dim=-1))
    torch.testing.assert_close(condenser.attention(tokens), weights[:, 0])


@pytest.mark.parametrize("depth", [1, 2])
def test_attention_is_what_the_last_block_of_forward_uses(depth):
    tokens = draw()
    condenser = build(num_heads=1, depth=depth)
    block = condenser.blocks[-1]
    query = condenser.query.expand(2, -1)
    normed = condenser.token_norm(tokens)
    for earlier in condenser.blocks[:-1]:
        query = earlier(query, normed)
    mixed = torch.einsum("bt,btd->bd", condenser.attention(tokens), normed)
    query = query + block.out_proj(block.value_proj(mixed))
    hidden = block.mlp_in(block.mlp_norm(query))
    query = query + block.mlp_out(hidden * torch.sigmoid(1.702 * hidden))
    torch.testing.assert_close(condenser(tokens), F.normalize(query, dim=-1))


@each_option
def test_rows_are_unit_vectors_and_attention_is_a_distribution(options):
    tokens = 100 * draw(batch=5)
    condenser = build(**options)
    vectors, attention = condenser(tokens), condenser.attention(tokens)
    assert vectors.shape == (5, DIM)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5))
    assert attention.shape == (5, 7)
    assert (attention >= 0).all()
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(5))


def test_starts_as_documented():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        condenser = VACondenser(512, depth=2)
    assert condenser.query.shape == (512,)
    assert float(condenser.query.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(condenser.query.detach().mean()) == pytest.approx(0, abs=0.003)
    assert torch.equal(condenser.token_norm.weight, torch.ones(512))
    # A query this small attends to all tokens nearly alike.
    attention = condenser.attention(draw(tokens=11, dim=512))
    torch.testing.assert_close(attention, torch.full((2, 11), 1 / 11), atol=0.01, rtol=0)


def test_one_block_has_the_parameters_of_troikas():
    # Counted there for a joint space of 768: no bias on query, key and value.
    with torch.device("meta"):
        condenser = VACondenser(768)
    assert condenser.num_heads == 12
    assert sum(parameter.numel() for parameter in condenser.blocks.parameters()) == 7_084_032
    assert sum(parameter.numel() for parameter in condenser.parameters()) == 7_084_032 + 3 * 768


@pytest.mark.parametrize(("dim", "heads"), [(1, 1), (40, 1), (127, 1), (128, 2), (512, 8), (640, 10)])
def test_a_head_has_64_dimensions_by_default(dim, heads):
    with torch.device("meta"):
        assert VACondenser(dim).num_heads == heads


@each_option
def test_resetting_draws_the_initial_parameters_anew(options):
    condenser = build(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        fresh = VACondenser(DIM, **options)
        torch.manual_seed(5)
        condenser.reset_parameters()  # the first draws of a new condenser are its modules' own, which it repeats
        torch.manual_seed(5)
        fresh.reset_parameters()
    for (name, parameter), other in zip(condenser.named_parameters(), fresh.parameters()):
        assert torch.equal(parameter, other), name


@each_option
def test_order_of_tokens_does_not_matter(options):
    tokens = draw(dtype=torch.float64)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    condenser = build(**options).double()
    torch.testing.assert_close(condenser(tokens[:, order]), condenser(tokens))
    torch.testing.assert_close(condenser.attention(tokens[:, order]), condenser.attention(tokens)[:, order])


@each_option
def test_scale_and_offset_of_a_token_do_not_matter(options):
    # Its layer norm takes them away, up to the epsilon.
    tokens = 10 * draw(dtype=torch.float64)
    condenser = build(**options).double()
    changed = tokens * torch.linspace(1, 5, 7, dtype=torch.float64)[:, None] + 3
    torch.testing.assert_close(condenser(changed), condenser(tokens), atol=1e-5, rtol=1e-5)


@each_option
def test_a_doubled_image_is_the_same_image(options):
    tokens = draw(dtype=torch.float64)
    condenser = build(**options).double()
    doubled = torch.cat([tokens, tokens], dim=1)
    torch.testing.assert_close(condenser(doubled), condenser(tokens))
    halves = condenser.attention(doubled).chunk(2, dim=1)
    torch.testing.assert_close(halves[0], condenser.attention(tokens) / 2)
    torch.testing.assert_close(halves[1], condenser.attention(tokens) / 2)


def test_the_only_token_gets_all_attention():
    assert torch.equal(build(depth=2).attention(draw(tokens=1)), torch.ones(2, 1))


@each_option
def test_each_image_alone_gives_the_same(options):
    tokens = draw(batch=3)
    condenser = build(**options)
    torch.testing.assert_close(condenser(tokens), torch.cat([condenser(image[None]) for image in tokens]))


@each_option
def test_an_empty_batch_gives_none(options):
    condenser = build(**options)
    assert condenser(draw(batch=0)).shape == (0, DIM)
    assert condenser.attention(draw(batch=0)).shape == (0, 7)


@each_option
def test_gradients_are_right(options):
    condenser = build(**options).double()
    tokens = draw(tokens=3, dtype=torch.float64).requires_grad_()
    names, values = zip(*condenser.named_parameters())
    small = [name for name in names if names.index(name) < 3 or "query_proj" in name or "value_proj" in name]

    def run(tokens, *some):
        return torch.func.functional_call(condenser, dict(zip(small, some)), tokens)

    inputs = (tokens, *(values[names.index(name)] for name in small))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(condenser.attention, tokens, fast_mode=True)


@each_option
def test_every_parameter_learns(options):
    condenser = build(**options)
    F.cross_entropy(condenser(draw()) @ draw(1, 3)[0].T, torch.tensor([0, 2])).backward()
    for name, parameter in condenser.named_parameters():
        assert parameter.grad.abs().max() > 1e-7, name


def test_attention_finds_the_token_that_matters():
    # The answer is written in one token of each image, which a mark on its first dimension tells from the others.
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(4, (64,), generator=generator)
    place = torch.randint(7, (64,), generator=generator)
    tokens = torch.randn(64, 7, 16, generator=generator)
    tokens[torch.arange(64), place] = 4 * F.one_hot(answers + 1, 16).float()
    tokens[torch.arange(64), place, 0] = 6
    texts = torch.eye(16)[1:5]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        condenser = VACondenser(16)
    optimizer = torch.optim.Adam(condenser.parameters(), lr=0.01)
    for _ in range(100):
        loss = F.cross_entropy(10 * condenser(tokens) @ texts.T, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert (condenser.attention(tokens).argmax(dim=1) == place).float().mean() > 0.9


def test_dropout_acts_in_training_only():
    tokens = draw()
    condenser = build(dropout=0.5, depth=2)
    assert torch.equal(condenser(tokens), condenser(tokens))
    condenser.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = condenser(tokens), condenser(tokens)
        torch.manual_seed(0)
        again = condenser(tokens)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    plain = build(dropout=0.0, depth=2)
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens))


def test_all_dropped_leaves_the_query():
    condenser = build(dropout=1.0, depth=2).train()
    expected = F.normalize(condenser.query, dim=0).expand(2, -1)
    torch.testing.assert_close(condenser(draw()), expected)


@each_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_are_computed_in_the_dtype_of_the_parameters(options, dtype):
    tokens = draw(dtype=dtype)
    condenser = build(**options)
    for call in (condenser, condenser.attention):
        assert call(tokens).dtype == torch.float32
        assert torch.equal(call(tokens), call(tokens.float()))
    doubled = copy.deepcopy(condenser).double()
    for call in (doubled, doubled.attention):
        assert call(tokens).dtype == torch.float64
        assert torch.equal(call(tokens), call(tokens.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_give_float32_unit_rows(dtype):
    tokens = draw(dtype=dtype)
    condenser = build(depth=2, num_heads=3).to(dtype)
    vectors, attention = condenser(tokens), condenser.attention(tokens)
    assert vectors.dtype == attention.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2))
    exact = copy.deepcopy(condenser).float()
    torch.testing.assert_close(vectors, exact(tokens), atol=0.05, rtol=0)
    torch.testing.assert_close(attention, exact.attention(tokens), atol=0.05, rtol=0)


@each_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(options, dtype):
    tokens = draw()
    condenser = build(**options)
    for call in (condenser, condenser.attention):
        with torch.autocast("cpu", dtype=dtype):
            result = call(tokens)
        assert result.dtype == torch.float32
        assert torch.equal(result, call(tokens))


@each_option
def test_nan_propagates_to_its_own_image_only(options):
    tokens = draw()
    tokens[1, 4, 2] = torch.nan
    condenser = build(**options)
    for call in (condenser, condenser.attention):
        assert call(tokens)[1].isnan().all()
        assert call(tokens)[0].isfinite().all()


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]], ids=str)  # compiling takes its time
def test_condenser_compiles_whole(options):
    torch.compiler.reset()
    tokens = draw()
    condenser = build(**options)
    compiled = torch.compile(condenser, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = compiled(tokens)
    torch.testing.assert_close(vectors, condenser(tokens))


@each_option
def test_condenser_exports_with_any_batch_and_tokens(options):
    condenser = build(**options)
    sizes = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    program = torch.export.export(condenser, (draw(),), dynamic_shapes=sizes)
    tokens = draw(batch=5, tokens=11)
    torch.testing.assert_close(program.module()(tokens), condenser(tokens))


@each_option
def test_meta_device_gives_shapes(options):
    with torch.device("meta"):
        condenser = VACondenser(DIM, **options)
    tokens = draw().to("meta")
    for result, shape in ((condenser(tokens), (2, DIM)), (condenser.attention(tokens), (2, 7))):
        assert (result.device.type, result.shape, result.dtype) == ("meta", shape, torch.float32)
    condenser.to_empty(device="cpu").reset_parameters()
    assert condenser.eval()(draw()).isfinite().all()


@each_option
def test_state_dict_makes_another_condenser_the_same(options):
    tokens = draw()
    condenser, other = build(**options), build(seed=1, **options)
    assert not torch.equal(other(tokens), condenser(tokens))
    other.load_state_dict(condenser.state_dict())
    assert torch.equal(other(tokens), condenser(tokens))


def test_a_deep_copy_is_independent():
    tokens = draw()
    condenser = build(depth=2)
    before = condenser(tokens)
    twin = copy.deepcopy(condenser)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(condenser(tokens), before)


def test_inputs_are_left_alone():
    tokens = draw()
    before = tokens.clone()
    condenser = build(depth=2)
    condenser(tokens), condenser.attention(tokens)
    assert torch.equal(tokens, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, r"expected `dim` to be at least 1, got 0"),
        ({"dim": 15.0}, TypeError, r"expected `dim` to be an integer, got 15.0"),
        ({"depth": 0}, ValueError, r"expected `depth` to be at least 1, got 0"),
        ({"depth": "2"}, TypeError, r"expected `depth` to be an integer, got '2'"),
        ({"num_heads": 0}, ValueError, r"expected `num_heads` to be at least 1, got 0"),
        ({"num_heads": 2.5}, TypeError, r"expected `num_heads` to be an integer, got 2.5"),
        ({"num_heads": 4}, ValueError, r"expected `num_heads` to divide dim=15, got 4"),
        ({"dim": 200}, ValueError, r"expected `num_heads` to divide dim=200, got 3"),
        ({"mlp_ratio": 0.0}, ValueError, r"expected `mlp_ratio` to be positive and finite, got 0.0"),
        ({"mlp_ratio": 0.05}, ValueError, r"expected `mlp_ratio \* dim` to be at least 1, got 0.75"),
        ({"mlp_ratio": None}, TypeError, r"expected `mlp_ratio` to be a number, got None"),
        ({"dropout": 1.5}, ValueError, r"expected `dropout` to be in \[0, 1\], got 1.5"),
        ({"dropout": float("nan")}, ValueError, r"expected `dropout` to be in \[0, 1\], got nan"),
        ({"dropout": "a"}, TypeError, r"expected `dropout` to be a number, got 'a'"),
    ],
)
def test_wrong_options_are_told(options, error, message):
    with pytest.raises(error, match=message):
        VACondenser(**{"dim": DIM, **options})


@pytest.mark.parametrize("method", ["forward", "attention"])
def test_wrong_tokens_are_told(method):
    call = getattr(build(), method)
    with pytest.raises(TypeError, match=r"expected `tokens` to be a torch.Tensor, got list"):
        call([[[1.0]]])
    with pytest.raises(TypeError, match=r"expected `tokens` of dtype .*got torch.int64"):
        call(draw().long())
    with pytest.raises(ValueError, match=r"expected `tokens` of shape \(batch, tokens, 15\), got \(7, 15\)"):
        call(draw()[0])
    with pytest.raises(ValueError, match=r"expected `tokens` of shape \(batch, tokens, 15\), got \(2, 7, 16\)"):
        call(draw(dim=16))
    with pytest.raises(ValueError, match=r"expected `tokens.shape\[1\]` to be at least 1, got 0"):
        call(draw(tokens=0))


def test_repr_tells_the_options():
    shown = repr(VACondenser(DIM, depth=2, num_heads=3, mlp_ratio=2.0, dropout=0.1))
    assert "dim=15, depth=2, num_heads=3, mlp_ratio=2.0, dropout=0.1" in shown


def test_parameters_are_made_where_and_as_is_asked():
    condenser = VACondenser(8, depth=2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in condenser.parameters()} == {("meta", torch.bfloat16)}
    torch.manual_seed(0)
    plain = VACondenser(8)
    torch.manual_seed(0)
    made = VACondenser(8, device="cpu", dtype=torch.float32)
    assert all(torch.equal(*both) for both in zip(plain.parameters(), made.parameters()))
