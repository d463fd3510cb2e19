"""KL divergence of a student's next tokens to a teacher's, without all logits in memory at once."""

from __future__ import annotations

from typing import Any

import torch

from sparserve.healing.network import DTYPE

# Logits that are in memory at once: their temporaries stay in caches.
BLOCK_ELEMENTS = 1 << 22


class _Divergence(torch.autograd.Function):
    """The gradient is computed with the value: d KL / d logits = softmax(student) - softmax(teacher)."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        head: torch.Tensor,
        teacher: torch.Tensor,
        teacher_head: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student)
        wants_gradient = ctx.needs_input_grad[0]
        step = max(1, BLOCK_ELEMENTS // len(head))
        for begin in range(0, len(student), step):
            rows = slice(begin, begin + step)
            exact = (teacher[rows].to(DTYPE) @ teacher_head.T).float().log_softmax(dim=1)
            own = (student[rows].to(DTYPE) @ head.T).float().log_softmax(dim=1)
            likely = exact.exp()
            total += torch.linalg.vecdot(likely, exact - own).double().sum()
            if wants_gradient:
                gradient[rows] = (own.exp_().sub_(likely).to(DTYPE) @ head).float()
        ctx.save_for_backward(gradient / len(student))
        return (total / len(student)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def divergence(
    student: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    """Mean KL(teacher || student) of the rows in nats: a differentiable number.

    student [rows, hidden], teacher [rows, the teacher's hidden]: last hidden states, float32; heads [vocab, hidden]
    in DTYPE. Heads do not learn.
    """
    made: torch.Tensor = _Divergence.apply(student, head, teacher, teacher_head)  # type: ignore[no-untyped-call]
    return made
