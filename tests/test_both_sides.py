"""A teacher that requires a gradient is an error; what its message says of two calls is right, by plain autograd
through both sides in float64."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from feature_truth import rows_of

from fastkd import functional

N = 6
WEIGHT = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
MASK = torch.arange(N) != 2


def divergence(name, s, t, beta=0.5):
    """Of rows of logits."""
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    if name == "negative_log_acceptance":
        return -torch.minimum(log_p.exp(), log_q.exp()).sum(-1).log()
    if name == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if name == "symmetric_kl_div":
        return (1 - beta) * divergence("kl_div", s, t) + beta * divergence("reverse_kl_div", s, t)
    if name == "skew_reverse_kl_div":
        return divergence("skew_kl_div", t, s, beta)
    pairs = {
        "kl_div": (log_q, log_p),
        "reverse_kl_div": (log_p, log_q),
        "js_div": (log_q, m),
        "skew_kl_div": (log_q, m),
    }
    a, b = pairs[name]
    rows = (a.exp() * (a - b)).sum(-1)
    return rows if name != "js_div" else beta * rows + (1 - beta) * (log_p.exp() * (log_p - m)).sum(-1)


def alpha_beta(s, t, alpha, beta):
    p, q, total = s.softmax(-1), t.softmax(-1), alpha + beta
    rows = (q**alpha * p**beta - alpha / total * q**total - beta / total * p**total).sum(-1)
    return -rows.mean() / (alpha * beta)


def logits(name, s, t, beta=0.5, temperature=1.0, teacher_temperature=None, t_squared=True, weighted=False):
    rows = divergence(name, s / temperature, t / (teacher_temperature or temperature), beta)
    rows = rows * temperature**2 if t_squared else rows
    return (rows * WEIGHT)[MASK].sum() / MASK.sum() if weighted else rows.mean()


def lengths(x, normalize="mean"):
    others = ~torch.eye(len(x), dtype=torch.bool)
    d = torch.zeros(len(x), len(x), dtype=x.dtype).masked_scatter(others, (x[:, None] - x)[others].norm(dim=1))
    return d / (d.sum() / others.sum()) if normalize else d


def angles(x):
    difference = x - x[:, None]
    unit = difference / (difference.norm(dim=2, keepdim=True) + 1e-300)
    return unit @ unit.mT


def rkd_distance(s, t, normalize="mean", delta=1.0, weighted=False):
    e = F.huber_loss(lengths(s, normalize), lengths(t, normalize), delta=delta, reduction="none")
    return (e * WEIGHT[:, None] if weighted else e).mean()


def rkd_angle(s, t, delta=1.0):
    return F.huber_loss(angles(s.clone()), angles(t.clone()), delta=delta)


def similarities(x):
    return F.normalize(x @ x.T)


def gram(x, clamp):
    G = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
    return G.clamp(min=0) if clamp else G


def relation_kl(s, t, divergence="kl_div", normalize=False, temperature=1.0, teacher_temperature=None, beta=0.5):
    others = ~torch.eye(N, dtype=torch.bool)
    s, t = ((F.normalize(x, dim=1) if normalize else x / x.shape[1] ** 0.25) for x in (s, t))
    s, t = ((x @ x.T)[others].view(N, -1) for x in (s, t))
    return logits(divergence, s, t, beta, temperature, teacher_temperature, t_squared=False)


def features(name, s, t, weighted=False):
    rows = rows_of(name, s, t) / (1 if name == "feature_cosine" else s.shape[-1])
    return (rows * WEIGHT)[MASK].sum() / MASK.sum() if weighted else rows.mean()


def attention(s, t, p=2):
    s, t = (F.normalize(x.abs().pow(p).mean(1).flatten(1), dim=1) for x in (s, t))
    return (s - t).square().mean()


WEIGHTED = {"mask": MASK, "weight": WEIGHT}
# function, options, the same by plain autograd; what both calls of the message are, with the same options
CASES = {
    **{
        name: (name, {"temperature": 2.0, **WEIGHTED}, functools.partial(logits, name, temperature=2.0, weighted=True))
        for name in ("kl_div", "reverse_kl_div", "js_div")
    },
    "total_variation": ("total_variation", {}, functools.partial(logits, "total_variation")),
    "negative_log_acceptance": (
        "negative_log_acceptance",
        {"temperature": 2.0, **WEIGHTED},
        functools.partial(logits, "negative_log_acceptance", temperature=2.0, weighted=True),
    ),
    "alpha_beta_div": (
        "alpha_beta_div",
        {"alpha": 0.3, "beta": 0.5},
        functools.partial(alpha_beta, alpha=0.3, beta=0.5),
    ),
    **{
        name: (name, {option: 0.2}, functools.partial(logits, name, beta=0.2))
        for name, option in (
            ("symmetric_kl_div", "student_weight"),
            ("skew_kl_div", "alpha"),
            ("skew_reverse_kl_div", "alpha"),
        )
    },
    "js_div-0.2": ("js_div", {"beta": 0.2}, functools.partial(logits, "js_div", beta=0.2)),
    "js_div-0": ("js_div", {"beta": 0.0}, functools.partial(logits, "kl_div")),
    "two_temperatures": (
        "kl_div",
        {"temperature": 2.0, "teacher_temperature": 3.0, "t_squared": False},
        functools.partial(logits, "kl_div", temperature=2.0, teacher_temperature=3.0, t_squared=False),
    ),
    "rkd_distance": ("rkd_distance", {"weight": WEIGHT}, functools.partial(rkd_distance, weighted=True)),
    "rkd_distance-clamped": (
        "rkd_distance",
        {"normalize": None, "delta": 0.5},
        functools.partial(rkd_distance, normalize=None, delta=0.5),
    ),
    "rkd_angle": ("rkd_angle", {"delta": 0.3}, functools.partial(rkd_angle, delta=0.3)),
    "rkd_loss": ("rkd_loss", {}, lambda s, t: 25 * rkd_distance(s, t) + 50 * rkd_angle(s, t)),
    "similarity_preserving": (
        "similarity_preserving",
        {"weight": WEIGHT},
        lambda s, t: ((similarities(s) - similarities(t)).square().sum(1) * WEIGHT).sum() / N**2,
    ),
    "gram_mse": ("gram_mse", {}, lambda s, t: (gram(s, False) - gram(t, False)).square().mean()),
    "gram_mse-both": ("gram_mse", {"clamp": "both"}, lambda s, t: (gram(s, True) - gram(t, True)).square().mean()),
    "relation_kl": ("relation_kl", {"normalize": True}, functools.partial(relation_kl, normalize=True)),
    **{
        f"relation_kl-{name}": (
            "relation_kl",
            {"divergence": name, "beta": 0.2, "temperature": 2.0, "teacher_temperature": 3.0},
            functools.partial(relation_kl, divergence=name, beta=0.2, temperature=2.0, teacher_temperature=3.0),
        )
        for name in ("reverse_kl_div", "js_div")
    },
    "feature_mse": ("feature_mse", WEIGHTED, functools.partial(features, "feature_mse", weighted=True)),
    **{
        f"feature_mse-{name}": ("feature_mse", {"normalize": name}, functools.partial(features, f"feature_mse-{name}"))
        for name in ("l2", "standardize")
    },
    "feature_smooth_l1-0.5": (
        "feature_smooth_l1",
        {"beta": 0.5, **WEIGHTED},
        functools.partial(features, "feature_smooth_l1-0.5", weighted=True),
    ),
    "feature_cosine": ("feature_cosine", {}, functools.partial(features, "feature_cosine")),
    "attention_transfer": ("attention_transfer", {"p": 3}, functools.partial(attention, p=3)),
}


def sides(name):
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, 4, 4) if name == "attention_transfer" else (N, 7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


def message(call):
    with pytest.raises(ValueError, match=r"^teacher: no gradient flows to it, .*detach\(\) it") as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize("case", CASES)
def test_the_two_calls_have_both_gradients(case):
    """As the message has them, with the same options but what it says."""
    name, options, plain = CASES[case]
    student, teacher = sides(name)
    text = message(lambda: getattr(functional, name)(student, teacher, **options))
    calls = re.search(r"options have their gradients: (\w+\(.*\)) and (\w+\(.*\))(, temperature and .*)?$", text)
    expected = plain(student, teacher)
    for of, call in enumerate(calls.groups()[:2]):
        given = dict(options)
        if of == 1 and calls[3]:
            assert calls[3] == ", temperature and teacher_temperature exchanged"
            given |= {"temperature": options["teacher_temperature"], "teacher_temperature": options["temperature"]}
        loss_function = getattr(functional, call.partition("(")[0])

        def loss(a, b, f=loss_function, given=given, **other):
            return f(a, b, **{**given, **other})

        names = {"beta": 0.5, **options, "student": student, "teacher": teacher}
        found = eval(call, {loss_function.__name__: loss}, names)
        (grad,) = torch.autograd.grad(found, (student, teacher)[of])
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
        (wanted,) = torch.autograd.grad(expected, (student, teacher)[of], retain_graph=True)
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)


ALONE = {  # no second call has the teacher's gradient
    "soft_cross_entropy": functional.soft_cross_entropy,
    "bernoulli_kl_div": functional.bernoulli_kl_div,
    "t_squared": lambda s, t: functional.kl_div(s, t, temperature=2.0, teacher_temperature=3.0),
    "pkt": functional.pkt,
    "relational_triplet": functional.relational_triplet,
    "gram_mse": lambda s, t: functional.gram_mse(s, t, clamp="teacher"),
    "relation_kl": lambda s, t: functional.relation_kl(s, t, divergence="soft_cross_entropy"),
    "keys": lambda s, t: functional.relation_kl(s, t, student_keys=s, teacher_keys=t.detach()),
    "linear_feature_mse": lambda s, t: functional.linear_feature_mse(s, torch.eye(7, dtype=s.dtype), t),
}


@pytest.mark.parametrize("name", ALONE)
def test_where_no_second_call_does(name):
    student, teacher = sides(name)
    for side in (student, student.detach()):
        assert message(lambda s=side: ALONE[name](s, teacher)).endswith("detach() it")
    assert ALONE[name](student, teacher.detach()).requires_grad


def test_keys_layers_and_inplace():
    student, teacher = sides("")
    with pytest.raises(ValueError, match=r"^teacher_keys: no gradient flows to it"):
        functional.relation_kl(student, teacher.detach(), student_keys=student, teacher_keys=teacher)
    message(lambda: functional.feature_mse([student, student], [teacher.detach(), teacher]))
    assert message(lambda: functional.kl_div(student * 1, teacher, inplace=True)).endswith(", without inplace")


@pytest.mark.parametrize("name", ["kl_div", "rkd_distance", "feature_mse", "attention_transfer"])
def test_on_every_backend_and_compiled(backend, name):
    loss, (student, teacher) = getattr(functional, name), sides(name)
    message(lambda: loss(student, teacher))
    for nothing_recorded in (torch.no_grad, torch.inference_mode):
        with nothing_recorded():
            found = loss(student, teacher)
        torch.testing.assert_close(found, loss(student, teacher.detach()).detach())
    if backend in ("cpu-baseline", "torch"):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"teacher: no gradient flows to it"):
            torch.compile(loss, fullgraph=True, backend="eager")(student, teacher)


def test_labels_decide_and_the_teacher_is_not_looked_at():
    student, teacher = sides("")
    functional.relational_triplet(student, teacher, torch.arange(N) % 2).backward()
    assert student.grad.any()
    assert teacher.grad is None
