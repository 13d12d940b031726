"""SAC under the paper's words: prompts and tokens compared, scored by Eqs. 12-13, trained by Eqs. 4-8."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from czsl_heads import SAC, CompositionSpace, DynamicMemoryBank, SparseAlignHead, VACondenser, wrap
from czsl_heads.adapters.lora import add_lora
from czsl_heads.adapters.patch_drop import drop_patches
from czsl_heads.encoders.open_clip import OpenClipEncoder
from czsl_heads.functional import combine, distillation, fuse
from tests.models.shared import blank


@pytest.fixture
def space() -> CompositionSpace:
    seen = [("red", "circle"), ("blue", "star"), ("striped", "heart")]
    return CompositionSpace(
        ["red", "blue", "striped"], ["circle", "star", "heart"], seen=seen, unseen=[("red", "star"), ("blue", "heart")]
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def test_logits_are_the_heads_and_scores_are_eq_13(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space, condenser=False)
    texts = sac.texts(space)
    out = sac(images, texts)
    tokens = sac.encoder.encode_tokens(images)
    for logits, features in zip(out.sa, texts.features):
        cosines = sac.head(tokens, features) / sac.head.logit_scale
        torch.testing.assert_close(logits, cosines * sac.encoder.logit_scale)
    scores = combine(out.sa.pairs.softmax(1), out.sa.attrs.softmax(1), out.sa.objs.softmax(1), space.pairs)
    torch.testing.assert_close(out.scores, scores)
    assert out.space is space


@pytest.mark.parametrize("scale", [None, 1.0, 37.0])
def test_logits_have_the_scale_of_the_encoder(
    space: CompositionSpace, images: torch.Tensor, scale: float | None
) -> None:
    head = None if scale is None else SparseAlignHead(logit_scale=scale)
    sac = SAC(wrap("tiny"), space, head=head, condenser=False)
    cosine = SparseAlignHead(logit_scale=1.0)(sac.encoder.encode_tokens(images), sac.texts(space).features.pairs)
    torch.testing.assert_close(sac(images, sac.texts(space)).sa.pairs, cosine * sac.encoder.logit_scale)


def test_the_baseline_compares_the_class_token(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space, head=SparseAlignHead("cls"), condenser=False)
    cosine = F.normalize(sac.encoder.encode_images(images), dim=-1) @ sac.texts(space).features.pairs.T
    torch.testing.assert_close(
        sac(images, sac.texts(space)).sa.pairs, cosine * sac.encoder.logit_scale, atol=1e-4, rtol=0
    )


def test_fusion_of_logits_adds_the_primitives_to_the_pair_logit(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space, condenser=False, fusion="logits")
    out = sac(images, sac.texts(space))
    added = out.scores - out.sa.pairs
    expected = combine(torch.zeros_like(out.sa.pairs), out.sa.attrs.softmax(1), out.sa.objs.softmax(1), space.pairs)
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=0)


def test_with_a_condenser_scores_are_fused_probabilities_whatever_the_fusion(
    space: CompositionSpace, images: torch.Tensor
) -> None:
    scores = []
    for fusion in ("probs", "logits"):
        torch.manual_seed(0)
        sac = SAC(wrap("tiny"), space, fusion=fusion).eval()
        texts = sac.texts(space)
        sac.adapt(sac(images, texts))
        scores.append(sac(images, texts).scores)
        assert sac.bank.empty == "mask"
    assert torch.equal(*scores)


def test_a_pair_has_the_same_logit_in_every_space(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space, condenser=False)
    world = space.open_world()
    closed = sac(images, sac.texts(space)).sa.pairs
    opened = sac(images, sac.texts(world)).sa.pairs
    torch.testing.assert_close(opened[:, world.index(space.pairs)], closed)


def test_loss_is_the_sum_of_three_cross_entropies(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space, condenser=False)
    train = space.subset(space.seen_mask)
    out = sac(images, sac.texts(train))
    target = torch.tensor([0, 1, 2, 1, 0])
    losses = sac.losses(out, target, stage="align")
    attrs, objs = train.pairs[target].unbind(1)
    parts = [F.cross_entropy(*both) for both in zip(out.sa, (target, attrs, objs))]
    torch.testing.assert_close(losses["loss"], parts[0] + parts[1] + parts[2])
    torch.testing.assert_close(losses["loss_attrs"], parts[1])


def test_only_prompts_train_on_a_frozen_encoder(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space, condenser=False)
    out = sac(images, sac.texts(space))
    sac.losses(out, torch.arange(5))["loss"].backward()
    trained = {name for name, parameter in sac.named_parameters() if parameter.grad is not None}
    assert trained == {
        "prompts.pair_context",
        "prompts.attribute_context",
        "prompts.object_context",
        "prompts.primitives",
    }


def adapted(encoder: OpenClipEncoder, space: CompositionSpace, *, dropout: float, **options) -> SAC:
    torch.manual_seed(0)
    added = add_lora(encoder, dropout=dropout)
    for number, parameter in enumerate(parameter for module in added for parameter in module.deltas.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return SAC(encoder, space, prompt_dropout=dropout, condenser=VACondenser(encoder.dim), **options).train()


def step(sac: SAC, space: CompositionSpace, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    out = sac(images, sac.texts(space))
    return sac.losses(out, target, stage="joint")["loss"]


def gradients(sac: SAC, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names = {name: parameter for name, parameter in sac.named_parameters() if parameter.requires_grad}
    return dict(zip(names, torch.autograd.grad(loss, [*names.values()])))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_change_neither_loss_nor_gradients(
    space: CompositionSpace, images: torch.Tensor, dropout: float
) -> None:
    target, found = torch.tensor([0, 1, 2, 1, 0]), []
    for checkpoint in (False, True):
        sac = adapted(wrap("tiny"), space, dropout=dropout, checkpoint=checkpoint)
        torch.manual_seed(1)
        loss = step(sac, space, images, target)
        found.append((loss, gradients(sac, loss)))
    (plain, expected), (again, got) = found
    assert torch.equal(plain, again)
    assert all(torch.equal(expected[name], gradient) for name, gradient in got.items())
    assert any("deltas" in name and gradient.any() for name, gradient in got.items())


def test_an_encoder_without_checkpoints_will_do_where_none_are_asked_for(
    space: CompositionSpace, images: torch.Tensor
) -> None:
    sac = SAC(wrap("tiny"), space)
    tokens = sac.encoder.encode_tokens(images)
    sac.encoder.encode_tokens = lambda images: tokens
    assert sac.encode(images) is tokens


# Torch's backend "eager" would draw anew what checkpoints run again; those that users take do not.
@pytest.mark.parametrize(
    ("backend", "text_layers", "checkpoint", "dropped"), [("eager", 2, False, 0.0), ("aot_eager", 1, True, 0.5)]
)
def test_a_whole_training_step_compiles_to_one_graph(
    small_clip_factory, space: CompositionSpace, backend: str, text_layers: int, checkpoint: bool, dropped: float
) -> None:
    encoder = wrap(small_clip_factory(vision={"layers": 1}, text={"layers": text_layers}))
    images = torch.randn(5, 3, 42, 28, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, 1, 0])
    sac = adapted(encoder, space, dropout=0.2, checkpoint=checkpoint)
    drop_patches(encoder, dropped)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found = []
    for run in (step, compiled):
        torch.manual_seed(1)
        loss = run(sac, space, images, target)
        found.append((loss, gradients(sac, loss)))
    assert sac.prompts._shares_prefix()
    (expected_loss, expected), (loss, got) = found
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_wrong_arguments_raise(space: CompositionSpace, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected `fusion` to be one of probs, logits, got 'sum'"):
        SAC(wrap("tiny"), space, fusion="sum")
    sac = SAC(wrap("tiny"), space, condenser=False)
    out = sac(images, sac.texts(space))
    with pytest.raises(ValueError, match="expected `stage` to be one of align, condense, joint"):
        sac.losses(out, torch.arange(5), stage="all")
    with pytest.raises(ValueError, match='expected `out` of a model with a condenser for stage "condense", got none'):
        sac.losses(out, torch.zeros(5, dtype=torch.long), stage="condense")
    with pytest.raises(ValueError, match="expected `out` in the label space of the bank, got no bank"):
        sac.adapt(out)
    with pytest.raises(ValueError, match="expected `bank` with a condenser"):
        SAC(wrap("tiny"), space, condenser=False, bank=DynamicMemoryBank(len(space), 96))
    for name, value in (("alpha", 1.1), ("beta", -0.1), ("gamma", -1.0)):
        with pytest.raises(ValueError, match=f"expected `{name}` to be "):
            SAC(wrap("tiny"), space, **{name: value})
    with pytest.raises(ValueError, match="expected `direction` to be one of reverse, forward, got 'up'"):
        SAC(wrap("tiny"), space, direction="up")
    with pytest.raises(TypeError, match="expected `align` to be a SparseAlignHead, got Linear"):
        SAC(wrap("tiny"), space, head=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected `bank` over the 5 pairs of the space, got 4"):
        SAC(wrap("tiny"), space, bank=DynamicMemoryBank(4, 96))
    with pytest.raises(TypeError, match="expected `checkpoint` to be a bool, got str"):
        SAC(wrap("tiny"), space, checkpoint="text")
    with pytest.raises(ValueError, match="expected `pair_target` of shape"):
        sac.losses(out, torch.arange(4))
    with pytest.raises(TypeError, match=r"expected `pair_target` of dtype torch\.int64"):
        sac.losses(out, torch.rand(5))


@pytest.fixture
def whole(space: CompositionSpace) -> SAC:
    """All branches, with a bank over the pairs of the space."""
    torch.manual_seed(0)
    encoder = wrap("tiny")
    bank = DynamicMemoryBank(len(space), encoder.dim, slots=2, logit_scale=encoder.logit_scale)
    return SAC(encoder, space, condenser=VACondenser(encoder.dim), bank=bank, beta=0.3, gamma=0.4, alpha=0.7).eval()


def test_scores_are_eq_12(whole: SAC, space: CompositionSpace, images: torch.Tensor) -> None:
    texts = whole.texts(space)
    whole.adapt(whole(images, texts))
    out = whole(images, texts)
    torch.testing.assert_close(out.features, whole.condenser(out.tokens))
    scale = whole.encoder.logit_scale
    for logits, rows in zip(out.vac, texts.features):
        torch.testing.assert_close(logits, scale * out.features @ rows.T, atol=1e-4, rtol=1e-5)
    branches = [combine(*(part.softmax(1) for part in logits), space.pairs) for logits in (out.sa, out.vac)]
    expected = fuse(*branches, out.bank.softmax(1), beta=0.3, gamma=0.4)
    torch.testing.assert_close(out.scores, expected)
    assert torch.equal(out.bank, whole.bank(out.features))


def test_only_adapting_writes_the_bank(whole: SAC, space: CompositionSpace, images: torch.Tensor) -> None:
    texts = whole.texts(space)
    state = {name: tensor.clone() for name, tensor in whole.bank.state_dict().items()}
    out = whole(images, texts)
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.bank.state_dict().items())
    whole.adapt(out)
    stored = whole.bank.counts
    expected = out.vac.pairs.argmax(1).bincount(minlength=len(space)).clamp(max=2)
    assert torch.equal(stored, expected)


def test_the_bank_is_silent_in_another_label_space(whole: SAC, space: CompositionSpace, images: torch.Tensor) -> None:
    train = space.subset(space.seen_mask)
    out = whole(images, whole.texts(train))
    assert out.bank is None
    branches = [combine(*(part.softmax(1) for part in logits), train.pairs) for logits in (out.sa, out.vac)]
    torch.testing.assert_close(out.scores, fuse(*branches, None, beta=0.3, gamma=0))
    with pytest.raises(ValueError, match="expected `out` in the label space of the bank, got an output of another"):
        whole.adapt(out)


def test_a_bank_can_be_exchanged(whole: SAC, space: CompositionSpace, images: torch.Tensor) -> None:
    world = space.open_world()
    with pytest.raises(ValueError, match="expected `bank` over the 9 pairs of the space, got 5"):
        whole.use_bank(whole.bank, world)
    whole.use_bank(DynamicMemoryBank(len(world), 96), world)
    assert whole(images, whole.texts(world)).bank.shape == (5, 9)
    whole.use_bank(None, space)
    assert whole(images, whole.texts(space)).bank is None


def test_the_condenser_learns_from_labels_and_from_the_alignment_branch(
    whole: SAC, space: CompositionSpace, images: torch.Tensor
) -> None:
    train = space.subset(space.seen_mask)
    out = whole(images, whole.texts(train))
    target = torch.tensor([0, 1, 2, 1, 0])
    losses = whole.losses(out, target, stage="condense")
    attrs, objs = train.pairs[target].unbind(1)
    own = sum(F.cross_entropy(*both) for both in zip(out.vac, (target, attrs, objs)))
    taught = distillation(out.vac.pairs, out.sa.pairs)
    torch.testing.assert_close(losses["loss"], 0.3 * own + 0.7 * taught)
    joint = whole.losses(out, target, stage="joint")
    torch.testing.assert_close(joint["loss"], losses["loss"] + whole.losses(out, target, stage="align")["loss"])


def test_the_teacher_is_not_taught(whole: SAC, space: CompositionSpace, images: torch.Tensor) -> None:
    whole.alpha = 1.0
    texts = whole.texts(space.subset(space.seen_mask))
    tokens = whole.encoder.encode_tokens(images).requires_grad_()
    out = whole.compare(tokens, texts)
    out.sa.pairs.retain_grad()
    whole.losses(out, torch.arange(3).repeat(2)[:5], stage="condense")["loss"].backward()
    assert out.sa.pairs.grad is None
    assert all(parameter.grad is not None for parameter in whole.condenser.parameters())


def test_known_alignment_logits_are_taken_as_they_are(
    whole: SAC, space: CompositionSpace, images: torch.Tensor
) -> None:
    texts = whole.texts(space)
    out = whole(images, texts)
    again = whole.compare(out.tokens, texts, sa=out.sa)
    assert again.sa is out.sa
    assert torch.equal(again.scores, out.scores)


def test_all_branches_are_there_unless_they_are_left_out(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space)
    assert sac.bank.logit_scale == pytest.approx(float(sac.encoder.logit_scale))
    out = sac(images, sac.texts(space))
    sac.adapt(out)
    assert None not in out
    assert int(sac.bank.counts.sum()) == len(images)
    out = SAC(wrap("tiny"), space, bank=False)(images, sac.texts(space))
    assert out.bank is None
    assert out.vac is not None
    assert SAC(wrap("tiny"), space, condenser=False)(images, sac.texts(space)).vac is None


def test_the_alignment_branch_is_a_method_by_itself(whole: SAC, space: CompositionSpace, images: torch.Tensor) -> None:
    out, texts = whole(images, whole.texts(space)), whole.texts(space)
    for one, other in zip(whole.method(images, space.pairs), out.sa):
        assert torch.equal(one, other)
    (vac,) = whole.method.classify(out.tokens, texts.features, out.features)
    assert all(torch.equal(*rows) for rows in zip(vac, out.vac))
    parts = [whole.method.probabilities(logits, space.pairs) for logits in (out.sa, out.vac)]
    torch.testing.assert_close(out.scores, fuse(*parts, out.bank.softmax(1), beta=0.3, gamma=0.4))
    assert whole.method.prompts is whole.prompts
    assert [whole.method.training, whole.train().method.training] == [False, True]
    assert not any(name.startswith("_method") for name in whole.state_dict())


def test_a_copy_is_independent_and_of_one_piece(whole: SAC, space: CompositionSpace, images: torch.Tensor) -> None:
    before, twin = whole(images, whole.texts(space)).scores, copy.deepcopy(whole)
    assert twin.method.prompts is twin.prompts
    with torch.no_grad():
        twin.prompts.primitives.add_(1)
    assert torch.equal(whole(images, whole.texts(space)).scores, before)
    assert not torch.equal(twin(images, twin.texts(space)).scores, before)


def test_an_empty_bank_changes_no_order(space: CompositionSpace, images: torch.Tensor) -> None:
    torch.manual_seed(0)
    sac = SAC(wrap("tiny"), space, bank=True)
    texts = sac.texts(space)
    with_bank = sac(images, texts).scores
    sac.use_bank(None, space)
    assert torch.equal(with_bank.argsort(dim=1), sac(images, texts).scores.argsort(dim=1))


def test_the_forward_pass_and_the_losses_ask_a_gpu_for_nothing(space: CompositionSpace) -> None:
    encoder = wrap("tiny")
    add_lora(encoder)
    sac = SAC(encoder, space)
    shape, device = space.pairs.shape, torch.device("cuda", 0)
    with FakeTensorMode():  # whose tensors have no values, and raise where one is asked for or copied from elsewhere
        blank(sac, device)
        images = torch.empty(3, 3, 48, 48, device=device)
        with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):  # the first step copies these
            sac.texts(space)
        space._copies[device] = torch.empty(shape, dtype=torch.long, device=device)
        out = sac(images, sac.texts(space))
        losses = sac.losses(out, torch.empty(3, dtype=torch.long, device=device), stage="joint")
    assert out.scores.device == losses["loss"].device == device


@pytest.mark.parametrize("stage", ["align", "condense", "joint"])
@pytest.mark.parametrize("wrong", [-100, -1, 3])
def test_targets_that_are_no_pairs_are_told(
    stage: str, wrong: int, whole: SAC, space: CompositionSpace, images: torch.Tensor
) -> None:
    out = whole(images, whole.texts(space.subset(space.seen_mask)))
    target = torch.tensor([0, 1, wrong, 2, 0])  # -100 would be left out of one loss, and be another pair in the others
    with pytest.raises(ValueError, match=rf"expected `pair_target` to be in \[0, 2\], got {wrong}"):
        whole.losses(out, target, stage=stage)


def test_no_images_are_a_batch_too(whole: SAC, space: CompositionSpace, images: torch.Tensor) -> None:
    texts, state = whole.texts(space), copy.deepcopy(whole.bank.state_dict())
    some, none = whole(images, texts), whole(images[:0], texts)
    for one, other in zip(none[1:], some[1:]):
        parts = zip(one, other) if isinstance(one, tuple) else [(one, other)]
        for empty, full in parts:
            assert (empty.shape, empty.dtype) == ((0, *full.shape[1:]), full.dtype)
    whole.adapt(none)
    torch.testing.assert_close(whole.bank.state_dict(), state)
    for stage in ("align", "condense", "joint"):
        out = whole(images[:0], whole.texts(space.subset(space.seen_mask)))
        assert whole.losses(out, torch.zeros(0, dtype=torch.long), stage=stage)["loss"].isnan()  # the mean of nothing


def test_the_default_bank_has_the_scale_that_the_encoder_has_now(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny", frozen=False), space).eval()
    texts = sac.texts(space)
    sac.adapt(sac(images, texts))
    before = sac(images, texts).bank
    with torch.no_grad():
        sac.encoder.model.logit_scale += 0.5
    after = sac(images, texts).bank
    found = before > -torch.inf
    torch.testing.assert_close(after[found], before[found] * torch.tensor(0.5).exp())
    assert torch.autograd.grad(after[found].sum(), sac.encoder.model.logit_scale)[0] != 0


def test_its_own_bank_keeps_its_scale_however_it_came_back(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space).eval()
    texts = sac.texts(space)
    sac.adapt(sac(images, texts))
    with torch.no_grad():
        sac.encoder.model.logit_scale += 1
    before = sac(images, texts).bank
    sac.use_bank(sac.bank, space)
    assert torch.equal(sac(images, texts).bank, before)
    given = DynamicMemoryBank(len(space), 96, logit_scale=7.0)
    given.load_state_dict(sac.bank.state_dict())
    sac.use_bank(given, space)
    features = sac(images, texts).features
    assert torch.equal(sac(images, texts).bank, given(features))
