"""TRL's chunked divergence, of its distillation trainers: two heads, tiles of logits, which it makes twice or more."""

NAME, PACKAGE = "TRL", "trl"
DEVICES, ELSEWHERE = ("cpu", "cuda"), ""
HOLDS = 1.0
OTHERWISE = "has no such loss, or as plain PyTorch alone"


def _two_heads(beta):
    """beta is its own argument: 0 is the forward KL, and between 0 and 1 there is a mixture."""

    def make(temperature):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def loss(hidden, weight, teacher):
            # of each row, without T squared; the other number is the student's entropy
            rows, _ = ChunkedDivergenceFunction.apply(
                hidden, weight, None, teacher[0], teacher[1], None, beta, temperature
            )
            return rows.mean() * temperature**2

        return loss

    return make


LOSSES = {"two heads + kl_div": _two_heads(0.0), "two heads + js_div": _two_heads(0.5)}
