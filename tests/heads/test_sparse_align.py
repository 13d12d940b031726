import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from czsl_heads import SparseAlignHead
from czsl_heads.functional import alignment
from czsl_heads.functional.alignment import REDUCTIONS
from czsl_heads.heads.sparse_align import POOLS

DIM = 67
OPTIONS = [
    {"reduce": "max"},
    {"reduce": "topk", "k": 3},
    {"reduce": "logsumexp", "temperature": 0.1},
    {"reduce": "mean"},
    {"reduce": "cls"},
    {"reduce": "linear", "dim": DIM},
    {"reduce": "attention", "dim": DIM},
]
each_reduction = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["reduce"])
plain_reduction = pytest.mark.parametrize("options", OPTIONS[:5], ids=lambda options: options["reduce"])
pooled_reduction = pytest.mark.parametrize("options", OPTIONS[5:], ids=lambda options: options["reduce"])


def draw(batch=2, tokens=7, texts=3, dim=DIM, *, per_image=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text_shape = (batch, texts, dim) if per_image else (texts, dim)
    return (
        torch.randn(batch, tokens, dim, generator=generator).to(dtype),
        torch.randn(text_shape, generator=generator).to(dtype),
    )


def build(options, **more):
    """A head whose parameters, if any, have left their initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = SparseAlignHead(**options, **more)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def test_every_reduction_is_tried():
    assert tuple(options["reduce"] for options in OPTIONS) == (*REDUCTIONS, *POOLS)


@plain_reduction
@pytest.mark.parametrize("per_image", [False, True])
def test_head_is_the_function_times_the_scale(options, per_image):
    tokens, texts = draw(per_image=per_image)
    for more in ({}, {"include_cls": False}, {"cls_weight": 0.3}, {"cls_weight": 1.0, "include_cls": False}):
        expected = 100 * alignment(tokens, texts, **options, **more)
        assert torch.equal(SparseAlignHead(**options, **more)(tokens, texts), expected)


@plain_reduction
def test_plain_reductions_have_no_state(options):
    assert not list(SparseAlignHead(**options).parameters())
    assert not SparseAlignHead(**options).state_dict()


@each_reduction
def test_scale_one_gives_cosines(options):
    tokens, texts = draw()
    cosines = build(options, logit_scale=1.0)(tokens, texts)
    assert (cosines.abs() <= 1 + 1e-6).all()
    torch.testing.assert_close(build(options)(tokens, texts), 100 * cosines)


def test_linear_pooling_is_a_softmax_over_tokens():
    tokens, texts = draw()
    head = build({"reduce": "linear", "dim": DIM})
    pooled = torch.stack(
        [sum(w * token for w, token in zip(head.pool.score(image)[:, 0].softmax(0), image)) for image in tokens]
    )
    expected = 100 * F.cosine_similarity(pooled[:, None], texts[None], dim=-1)
    torch.testing.assert_close(head(tokens, texts), expected)


def test_attention_pooling_is_multi_head_attention_of_one_query():
    tokens, texts = draw(dim=128)
    head = build({"reduce": "attention", "dim": 128})  # two heads
    attention = head.pool.attention
    query, key, value = (
        F.linear(side, weight, bias).unflatten(-1, (2, 64)).transpose(1, 2)
        for side, weight, bias in zip(
            (head.pool.query.expand(2, 1, 128), tokens, tokens),
            attention.in_proj_weight.chunk(3),
            attention.in_proj_bias.chunk(3),
        )
    )
    mixed = ((query @ key.mT / 8).softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    expected = 100 * F.cosine_similarity(attention.out_proj(mixed), texts[None], dim=-1)
    torch.testing.assert_close(head(tokens, texts), expected)


@pytest.mark.parametrize("dim", [5, 64, 128, 200])
def test_attention_starts_as_a_mixture_of_the_tokens(dim):
    tokens, _ = draw(dim=dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pool = SparseAlignHead("attention", dim=dim).pool
    attention = pool.attention
    eye = torch.eye(dim)
    assert torch.equal(attention.in_proj_weight[2 * dim :], eye)
    assert torch.equal(attention.out_proj.weight, eye)
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.bias.any()
    # Equal tokens can only be mixed to themselves.
    same = tokens[:, :1].expand(-1, 7, -1)
    torch.testing.assert_close(pool(same), same[:, 0])
    # The query is small, so the mixture starts near the mean.
    assert (pool(tokens) - tokens.mean(1)).norm() < 0.1 * tokens.mean(1).norm()


def test_linear_pooling_of_equal_tokens_is_that_token():
    tokens, texts = draw(tokens=1)
    logits = SparseAlignHead("linear", dim=DIM)(tokens.expand(-1, 7, -1), texts)
    torch.testing.assert_close(logits, SparseAlignHead("cls")(tokens, texts))


@pooled_reduction
def test_pooling_learns(options):
    tokens, texts = draw()
    head = build(options)
    nn.functional.cross_entropy(head(tokens, texts), torch.tensor([0, 2])).backward()
    for name, parameter in head.named_parameters():
        if name == "pool.score.bias":  # the same on all scores of a softmax: cancels
            continue
        assert parameter.grad.abs().max() > 1e-6, name


@pooled_reduction
def test_pooling_leaves_out_cls_and_blends_it_as_the_others_do(options):
    tokens, texts = draw()
    patches = build(options)(tokens[:, 1:], texts)
    assert torch.equal(build(options, include_cls=False)(tokens, texts), patches)
    cls = SparseAlignHead("cls")(tokens, texts)
    blended = build(options, include_cls=False, cls_weight=0.3)(tokens, texts)
    torch.testing.assert_close(blended, 0.7 * patches + 0.3 * cls)
    assert torch.equal(build(options, cls_weight=1.0)(tokens, texts), cls)


@each_reduction
def test_order_of_patches_does_not_matter(options):
    tokens, texts = draw()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(6, generator=torch.manual_seed(0))])
    head = build(options, cls_weight=0.3)
    torch.testing.assert_close(head(tokens[:, order], texts), head(tokens, texts))


@each_reduction
@pytest.mark.parametrize("per_image", [False, True])
def test_each_image_alone_gives_the_same_logits(options, per_image):
    tokens, texts = draw(batch=5, per_image=per_image)
    head = build(options)
    rows = [head(tokens[b : b + 1], texts[b : b + 1] if per_image else texts) for b in range(5)]
    torch.testing.assert_close(head(tokens, texts), torch.cat(rows))
    assert head(tokens[:0], texts[:0] if per_image else texts).shape == (0, 3)


@each_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_floats_give_float32_logits_of_the_rounded_inputs(options, dtype):
    tokens, texts = draw(dtype=dtype)
    head = build(options, cls_weight=0.3)
    logits = head(tokens, texts)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(tokens.float(), texts.float()))


@each_reduction
def test_double_is_double_throughout(options):
    tokens, texts = draw(dtype=torch.float64)
    head = build(options, cls_weight=0.3).double()
    assert head(tokens, texts).dtype == torch.float64
    # The differences of gradcheck would drown in the rounding of float32.
    inputs = tokens[:1, :4].clone().requires_grad_(), texts[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(head, inputs)


@each_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(options, dtype):
    tokens, texts = draw()
    head = build(options, cls_weight=0.3)
    with torch.autocast("cpu", dtype=dtype):
        logits = head(tokens, texts)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(tokens, texts))


@pooled_reduction
def test_half_parameters_run_on_half_inputs(options):
    tokens, texts = draw(dtype=torch.bfloat16)
    logits = build(options).bfloat16()(tokens, texts)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@pooled_reduction
def test_cls_is_not_rounded_by_half_parameters(options):
    tokens, texts = draw()
    logits = build(options, cls_weight=1.0).bfloat16()(tokens, texts)
    assert torch.equal(logits, SparseAlignHead("cls")(tokens, texts))


@each_reduction
def test_nan_propagates_to_its_own_image_only(options):
    tokens, texts = draw()
    tokens[1, 0, 2] = torch.nan
    logits = build(options)(tokens, texts)
    assert logits[1].isnan().all()
    assert logits[0].isfinite().all()


@each_reduction
def test_head_compiles_whole(options):
    torch.compiler.reset()
    tokens, texts = draw()
    head = build(options, cls_weight=0.3)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = compiled(tokens, texts)
    torch.testing.assert_close(logits, head(tokens, texts))


@each_reduction
def test_head_exports_with_any_batch_and_texts(options):
    head = build(options, cls_weight=0.3).eval()
    sizes = {"tokens": {0: torch.export.Dim("batch")}, "texts": {0: torch.export.Dim("texts")}}
    program = torch.export.export(head, draw(), dynamic_shapes=sizes)
    tokens, texts = draw(batch=5, texts=11)
    torch.testing.assert_close(program.module()(tokens, texts), head(tokens, texts))


@each_reduction
@pytest.mark.parametrize("per_image", [False, True])
def test_meta_device_gives_shapes(options, per_image):
    with torch.device("meta"):
        head = SparseAlignHead(**options, cls_weight=0.3)
    logits = head(*(tensor.to("meta") for tensor in draw(per_image=per_image)))
    assert (logits.device.type, logits.shape, logits.dtype) == ("meta", (2, 3), torch.float32)


@each_reduction
def test_state_dict_makes_another_head_the_same(options):
    tokens, texts = draw()
    head, other = build(options), SparseAlignHead(**options)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(tokens, texts), head(tokens, texts))


@each_reduction
def test_a_deep_copy_is_independent(options):
    tokens, texts = draw()
    head = build(options)
    twin = copy.deepcopy(head)
    before = head(tokens, texts)
    assert torch.equal(twin(tokens, texts), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(head(tokens, texts), before)


@each_reduction
def test_inputs_are_left_alone(options):
    tokens, texts = draw()
    before = tokens.clone(), texts.clone()
    build(options, cls_weight=0.3)(tokens, texts)
    assert torch.equal(tokens, before[0])
    assert torch.equal(texts, before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "median"}, r"expected `reduce` to be one of max, .*attention, got 'median'"),
        ({"reduce": "topk"}, r'expected `k` with reduce="topk" and no other, got k=None with reduce="topk"'),
        ({"reduce": "max", "k": 3}, r'expected `k` with reduce="topk" and no other, got k=3 with reduce="max"'),
        ({"reduce": "topk", "k": 0}, r"expected `k` to be at least 1, got 0"),
        ({"temperature": 0.0}, r"expected `temperature` to be positive and finite, got 0.0"),
        ({"temperature": -1.0}, r"expected `temperature` to be positive and finite, got -1.0"),
        ({"temperature": float("inf")}, r"expected `temperature` to be positive and finite, got inf"),
        ({"temperature": float("nan")}, r"expected `temperature` to be positive and finite, got nan"),
        ({"dim": 5}, r'expected `dim` with reduce="linear" or "attention", got dim=5 with reduce="max"'),
        ({"reduce": "linear"}, r'expected `dim` with .*got dim=None with reduce="linear"'),
        ({"reduce": "attention"}, r'expected `dim` with .*got dim=None with reduce="attention"'),
        ({"reduce": "attention", "dim": 0}, r"expected `dim` to be at least 1, got 0"),
        ({"cls_weight": 1.5}, r"expected `cls_weight` to be in \[0, 1\], got 1.5"),
        ({"cls_weight": -0.5}, r"expected `cls_weight` to be in \[0, 1\], got -0.5"),
        ({"logit_scale": 0.0}, r"expected `logit_scale` to be positive and finite, got 0.0"),
        ({"logit_scale": -1.0}, r"expected `logit_scale` to be positive and finite, got -1.0"),
        ({"logit_scale": float("inf")}, r"expected `logit_scale` to be positive and finite, got inf"),
        ({"logit_scale": float("nan")}, r"expected `logit_scale` to be positive and finite, got nan"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        SparseAlignHead(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "topk", "k": 1.5}, "expected `k` to be an integer, got 1.5"),
        ({"reduce": "linear", "dim": "5"}, "expected `dim` to be an integer, got '5'"),
        ({"temperature": "a"}, "expected `temperature` to be a number, got 'a'"),
        ({"cls_weight": [0.5]}, r"expected `cls_weight` to be a number, got \[0.5\]"),
        ({"logit_scale": None}, "expected `logit_scale` to be a number, got None"),
    ],
)
def test_options_of_another_kind_are_told(options, message):
    with pytest.raises(TypeError, match=message):
        SparseAlignHead(**options)


@each_reduction
def test_wrong_inputs_are_told(options):
    tokens, texts = draw()
    head = build(options)
    with pytest.raises(TypeError, match=r"expected `tokens` of dtype .*got torch.int64"):
        head(tokens.long(), texts)
    with pytest.raises(TypeError, match=r"expected `texts` to be a torch.Tensor, got list"):
        head(tokens, ["a photo of a wet dog"])
    with pytest.raises(ValueError, match=r"expected `tokens` of shape \(batch, tokens, \w+\).*got \(7, 67\)"):
        head(tokens[0], texts)
    with pytest.raises(ValueError, match=r"expected `texts` of shape \(texts, dim\) with .*dim=67, got \(3, 66\)"):
        head(tokens, texts[:, 1:])
    with pytest.raises(ValueError, match=r"expected `texts` of shape \(batch, texts, dim\) .*got \(1, 3, 67\)"):
        head(tokens, texts[None])


@pooled_reduction
def test_pooling_checks_its_tokens_before_it_pools(options):
    head = build(options, include_cls=False)
    with pytest.raises(ValueError, match=r"expected `tokens` of shape \(batch, tokens, 67\), got \(2, 7, 5\)"):
        head(*draw(dim=5))
    with pytest.raises(ValueError, match=r"expected `tokens.shape\[1\]` to be at least 2, got 1"):
        head(*draw(tokens=1))


def test_more_neighbours_than_tokens_are_told_in_forward():
    with pytest.raises(ValueError, match=r"expected `k` to be in \[1, 6\], got 7"):
        SparseAlignHead("topk", k=7, include_cls=False)(*draw())


@each_reduction
def test_repr_tells_the_options(options):
    shown = repr(SparseAlignHead(**options, cls_weight=0.25))
    assert f"reduce='{options['reduce']}'" in shown
    for name in ("k", "dim"):
        assert (f"{name}={options.get(name)}" in shown) == (name in options)
    assert "cls_weight=0.25" in shown
    assert "logit_scale=100.0" in shown


def test_a_scalar_tensor_is_read_as_the_scale():
    scale = torch.tensor(7.0)
    head = SparseAlignHead(logit_scale=scale)
    scale.fill_(1.0)
    assert head.logit_scale == 7.0
    with pytest.raises(ValueError, match=r"expected `logit_scale` of shape \(\), got \(3,\)"):
        SparseAlignHead(logit_scale=torch.ones(3))


def test_a_scale_that_is_trained_gets_its_gradient_or_is_refused():
    log_scale = nn.Parameter(torch.tensor(2.0))
    with pytest.raises(ValueError, match="expected `logit_scale` to be a constant, got a tensor that requires grad"):
        SparseAlignHead(logit_scale=log_scale.exp())
    assert SparseAlignHead(logit_scale=log_scale.exp().detach()).logit_scale == pytest.approx(log_scale.exp().item())

    tokens, texts = draw()
    logits = SparseAlignHead()(tokens, texts, logit_scale=log_scale.exp())
    cosines = SparseAlignHead(logit_scale=1.0)(tokens, texts)
    torch.testing.assert_close(logits, log_scale.exp() * cosines)
    (gradient,) = torch.autograd.grad(logits.sum(), log_scale)
    torch.testing.assert_close(gradient, logits.sum())  # of exp(s) times a constant: itself


@plain_reduction
@pytest.mark.parametrize("exponent", [-25, 25])
def test_the_norm_of_tokens_and_texts_does_not_matter(options, exponent):
    head = SparseAlignHead(**options)
    tokens, texts = draw()
    expected = head(tokens, texts)
    torch.testing.assert_close(head(tokens * 10.0**exponent, texts), expected)
    torch.testing.assert_close(head(tokens, texts * 10.0**exponent), expected)


@pooled_reduction
def test_parameters_are_made_where_and_as_is_asked(options):
    head = SparseAlignHead(**options, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in head.parameters()} == {("meta", torch.float64)}
    torch.manual_seed(0)
    plain = SparseAlignHead(**options)
    torch.manual_seed(0)
    made = SparseAlignHead(**options, device="cpu", dtype=torch.float32)
    assert all(torch.equal(*both) for both in zip(plain.parameters(), made.parameters()))


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (torch.ones(3), ValueError, r"expected `logit_scale` of shape \(\), got \(3,\)"),
        (torch.ones(2, 3), ValueError, r"expected `logit_scale` of shape \(\), got \(2, 3\)"),
        (10.0, TypeError, "expected `logit_scale` to be a torch.Tensor, got float"),
        (torch.tensor(3), TypeError, "expected `logit_scale` of dtype .*, got torch.int64"),
    ],
)
def test_a_scale_of_a_call_that_is_no_scalar_is_told(scale, error, message):
    with pytest.raises(error, match=message):
        SparseAlignHead()(*draw(), logit_scale=scale)
