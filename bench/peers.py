"""What is measured side by side: fastkd's backends, and other libraries' losses from logits to loss, like
ours, where they can be imported."""

import torch.nn.functional as F

from fastkd import _backend


def _liger(name, temperature):
    """Liger's losses take logarithms of probabilities: to make them is part of the time."""
    from liger_kernel.ops import LigerJSDFunction, LigerKLDivLossFunction

    def loss(student, teacher):
        log_p, log_q = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
        if name == "kl_div":
            found = LigerKLDivLossFunction.apply(log_p, log_q, "batchmean", True)
        else:  # None: no labels; beta means the same there
            found = LigerJSDFunction.apply(log_p, log_q, None, {"js_div": 0.5, "reverse_kl_div": 1.0}[name])
        return found * temperature**2

    return loss


PEERS = {"Liger": _liger}
WITHOUT = {  # no loss of two logits, as of quack-kernels 0.6 and cut-cross-entropy 25.1
    "quack": "no comparable loss: softmax, and cross-entropy with hard labels",
    "cut-cross-entropy": "no comparable loss: cross-entropy of a linear layer with hard labels",
}


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def peers(name, temperature):
    """The peers' losses by name, and of the others why not."""
    found, missing = {}, dict(WITHOUT)
    for peer, make in PEERS.items():
        try:
            found[peer] = make(name, temperature)
        except Exception as error:  # whatever the import of somebody else's package may raise
            missing[peer] = first_line(error)
    return found, missing


def own_backends(device):
    """Of fastkd, under the names that the tables have for them; and of the others why not."""
    if device == "cpu":
        return {"fastkd": "cpu"}, {}
    reasons = {f"fastkd {name}": _backend.unavailable(name) for name in ("cuda", "triton")}
    found = {name: name.split()[1] for name, reason in reasons.items() if not reason}
    return found, {name: reason for name, reason in reasons.items() if reason}


def judge(found, missing, truth):
    """The errors of all that answer. What is not ours and fails is left out, with its reason."""
    errors = {}
    for provider in [p for p in found if p.answer]:
        try:
            errors[provider.name] = truth.errors(*provider.answer())
        except Exception as error:
            if provider.name.startswith("fastkd"):
                raise
            missing[provider.name] = first_line(error)
            found.remove(provider)
    return errors
