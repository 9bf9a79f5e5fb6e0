"""Bad input of LinearLogits, and which losses take it."""

import inspect

import cases
import pytest
import torch
from linear_logits_checks import LEADING, LOSSES, TARGET, V, inputs

from fastkd import LinearLogits, functional


def test_every_loss_of_logits_takes_it():
    taken = {name for name in functional.__all__ if name.islower()
             and "LinearLogits" in str(inspect.signature(getattr(functional, name)).parameters["student"].annotation)}  # fmt: skip
    assert taken == {*LOSSES, "dist_loss"}
    assert {name.partition("-")[0] for name in cases.LOSSES} <= taken


hidden, weight, bias = inputs()[0]


@pytest.mark.parametrize(
    ("arguments", "problem", "message"),
    [
        ((hidden, weight.T), ValueError, r"^weight: a head of shape \[V, 12\] wanted, whose first dimension"),
        ((hidden, weight[:, :5]), ValueError, r"^weight: a head of shape \[V, 12\] wanted, for hidden"),
        ((hidden, weight[0]), ValueError, r"^weight: a head of shape \[V, H\] wanted, got"),
        ((hidden, weight[:0]), ValueError, r"^weight: at least one class wanted"),
        ((hidden[0, 0, 0], weight), ValueError, r"^hidden: hidden states of shape"),
        ((hidden[..., :0], weight[:, :0]), ValueError, r"^hidden: .* H at least 1, got shape \[3, 7, 0\]"),
        ((hidden.long(), weight), TypeError, r"^hidden: float16, .* wanted, got torch.int64"),
        ((hidden.to_sparse(), weight), TypeError, r"^hidden: a dense tensor wanted"),
        ((hidden, torch.nn.Linear(12, V)), TypeError, r"^weight: a torch.Tensor wanted, got Linear"),
        ((hidden, weight, bias[:3]), ValueError, r"^bias: shape \[45\] wanted"),
        ((hidden, weight, 1.0), TypeError, r"^bias: a torch.Tensor wanted"),
    ],
)
def test_bad_parts_are_named(arguments, problem, message):
    with pytest.raises(problem, match=message):
        LinearLogits(*arguments)


@pytest.mark.parametrize(
    ("option", "bad", "problem"),
    [
        ("scale", 0, ValueError), ("scale", "1", TypeError), ("scale", torch.nan, ValueError),
        ("softcap", 0.0, ValueError), ("softcap", -1.0, ValueError), ("softcap", True, TypeError),
        ("slab_bytes", 0, ValueError), ("slab_bytes", 1e6, TypeError),
    ],
)  # fmt: skip
def test_bad_numbers_are_named(option, bad, problem):
    with pytest.raises(problem, match=rf"^{option}: .*wanted"):
        LinearLogits(hidden, weight, **{option: bad})


def test_bad_use_is_named(backend):
    student, teacher = inputs()
    of_student, of_teacher = LinearLogits(*student), LinearLogits(*teacher)
    loss = functional.kl_div
    with pytest.raises(ValueError, match=r"^inplace: LinearLogits have no logits"):
        loss(of_student, of_teacher, inplace=True)
    logits = torch.randn(21, V, requires_grad=True) * 1
    with pytest.raises(ValueError, match=r"^inplace: student and teacher share their memory"):
        loss(logits, LinearLogits(torch.randn(21, V), logits.detach()[:, :]), inplace=True)
    for option in ("inplace", "dim"):
        with pytest.raises(TypeError, match=rf"^{option}: "):
            loss(of_student, of_teacher, **{option: "a"})
    with pytest.raises(ValueError, match=r"^dim: the classes of LinearLogits are last"):
        loss(of_student, of_teacher, dim=1)
    with pytest.raises(ValueError, match=r"^teacher: the student's shape \[3, 7, 45\] wanted.*num_classes=40"):
        loss(of_student, torch.randn(*LEADING, 40))
    with pytest.raises(TypeError, match=r"^student.weight: the dtype of hidden, torch.float32, wanted"):
        loss(LinearLogits(hidden, weight.double()), of_teacher)
    with pytest.raises(TypeError, match=r"^teacher.bias: the dtype of hidden, torch.float32, wanted"):
        loss(of_student, LinearLogits(hidden, weight, bias.half()))
    with pytest.raises(ValueError, match=r"^student.weight: a tensor on the device of hidden, cpu, wanted, got meta"):
        loss(LinearLogits(hidden, weight.to("meta")), of_teacher)
    for at, name in enumerate(("hidden", "weight", "bias")):
        learned = [x.clone() for x in teacher]
        learned[at].requires_grad_()
        with pytest.raises(ValueError, match=rf"^teacher.{name}: no gradient flows to it"):
            loss(of_student, LinearLogits(*learned))
    with pytest.raises(ValueError, match=r"^mask: a shape that broadcasts"):
        loss(of_student, of_teacher, mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^target: classes from 0 to 44 wanted"):
        functional.kd_loss(of_student, of_teacher, TARGET + 1)
    with pytest.raises(TypeError, match=r"^teacher: .*LinearLogits"):
        functional.feature_mse(hidden, of_teacher)
