"""Published methods that are a loss of fastkd with other inputs or options, as the recipes in docs/ write them: each
against its formula in plain PyTorch."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recipes_checks import DTYPES, agree, in_float64, kl_of, logits

from fastkd.functional import kl_div, reverse_kl_div, soft_cross_entropy

pytestmark = pytest.mark.usefixtures("computed_by")


# Channel-wise distillation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channel_wise_distillation(dtype, memory_format):
    student, teacher = logits(2, 5, 6, 7, dtype=dtype)
    student = student.detach().contiguous(memory_format=memory_format).requires_grad_()
    teacher = teacher.contiguous(memory_format=memory_format)
    loss = kl_div(student.flatten(2), teacher.flatten(2), temperature=4.0)

    # each channel's pixels one by one; the sum over all, times T squared, over the number of images and channels
    plain, T, total = in_float64(student), 4.0, 0.0
    for image in range(2):
        for channel in range(5):
            s, t = ((x[image, channel].reshape(-1) / T).softmax(0) for x in (plain, teacher.double()))
            total = total + F.kl_div(s.log(), t, reduction="sum")
    agree(loss, T**2 * total / (2 * 5), student, plain)


def test_channel_wise_distillation_without_some_pixels():
    student, teacher = logits(2, 5, 6, 7)
    valid = torch.rand(2, 6, 7) < 0.7
    cut = (x.masked_fill(~valid[:, None], -torch.inf).flatten(2) for x in (student, teacher))
    loss = kl_div(*cut, temperature=4.0)

    plain, total = in_float64(student), 0.0
    for image in range(2):
        for channel in range(5):
            log_p, log_q = ((x[image, channel][valid[image]] / 4).log_softmax(0) for x in (plain, teacher))
            total = total + kl_of(log_q, log_p)
    agree(loss, 16 * total / (2 * 5), student, plain)


# Transformed teacher matching


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_transformed_teacher_matching(dtype, gamma):
    student, teacher = logits(6, 50, dtype=dtype)
    ttm = kl_div(student, teacher, teacher_temperature=1 / gamma)
    power_sum = torch.exp((gamma * teacher).logsumexp(-1) - gamma * teacher.logsumexp(-1))
    wttm = kl_div(student, teacher, teacher_temperature=1 / gamma, weight=power_sum)

    plain, powers = in_float64(student), teacher.double().softmax(-1) ** gamma
    rows = kl_of((powers / powers.sum(-1, keepdim=True)).log(), plain.log_softmax(-1))
    agree(ttm, rows.mean(), student, plain)
    rows = kl_of((powers / powers.sum(-1, keepdim=True)).log(), plain.log_softmax(-1))
    agree(wttm, (powers.sum(-1) * rows).mean(), student, plain)


def test_the_power_sum_is_1_of_a_certain_teacher_and_largest_of_an_unsure_one():
    gamma, V = 0.2, 50
    certain = torch.full((V,), -torch.inf, dtype=torch.float64)
    certain[3] = 2.0
    for teacher, expected in ((certain, 1.0), (torch.ones(V, dtype=torch.float64), V ** (1 - gamma))):
        power_sum = torch.exp((gamma * teacher).logsumexp(-1) - gamma * teacher.logsumexp(-1))
        assert power_sum.item() == pytest.approx(expected, rel=1e-12)


# TAID


def blocks_of(page):
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def taid(*arguments, **options):
    """The module as it stands in the recipe."""
    (block,) = [block for block in blocks_of("recipes-methods.md") if "class TAID" in block]
    names = {}
    exec(block.partition("\n\n\ntorch.manual_seed")[0], names)
    return names["TAID"](*arguments, **options)


def published_t(losses, steps, start, end, alpha, beta):
    """t of each step, from the losses of all of them, in Python's numbers. What step n says holds for the next."""
    t, momentum, found = start, 0.0, [start, start]
    for n in range(1, len(losses) - 1):
        before, now = losses[n - 1], losses[n]
        momentum = beta * momentum + (1 - beta) * (before - now) / (before + 1e-15)
        growth = alpha / (1 + math.exp(-momentum)) * (1 - t)
        t = min(end, max(start + (end - start) * n / steps, t + growth))
        found.append(t)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_taid_has_a_target_between_student_and_teacher(dtype, t):
    student, teacher = logits(6, 50, dtype=dtype)
    loss = taid(100, start=t)(student, teacher)
    plain, share = in_float64(student), torch.tensor(t).double()
    target = ((1 - share) * plain.detach() + share * teacher.double()).log_softmax(-1)
    expected = kl_of(target, plain.log_softmax(-1)).mean()
    if t == 0:  # the student itself
        assert loss == 0
        assert not torch.autograd.grad(loss, student)[0].any()
    else:
        agree(loss, expected, student, plain)


@pytest.mark.parametrize(("alpha", "end", "steps"), [(5e-4, 1.0, 40), (0.3, 1.0, 400), (0.3, 0.7, 400)])
def test_taid_moves_as_published(alpha, end, steps):
    """By the linear schedule, by the loss that falls, and no farther than the end."""
    loss_function = taid(steps, start=0.4, end=end, alpha=alpha, beta=0.9)
    student, teacher = logits(6, 50)
    found, losses = [], []
    for _ in range(30):
        found.append(loss_function.t.item())
        loss = loss_function(student, teacher)
        losses.append(loss.item())
        with torch.no_grad():
            student -= 5 * torch.autograd.grad(loss, student)[0]
    expected = published_t(losses, steps, 0.4, end, alpha, 0.9)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found == sorted(found)
    linear = [0.4 + (end - 0.4) * max(n - 1, 0) / steps for n in range(30)]
    ahead = max(t - even for t, even in zip(found, linear, strict=True))
    assert ahead > 0.1 if alpha == 0.3 else ahead < 1e-3
    assert (end < 1) == (found[-1] == pytest.approx(end))


def test_the_cross_entropy_of_taid_has_the_same_gradient_and_another_value():
    student, teacher = logits(6, 50)
    target = torch.lerp(student.detach(), teacher, 0.4)
    divergence, entropy = kl_div(student, target), soft_cross_entropy(student, target)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (divergence, entropy)))
    log_q = target.log_softmax(-1)
    torch.testing.assert_close(entropy - divergence, -(log_q.exp() * log_q).sum(-1).mean())


# Log-probabilities and probabilities


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taken_at", [1.0, 2.0])
def test_log_probabilities_are_logits(dtype, taken_at):
    """Those of temperature 1 are softened by the loss; those that were softened are taken as they are."""
    student, raw = logits(6, 50, dtype=dtype)
    options = {} if taken_at == 1 else {"teacher_temperature": 1.0}
    loss = kl_div(student, (raw / taken_at).log_softmax(-1), temperature=2.0, **options)
    plain = in_float64(student)
    expected = 4 * kl_of((raw.double() / 2).log_softmax(-1), (plain / 2).log_softmax(-1)).mean()
    agree(loss, expected, student, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_go_in_as_their_logarithms(dtype):
    """Some are 0, and a row need not add up to 1."""
    student, raw = logits(6, 50, dtype=dtype)
    probabilities = raw.softmax(-1)
    probabilities[:, ::7] = 0
    loss = kl_div(student, probabilities.log(), temperature=2.0, teacher_temperature=1.0)
    plain, q = in_float64(student), probabilities.double()
    q = q / q.sum(-1, keepdim=True)
    expected = 4 * F.kl_div((plain / 2).log_softmax(-1), q, reduction="batchmean")
    agree(loss, expected, student, plain)
    assert reverse_kl_div(student, probabilities.log(), teacher_temperature=1.0) == torch.inf


# Several teachers


def several(dtype, K=3):
    student, teacher = logits(6, 50, dtype=dtype)
    return student, [teacher, *(logits(6, 50, dtype=dtype)[1] for _ in range(K - 1))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shares", [None, (0.5, 0.3, 0.2)])
def test_a_mean_of_teachers_probabilities(dtype, shares):
    (student, teachers), T = several(dtype), 2.0
    w = shares or (1 / 3, 1 / 3, 1 / 3)
    parts = [(teacher / T).log_softmax(-1) + math.log(share) for teacher, share in zip(teachers, w, strict=True)]
    log_mean = torch.logaddexp(torch.logaddexp(parts[0], parts[1]), parts[2])
    loss = kl_div(student, log_mean, temperature=T, teacher_temperature=1.0)

    plain = in_float64(student)
    mean = sum(share * (teacher.double() / T).softmax(-1) for teacher, share in zip(teachers, w, strict=True))
    expected = T**2 * F.kl_div((plain / T).log_softmax(-1), mean, reduction="batchmean")
    agree(loss, expected, student, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_of_teachers_logits_is_the_geometric_mean_of_probabilities(dtype):
    (student, teachers), T = several(dtype), 2.0
    loss = kl_div(student, sum(teachers) / 3, temperature=T)
    plain, product = in_float64(student), 1.0
    for teacher in teachers:
        product = product * (teacher.double() / T).softmax(-1) ** (1 / 3)
    mean = product / product.sum(-1, keepdim=True)
    expected = T**2 * F.kl_div((plain / T).log_softmax(-1), mean, reduction="batchmean")
    agree(loss, expected, student, plain)


def test_which_mean_has_the_gradient_of_the_mean_of_losses():
    """Of kl_div that of probabilities, of reverse_kl_div that of logits; their values differ by what is no student's."""
    (student, teachers), T = several(torch.float64), 2.0
    log_q = torch.stack([(teacher / T).log_softmax(-1) for teacher in teachers])
    log_mean = log_q.logsumexp(0) - math.log(3)

    def value_and_gradient(loss):
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    def mean_of_losses(loss):
        return value_and_gradient(sum(loss(student, teacher, temperature=T) for teacher in teachers) / 3)

    of_losses = mean_of_losses(kl_div)
    of_mean = value_and_gradient(kl_div(student, log_mean, temperature=T, teacher_temperature=1.0))
    torch.testing.assert_close(of_losses[1], of_mean[1])
    disagreement = kl_of(log_q, log_mean[None]).mean()  # the Jensen-Shannon divergence of the teachers
    torch.testing.assert_close(of_losses[0] - of_mean[0], T**2 * disagreement)

    of_losses = mean_of_losses(reverse_kl_div)
    of_logits = value_and_gradient(reverse_kl_div(student, sum(teachers) / 3, temperature=T))
    torch.testing.assert_close(of_losses[1], of_logits[1])
    torch.testing.assert_close(of_losses[0] - of_logits[0], -(T**2) * log_q.mean(0).logsumexp(-1).mean())

    assert not torch.allclose(value_and_gradient(kl_div(student, sum(teachers) / 3, temperature=T))[1], of_mean[1])


def test_a_class_that_one_teacher_rules_out():
    student, teachers = several(torch.float64)
    teachers[0][:, 4] = -torch.inf
    log_mean = torch.stack([teacher.log_softmax(-1) for teacher in teachers]).logsumexp(0) - math.log(3)
    assert kl_div(student, log_mean, teacher_temperature=1.0).isfinite()
    assert log_mean[:, 4].isfinite().all()
    assert (sum(teachers)[:, 4] == -torch.inf).all()
    assert kl_div(student, sum(teachers) / 3).isfinite()
