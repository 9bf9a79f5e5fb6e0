"""orda-kernel: cross-entropy and divergences of a head, from hidden states, in chunks of rows.

Its kernels are Triton's; elsewhere it runs PyTorch code, which its documentation offers for development.
"""

import torch

NAME, PACKAGE = "orda-kernel", "orda-kernel"
DEVICES, ELSEWHERE = ("cuda",), "its kernels need a GPU; on the CPU it is plain PyTorch code, for development"
HOLDS = 1.0
OTHERWISE = "takes hidden states and a head, no logits of the student"


def _head(temperature):
    from orda_kernel import PrecomputedTeacher, distillation_loss

    def loss(hidden, weight, teacher):
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        return distillation_loss(
            hidden, weight, labels, PrecomputedTeacher(logits=teacher), student_ce_weight=0.0, kl_weight=1.0,
            kl_temperature=temperature,
        ).loss  # fmt: skip

    return loss


LOSSES = {"head + kl_div": _head}
