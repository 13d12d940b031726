import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional.distill import distillation
from tests.references import reference_distillation

HALVES = (torch.bfloat16, torch.float16)
each_direction = pytest.mark.parametrize("direction", ["reverse", "forward"])


def draw(batch=3, pairs=7, *, scale=3.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple((scale * torch.randn(batch, pairs, generator=generator)).to(dtype) for _ in range(2))


def masked_draw(dtype=torch.float64):
    """Pairs 2 and 5 masked in both."""
    logits = draw(dtype=dtype)
    for side in logits:
        side[:, [2, 5]] = -torch.inf
    return logits


@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 11)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    direction=st.sampled_from(["reverse", "forward"]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=40)
def test_distillation_equals_the_sum_term_by_term(sizes, dtype, direction, seed):
    logits = draw(*sizes, dtype=dtype, seed=seed)
    loss = distillation(*logits, direction=direction)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference_distillation(*logits, direction=direction)
    assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_hand_sized_values():
    # Distributions (1/2, 1/2) and (1/4, 3/4) in the first row; the second row is equal and halves the mean.
    student = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, math.log(3)], [1.0, 2.0]], dtype=torch.float64)
    reverse = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(distillation(student, teacher)) == pytest.approx(reverse / 2, rel=1e-12)
    assert float(distillation(student, teacher, direction="reverse")) == pytest.approx(reverse / 2, rel=1e-12)
    assert float(distillation(student, teacher, direction="forward")) == pytest.approx(forward / 2, rel=1e-12)


def test_agrees_with_torch():
    student, teacher = draw(dtype=torch.float64)
    logs = student.log_softmax(-1), teacher.log_softmax(-1)
    reverse = F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
    forward = F.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean")
    torch.testing.assert_close(distillation(student, teacher), reverse)
    torch.testing.assert_close(distillation(student, teacher, direction="forward"), forward)


def test_forward_is_cross_entropy_with_soft_labels_less_their_entropy():
    student, teacher = draw(dtype=torch.float64)
    probs = teacher.softmax(-1)
    expected = F.cross_entropy(student, probs) - F.cross_entropy(teacher, probs)
    torch.testing.assert_close(distillation(student, teacher, direction="forward"), expected)


def test_directions_are_each_other_with_the_sides_swapped():
    student, teacher = draw()
    assert torch.equal(distillation(student, teacher), distillation(teacher, student, direction="forward"))
    assert not torch.isclose(distillation(student, teacher), distillation(teacher, student))


@each_direction
def test_zero_for_equal_logits_and_only_for_them(direction):
    student, teacher = draw()
    assert distillation(student, student, direction=direction) == 0
    assert distillation(student, teacher, direction=direction) > 0
    nearly = student.clone()
    nearly[1, 3] += 0.1
    assert distillation(student, nearly, direction=direction) > 0


@each_direction
def test_a_constant_added_to_a_row_changes_nothing(direction):
    student, teacher = draw(dtype=torch.float64)
    shifts = torch.tensor([[100.0], [-7.0], [0.5]], dtype=torch.float64)
    expected = distillation(student, teacher, direction=direction)
    torch.testing.assert_close(distillation(student + shifts, teacher, direction=direction), expected)
    torch.testing.assert_close(distillation(student, teacher - shifts, direction=direction), expected)


@each_direction
def test_order_of_pairs_and_samples_does_not_matter(direction):
    student, teacher = draw(dtype=torch.float64)
    pairs, samples = torch.tensor([3, 0, 6, 1, 5, 2, 4]), torch.tensor([2, 0, 1])
    moved = (side[samples][:, pairs] for side in (student, teacher))
    torch.testing.assert_close(
        distillation(*moved, direction=direction), distillation(student, teacher, direction=direction)
    )


@each_direction
def test_the_batch_counts_by_its_mean(direction):
    student, teacher = draw(dtype=torch.float64)
    rows = [distillation(student[[row]], teacher[[row]], direction=direction) for row in range(3)]
    torch.testing.assert_close(distillation(student, teacher, direction=direction), torch.stack(rows).mean())


@each_direction
def test_gradients_are_right_and_reach_the_student_only(direction):
    student, teacher = (side.requires_grad_() for side in draw(dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda side: distillation(side, teacher, direction=direction), student)
    distillation(student, teacher, direction=direction).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@each_direction
def test_descending_the_gradient_turns_the_student_into_the_teacher(direction):
    student, teacher = draw(scale=1.0, dtype=torch.float64)
    student.requires_grad_()
    for _ in range(2000):
        (step,) = torch.autograd.grad(distillation(student, teacher, direction=direction), student)
        student = (student - 5 * step).detach().requires_grad_()
    torch.testing.assert_close(student.softmax(-1), teacher.softmax(-1), atol=1e-5, rtol=0)


def test_reverse_settles_on_one_mode_and_forward_covers_both():
    # The student may prefer one pair or spread; the teacher holds two of them likely.
    teacher = torch.tensor([[5.0, 5.0, -5.0]])
    one, both = torch.tensor([[5.0, -5.0, -5.0]]), torch.tensor([[5.0, 5.0, 5.0]])
    assert distillation(one, teacher) < distillation(both, teacher)
    assert distillation(both, teacher, direction="forward") < distillation(one, teacher, direction="forward")


@each_direction
def test_pairs_masked_in_both_are_as_if_they_were_not_there(direction):
    student, teacher = (side.requires_grad_() for side in masked_draw())
    loss = distillation(student, teacher, direction=direction)
    (slope,) = torch.autograd.grad(loss, student)
    kept = torch.tensor([0, 1, 3, 4, 6])
    few = student.detach()[:, kept].requires_grad_()
    expected = distillation(few, teacher[:, kept], direction=direction)
    (expected_slope,) = torch.autograd.grad(expected, few)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slope[:, kept], expected_slope)
    assert not slope[:, [2, 5]].any()


def test_a_pair_masked_in_one_only_costs_where_it_is_expected():
    student, teacher = draw(dtype=torch.float64)
    lacking = student.clone()
    lacking[1, 4] = -torch.inf
    assert distillation(student, lacking) == torch.inf  # the teacher excludes what the student holds possible
    assert distillation(lacking, teacher, direction="forward") == torch.inf
    finite = distillation(lacking, teacher), distillation(teacher, lacking, direction="forward")
    assert finite[0] == finite[1]
    assert float(finite[0]) == pytest.approx(reference_distillation(lacking, teacher), rel=1e-12)


@each_direction
def test_nan_rows_without_pairs_and_empty_batches_give_nan(direction):
    student, teacher = draw()
    for side in (0, 1):
        for value, where in ((torch.nan, (1, 3)), (torch.inf, (1, 3)), (-torch.inf, 1)):
            sides = [student.clone(), teacher.clone()]
            sides[side][where] = value
            assert distillation(*sides, direction=direction).isnan()
    assert distillation(student[:0], teacher[:0], direction=direction).isnan()


@each_direction
def test_large_logits_stay_finite(direction):
    student, teacher = draw(scale=1e4)
    student.requires_grad_()
    loss = distillation(student, teacher, direction=direction)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@each_direction
@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_computed_in_float32(direction, dtype):
    student, teacher = draw(dtype=dtype)
    expected = distillation(student.float(), teacher.float(), direction=direction)
    assert torch.equal(distillation(student, teacher, direction=direction), expected)
    assert torch.equal(distillation(student, teacher.float(), direction=direction), expected)
    assert distillation(student, teacher.double(), direction=direction).dtype == torch.float64


@each_direction
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_changes_nothing(direction, dtype):
    student, teacher = draw()
    with torch.autocast("cpu", dtype=dtype):
        loss = distillation(student, teacher, direction=direction)
    assert torch.equal(loss, distillation(student, teacher, direction=direction))


def test_inputs_are_left_alone():
    student, teacher = masked_draw()
    before = student.clone(), teacher.clone()
    distillation(student, teacher)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@each_direction
def test_distillation_compiles_whole(direction):
    torch.compiler.reset()
    logits = masked_draw()
    compiled = torch.compile(distillation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*logits, direction=direction), distillation(*logits, direction=direction))


def test_meta_tensors_give_a_scalar():
    loss = distillation(*(side.to("meta") for side in draw()))
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (), torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_logits": [[1.0]]}, TypeError, r"expected `student_logits` to be a torch.Tensor, got list"),
        ({"teacher_logits": torch.zeros(3, 7).long()}, TypeError, r"`teacher_logits` of dtype .*got torch.int64"),
        ({"student_logits": torch.zeros(7)}, ValueError, r"`student_logits` of shape \(batch, pairs\), got \(7,\)"),
        ({"teacher_logits": torch.zeros(1, 7)}, ValueError, r"`teacher_logits` of shape .*batch=3.*got \(1, 7\)"),
        ({"teacher_logits": torch.zeros(3, 5)}, ValueError, r"`teacher_logits` of shape .*pairs=7, got \(3, 5\)"),
        ({"direction": "both"}, ValueError, r"expected `direction` to be one of reverse, forward, got 'both'"),
    ],
)
def test_wrong_arguments_are_told(change, error, message):
    student, teacher = draw()
    with pytest.raises(error, match=message):
        distillation(**{"student_logits": student, "teacher_logits": teacher, **change})
