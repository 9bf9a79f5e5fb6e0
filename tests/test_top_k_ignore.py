"""TopKLogProbs with tail="ignore": the terms of the classes that are known, alone."""

import literal
import pytest
import torch
from rows_checks import storage_error
from tolerances import FLOOR, error
from top_k_checks import DTYPES, LEADING, LOSSES, OPTIONS, ROWS, inputs, run

from fastkd import TopKLogProbs
from fastkd._divergences import BY_NAME


def of_terms(name, student, indices, log_probs, scale=1.0, least=None, upstream=None, **options):
    """Loss and gradient of the K terms alone, in float64, from the definition."""
    student = student.detach().double().requires_grad_()
    z = student[..., : options.get("num_classes")]
    mask = options.get("mask", torch.ones(LEADING, dtype=torch.bool))
    z = torch.where(mask[..., None], z, 0.0)
    T = torch.as_tensor(options.get("temperature", 1.0)).expand(LEADING)[..., None].double()
    there = indices >= 0
    lp = (z / T).log_softmax(-1).gather(-1, indices.clamp(min=0))
    lp, lq = (torch.where(there, x, -1.0) for x in (lp, log_probs.double()))
    if least is not None:
        lp, lq = (x.clamp(min=least) for x in (lp, lq))
    rows = torch.where(there, literal.TERMS[name](lp.exp(), lq.exp(), lp, lq), 0.0).sum(-1)
    rows = torch.where(mask, rows * T.squeeze(-1) ** 2 * options.get("weight", 1.0), 0.0)
    loss = rows if options.get("reduction") == "none" else rows.sum() / options.get("normalizer", mask.sum())
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("least", [None, -3.0])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", literal.TERMS)
def test_a_tail_that_is_ignored(backend, name, options, least, dtype):
    """The terms of the K classes alone; the student is among all."""
    options = dict(OPTIONS[options])
    if options.get("reduction") == "none":
        options["upstream"] = 1 + ROWS
    if "teacher_temperature" in options:
        options["scale"] = 2.0
    student, indices, log_probs = inputs(dtype)
    found = run(name, student, indices, log_probs, "ignore", least=least, **options)
    expected = of_terms(name, student, indices, log_probs, least=least, **options)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    for x, right in zip(found, expected, strict=True):
        assert error(x, right) <= 32 * FLOOR[compute] + (storage_error(x, right) if x.dim() == 3 else 0)


@pytest.mark.parametrize("name", literal.TERMS)
def test_a_student_without_any_possible_class(backend, name):
    """Loss +inf and no gradient, whatever the tail; but of padding alone the loss is 0."""
    student, indices, log_probs = inputs()
    student[1, 1], student[2, 2] = -torch.inf, -torch.inf  # the second has padding alone
    loss, grad = run(name, student, indices, log_probs, "ignore", reduction="none")
    assert loss[1, 1] == torch.inf
    assert loss[2, 2] == 0
    assert not grad[1, 1].any()
    assert loss.isfinite().sum() == loss.numel() - 1


@pytest.mark.parametrize("name", ["js_div", "symmetric_kl_div", "skew_kl_div"])
def test_a_parameter_out_of_its_range_is_nan_where_nobody_looks(name):
    student, indices, log_probs = inputs()
    few = TopKLogProbs(indices, log_probs, tail="ignore")

    def loss(value):
        return LOSSES[name](student, few, **{BY_NAME[name].parameter.name: value}, reduction="none")

    torch.compiler.reset()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(torch.where(ROWS < 0.5, 0.5, 1.2))
    there = (indices >= 0).any(-1)
    assert found[(ROWS >= 0.5) & there].isnan().all()
    assert found[ROWS < 0.5].isfinite().all()
