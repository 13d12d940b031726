"""A student learns the pair distribution of a teacher."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from czsl_heads._checks import check_choice, check_shapes, check_tensor
from czsl_heads.functional.precision import score_dtype

Direction = Literal["reverse", "forward"]


def distillation(student_logits: Tensor, teacher_logits: Tensor, *, direction: Direction = "reverse") -> Tensor:
    r"""Kullback-Leibler divergence between student's and teacher's distribution over pairs, averaged over the batch.

    .. math::
        \mathrm{KL}(p \,\|\, q) = \sum_c p_c \log \frac{p_c}{q_c}, \qquad
        \text{reverse: } p = \text{student}, \; q = \text{teacher}

    The teacher is a constant: no gradient reaches it. The paper prints the divergence with a minus sign; as a loss it
    must have none.

    Args:
        student_logits: ``[batch, pairs]``, scaled; a constant added to a row changes nothing.
        teacher_logits: ``[batch, pairs]``, of the same pairs.
        direction: ``"reverse"`` is KL(student || teacher): the student settles on what the teacher holds likely.
            ``"forward"`` is KL(teacher || student): it spreads over all that the teacher holds possible.

    Returns:
        Scalar, float64 if an input is, else float32. A pair with logit -inf has probability 0: where ``p`` is 0 a pair
        adds nothing, so one masked in both counts 0; where only ``q`` is 0 the divergence is infinite. A row without
        any finite logit gives NaN, as does an empty batch.

    Raises:
        TypeError: An input is no float tensor.
        ValueError: The shapes do not fit, or ``direction`` is unknown.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> distillation(student, teacher), distillation(student, teacher, direction="forward")
        (tensor(0.1201), tensor(0.1109))
        >>> distillation(teacher, teacher)
        tensor(0.)

    References:
        Zhang et al., SAM, CVPR 2026 (SAC), Eqs. 7-8.
    """
    check_tensor("student_logits", student_logits)
    check_tensor("teacher_logits", teacher_logits)
    check_shapes(student_logits=(student_logits, "batch pairs"), teacher_logits=(teacher_logits, "batch pairs"))
    check_choice("direction", direction, ("reverse", "forward"))
    dtype = score_dtype(student_logits, teacher_logits)
    log_student = student_logits.log_softmax(dim=-1, dtype=dtype)
    log_teacher = teacher_logits.detach().log_softmax(dim=-1, dtype=dtype)
    log_p, log_q = (log_student, log_teacher) if direction == "reverse" else (log_teacher, log_student)
    # Masked before the product, because 0 * (-inf - -inf) is NaN, and so would be its gradient.
    log_ratio = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    return (log_p.exp() * log_ratio).sum(dim=-1).mean()
