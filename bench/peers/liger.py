"""Liger-Kernel: Triton kernels for training language models."""

import torch.nn.functional as F

NAME, PACKAGE = "Liger", "liger-kernel"
DEVICES, ELSEWHERE = ("cuda",), "its kernels are Triton's, and need a GPU"
HOLDS = 1.0
OTHERWISE = "has no such loss"


def _of_logarithms(name):
    """Its losses take logarithms of probabilities: to make them is part of the time."""

    def make(temperature):
        from liger_kernel.ops import LigerJSDFunction, LigerKLDivLossFunction

        def loss(student, teacher):
            log_p, log_q = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
            if name == "kl_div":
                found = LigerKLDivLossFunction.apply(log_p, log_q, "batchmean", True)
            else:  # None: no labels; beta means the same there
                found = LigerJSDFunction.apply(log_p, log_q, None, {"js_div": 0.5, "reverse_kl_div": 1.0}[name])
            return found * temperature**2

        return loss

    return make


def _head(temperature):
    """Of hidden states and the head's weight, in chunks; it takes the teacher's probabilities."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    loss = LigerFusedLinearKLDivLoss(temperature=temperature)

    def of_logits(hidden, weight, teacher):
        return loss(hidden, weight, F.softmax(teacher / temperature, -1)) * temperature**2

    return of_logits


LOSSES = {name: _of_logarithms(name) for name in ("kl_div", "js_div", "reverse_kl_div")} | {"head + kl_div": _head}
