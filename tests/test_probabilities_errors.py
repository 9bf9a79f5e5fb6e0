"""Bad input of Probabilities, and which losses take it."""

import inspect

import pytest
import torch
from probabilities_checks import TARGET, inputs

from fastkd import Probabilities, functional
from fastkd._divergences import BY_NAME


def test_the_losses_that_take_it():
    taken = {name for name in functional.__all__ if name.islower()
             and "Probabilities" in str(inspect.signature(getattr(functional, name)).parameters["teacher"].annotation)}  # fmt: skip
    assert taken == {*BY_NAME, "kd_loss", "dkd_loss", "nkd_loss", "dist_loss"}


student, teacher = inputs()


@pytest.mark.parametrize(
    ("argument", "options", "problem", "message"),
    [
        ([0.5], {}, TypeError, r"^probabilities: a torch.Tensor wanted"),
        (teacher.to_sparse(), {}, TypeError, r"^probabilities: a dense tensor wanted"),
        (teacher.long(), {}, TypeError, r"^probabilities: float16, .* wanted"),
        (teacher[..., :0], {}, ValueError, r"^probabilities: shape \[\*, V\] wanted"),
        (torch.tensor(1.0), {}, ValueError, r"^probabilities: shape \[\*, V\] wanted"),
        (teacher, {"temperature": 0.0}, ValueError, r"^temperature: a positive"),
        (teacher, {"temperature": "1"}, TypeError, r"^temperature: a number"),
    ],
)
def test_bad_parts_are_named(argument, options, problem, message):
    with pytest.raises(problem, match=message):
        Probabilities(argument, **options)


def test_bad_values_are_named_with_their_row(backend):
    for value, row in ((-1e-3, (1, 3)), (torch.nan, (2, 6)), (torch.inf, (0, 0))):
        wrong = teacher.clone()
        wrong[row][4] = value
        with pytest.raises(
            ValueError, match=rf"^teacher.probabilities: numbers of at least 0.*row \({row[0]}, {row[1]}\)"
        ):
            functional.js_div(student, Probabilities(wrong))
    wrong = teacher.clone()
    wrong[0, 2, 1] = 1.5
    functional.kl_div(student, Probabilities(wrong))
    with pytest.raises(ValueError, match=r"^teacher.probabilities: numbers from 0 to 1 wanted; row \(0, 2\)"):
        functional.bernoulli_kl_div(student, Probabilities(wrong))
    with pytest.raises(ValueError, match=r"^teacher.probabilities: numbers from 0 to 1 wanted; row \(0, 2\)"):
        functional.kd_loss(student, Probabilities(wrong), TARGET, divergence="bernoulli_kl_div")


def test_bad_use_is_named(backend):
    given = Probabilities(teacher)
    with pytest.raises(TypeError, match=r"^student: logits or LinearLogits wanted, got Probabilities"):
        functional.kl_div(given, given)
    with pytest.raises(ValueError, match=r"^teacher.probabilities: no gradient flows to it"):
        functional.kl_div(student, Probabilities(teacher.clone().requires_grad_()))
    with pytest.raises(ValueError, match=r"^dim: the classes of Probabilities are last"):
        functional.kl_div(student, given, dim=1)
    with pytest.raises(ValueError, match=r"^teacher: the student's shape .*num_classes=40"):
        functional.kl_div(torch.cat([student, student], -1), given)
    leaf = student.clone().requires_grad_() * 1
    with pytest.raises(ValueError, match=r"^inplace: student and teacher share"):
        functional.kl_div(leaf, Probabilities(leaf.detach().abs_()), inplace=True)
