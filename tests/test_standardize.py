"""standardize=True: logits less their mean, over their standard deviation, and the gradient through both."""

import dataclasses
import functools

import cases
import pytest
import torch
from test_rows import cancellation, logit_size, run, storage_error
from tolerances import FLOOR, error
from truth import truth

from fastkd.reference import compute_dtype

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = {name: functools.partial(loss, standardize=True) for name, loss in cases.LOSSES.items()}
CASES = [dataclasses.replace(case, options={**case.options, "standardize": True}) for case in cases.FINITE]


def right(name, student, teacher, **options):
    name, _, beta = name.partition("-")
    return truth(name, student, teacher, **{"standardize": True, **options}, **({"beta": float(beta)} if beta else {}))


def what_cancels(name, student, teacher, **options):
    """How large the terms of the gradient are beside itself: of two classes nothing but the 1e-7 is left of them."""
    terms, grad = (right(name, student, teacher, terms_of_gradient=x, **options)[1] for x in (True, False))
    return max(1.0, (terms.norm() / grad.norm()).nan_to_num(1.0, posinf=1e300).item())


def check(name, student, teacher, loss_function=None, plain=False, **options):
    """Against extended precision. Once what the kernels have written is rounded: in half precision to the dtype."""
    loss, grad = run(loss_function or LOSSES[name], student, teacher, **options)
    loss_ref, grad_ref = right(name, student, teacher, **options)
    compute = compute_dtype(student, teacher)
    assert loss.dtype == compute
    assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
    # a skewed mean, and powers of what is standardized
    tolerance = 4 * FLOOR[compute] * logit_size(student) * (5 if name == "js_div-0.1" else 1)
    assert error(loss, loss_ref) <= tolerance * (cancellation(name, student, teacher, options) if plain else 1)
    options = {"terms": what_cancels(name, student, teacher, **options)}
    assert error(grad, grad_ref) <= tolerance * options["terms"] + 2 * storage_error(grad, grad_ref)
    return loss, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.of_each_kind
def test_matches_extended_precision(backend, name, case, dtype):
    student, teacher, options = case.inputs(dtype)
    options.pop("standardize")
    for reduction in ("none", "batchmean"):
        options = {**options, "reduction": reduction}
        if reduction == "none":
            options.pop("normalizer", None)
            check(name, student, teacher, plain=backend == "torch", **options)
            options = case.inputs(dtype)[2]
            options.pop("standardize")
            continue
        check(name, student, teacher, plain=backend == "torch", **options)
