"""torchtune: recipes of language models. Its losses take logits in chunks, which its models make of the head a chunk at
a time; all chunks are there at once. They know no temperature: hidden states and logits are divided by it before."""

import functools

import torch
import torch.nn.functional as F

NAME, PACKAGE = "torchtune", "torchtune"
DEVICES, ELSEWHERE = ("cpu", "cuda"), ""
HOLDS = 1.0
OTHERWISE = "has no such loss"


def _in_chunks(temperature):
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    of_chunks = ForwardKLWithChunkedOutputLoss()

    def chunks(x, weight=None):  # of one sample, [1, N, *]
        parts = (x / temperature)[None].chunk(of_chunks.num_output_chunks, 1)
        return parts if weight is None else [F.linear(part, weight) for part in parts]

    def loss(hidden, weight, teacher):
        given = chunks(*teacher) if isinstance(teacher, tuple) else chunks(teacher)
        every = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)  # no label is left out
        return of_chunks(chunks(hidden, weight), given, every) * temperature**2

    loss.beside = functools.partial(_teacher_entropy, temperature)
    return loss


@torch.no_grad()
def _teacher_entropy(temperature, teacher):
    """What its loss, a cross-entropy, has more than the divergence; T^2 times that."""
    logits = F.linear(*teacher) if isinstance(teacher, tuple) else teacher
    log_q = F.log_softmax(logits.float() / temperature, -1)
    return -(log_q.exp() * log_q).sum(-1).mean() * temperature**2


LOSSES = {"head + kl_div": _in_chunks, "two heads + kl_div": _in_chunks}
