"""Bad input of TopKLogProbs, and which losses take it."""

import inspect

import pytest
import torch
from top_k_checks import LEADING, NAMES, ROWS, TARGET, V, inputs

from fastkd import TopKLogProbs, functional


def test_the_losses_that_take_it():
    taken = {name for name in functional.__all__ if name.islower()
             and "TopKLogProbs" in str(inspect.signature(getattr(functional, name)).parameters["teacher"].annotation)}  # fmt: skip
    assert taken == {*NAMES, "kd_loss"}


student, indices, log_probs = inputs(padded=False)


@pytest.mark.parametrize(
    ("arguments", "options", "problem", "message"),
    [
        ((indices.to_sparse(), log_probs), {}, TypeError, r"^indices: a dense tensor wanted"),
        ((indices.float(), log_probs), {}, TypeError, r"^indices: whole numbers wanted"),
        ((indices, log_probs.long()), {}, TypeError, r"^log_probs: float16, .* wanted"),
        ((indices, log_probs[..., :3]), {}, ValueError, r"^log_probs: the shape of indices"),
        ((indices[..., :0], log_probs[..., :0]), {}, ValueError, r"^indices: shape \[\*, K\] wanted"),
        (([1], log_probs), {}, TypeError, r"^indices: a torch.Tensor wanted"),
        ((indices, log_probs), {"tail": "drop"}, ValueError, r"^tail: 'bucket', 'renormalize' or 'ignore' wanted"),
        ((indices, log_probs), {"log_prob_min": -9.0}, ValueError, r"^log_prob_min: with tail='ignore' alone"),
        ((indices, log_probs), {"log_prob_min": 0.5, "tail": "ignore"}, ValueError, r"^log_prob_min: a negative"),
        ((indices, log_probs), {"log_prob_min": "9", "tail": "ignore"}, TypeError, r"^log_prob_min: a number"),
        ((indices, log_probs), {"log_tail": ROWS, "tail": "ignore"}, ValueError, r"^log_tail: .*has no bucket"),
        ((indices, log_probs), {"temperature": 0.0}, ValueError, r"^temperature: a positive"),
        ((indices, log_probs), {"log_tail": log_probs}, ValueError, r"^log_tail: shape \[3, 7\] wanted"),
        ((indices, log_probs), {"log_tail": ROWS, "tail": "renormalize"}, ValueError, r"^log_tail: .*has no bucket"),
    ],
)
def test_bad_parts_are_named(arguments, options, problem, message):
    with pytest.raises(problem, match=message):
        TopKLogProbs(*arguments, **options)


def test_bad_values_are_named_with_their_row(backend):
    def refused(match, *few, **options):
        with pytest.raises(ValueError, match=match):
            functional.kl_div(student, TopKLogProbs(*few), **options)

    beyond, twice, positive, too_much, no_number = (
        indices.clone(),
        indices.clone(),
        *(log_probs.clone() for _ in range(3)),
    )
    beyond[1, 3, 0], twice[2, 4, 1] = V, twice[2, 4, 5]
    too_much[1, 1], no_number[2, 6, 0] = -0.1, torch.nan
    positive[0, 2, 2] = 0.1
    refused(r"^teacher.indices: classes below 60 wanted.*row \(1, 3\)", beyond, log_probs)
    refused(r"^teacher.indices: each class once.*row \(2, 4\)", twice, log_probs)
    refused(r"^teacher.log_probs: log-probabilities, at most 0.*row \(0, 2\)", indices, positive)
    refused(r"^teacher.log_probs: log-probabilities, at most 0.*row \(2, 6\)", indices, no_number)
    refused(r"^teacher.log_probs: probabilities whose sum.*row \(1, 1\)", indices, too_much)
    at_most = int(indices.max())
    refused(rf"^teacher.indices: classes below {at_most} wanted", indices, log_probs, num_classes=at_most)


def test_bad_use_is_named(backend):
    few = TopKLogProbs(indices, log_probs)
    with pytest.raises(TypeError, match=r"^student: logits or LinearLogits wanted, got TopKLogProbs"):
        functional.kl_div(few, few)
    for name in ("dkd_loss", "nkd_loss"):
        with pytest.raises(ValueError, match=rf"^teacher: {name} needs all classes"):
            getattr(functional, name)(student, few, TARGET)
    with pytest.raises(ValueError, match=r"^teacher: bernoulli_kl_div needs all classes"):
        functional.kd_loss(student, few, TARGET, divergence="bernoulli_kl_div")
    with pytest.raises(ValueError, match=r"^teacher: dist_loss needs all classes"):
        functional.dist_loss(student, few)
    with pytest.raises(ValueError, match=r"^standardize: it needs all logits"):
        functional.kl_div(student, few, standardize=True)
    for name in ("negative_log_acceptance", "adaptive_kl_div"):
        with pytest.raises(ValueError, match=rf"^teacher: {name} is no sum of terms"):
            getattr(functional, name)(student, TopKLogProbs(indices, log_probs, tail="ignore"))
    for temperature in (2.0, torch.tensor(2.0), 1 + ROWS):
        with pytest.raises(ValueError, match=r"^teacher_temperature: .*taken, 1.0, wanted with tail='bucket'"):
            functional.kl_div(student, few, temperature=temperature)
    functional.kl_div(student, few, temperature=2.0, teacher_temperature=torch.ones(LEADING))
    with pytest.raises(ValueError, match=r"^dim: the classes of TopKLogProbs are last"):
        functional.kl_div(student, few, dim=1)
    with pytest.raises(ValueError, match=r"^teacher: the student's shape"):
        functional.kl_div(student[:2], few)
    with pytest.raises(ValueError, match=r"^student: logits of shape"):
        functional.kl_div(torch.tensor(1.0), few)
    with pytest.raises(ValueError, match=r"^teacher.log_probs: no gradient flows to it"):
        functional.kl_div(student, TopKLogProbs(indices, log_probs.clone().requires_grad_()))
    with pytest.raises(ValueError, match=r"^teacher.indices: a tensor on the student's device"):
        functional.kl_div(student, TopKLogProbs(indices.to("meta"), log_probs))
