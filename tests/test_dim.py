"""dim: logits whose classes are not last."""

import itertools

import cases
import pytest
import torch

import fastkd
from fastkd import functional
from fastkd._divergences import BY_NAME

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = list(BY_NAME)
MAPS = (2, 19, 5, 13)  # 65 pixels: no whole number of vectors


def maps(shape=MAPS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def run(loss_function, student, teacher, upstream=None, **options):
    student = student.detach().requires_grad_()
    loss = loss_function(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss, student, upstream)
    return loss.detach(), grad


@pytest.mark.parametrize("dim", [1, -3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.of_each_kind
def test_maps_are_their_pixels(backend, name, reduction, dtype, dim):
    """The classes brought to the end by the user, in memory of their own, have the same loss and gradient."""
    student, teacher = maps(dtype=dtype)
    leading = (MAPS[0], *MAPS[2:])
    options = {
        "temperature": torch.linspace(0.5, 4, leading[-1]),
        "mask": torch.arange(leading[-2])[:, None] != 2,
        "weight": torch.linspace(0, 1, 2)[:, None, None] + 0.5,
        "reduction": reduction,
    }
    upstream = torch.linspace(-1, 1, 130).reshape(leading) if reduction == "none" else None
    upstream = None if upstream is None else upstream.to(dtype if dtype == torch.float64 else torch.float32)
    function = getattr(functional, name)
    loss, grad = run(function, student, teacher, upstream, dim=dim, **options)
    rows = [x.movedim(1, -1).contiguous() for x in (student, teacher)]
    wanted, wanted_grad = run(function, *rows, upstream, **options)
    assert loss.shape == wanted.shape
    assert grad.dtype == dtype
    assert grad.is_contiguous() or backend == "torch"  # as the student is: no copy is made of it later
    tolerance = 1e-13 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    torch.testing.assert_close(grad.movedim(1, -1), wanted_grad, rtol=tolerance + step, atol=tolerance / 4 + 2.0**-24)


@pytest.mark.parametrize("dim", range(-4, 4))
def test_every_dimension(backend, dim):
    student, teacher = maps((3, 4, 5, 6), torch.float64)
    loss, grad = run(functional.kl_div, student, teacher, dim=dim)
    wanted, wanted_grad = run(functional.kl_div, student.movedim(dim, -1), teacher.movedim(dim, -1))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, wanted_grad.movedim(-1, dim))


def test_betas_of_pixels(backend):
    """One beta for each pixel, some of them ends, where others are computed together."""
    student, teacher = maps(dtype=torch.float64)
    beta = torch.tensor([0.3, 0.0, 1.0, 0.7] + [0.5] * 9)
    loss, grad = run(
        functional.js_div, student, teacher, torch.ones(2, 5, 13).double(), beta=beta, dim=1, reduction="none"
    )
    for at, one in enumerate(beta.tolist()):
        pixel = [x[..., at] for x in (student, teacher)]
        wanted, wanted_grad = run(
            functional.js_div, *pixel, torch.ones(2, 5).double(), beta=one, dim=1, reduction="none"
        )
        torch.testing.assert_close(loss[..., at], wanted)
        torch.testing.assert_close(grad[..., at], wanted_grad)


def test_inplace(backend):
    student, teacher = maps()
    wanted = run(functional.kl_div, student, teacher, dim=1)[1]
    leaf = student.clone().requires_grad_()
    logits = leaf * 1.0
    functional.kl_div(logits, teacher, dim=1, inplace=True).backward()
    assert torch.equal(leaf.grad, wanted)
    with pytest.raises(ValueError, match="inplace: the student's logits are a leaf"):
        functional.kl_div(leaf, teacher, dim=1, inplace=True)


def test_gradcheck(backend):
    student, teacher = maps((2, 3, 3, 4), torch.float64)
    student.requires_grad_()
    fast = backend in ("triton-interpreter", "cuda-cusim")
    assert torch.autograd.gradcheck(lambda x: functional.kl_div(x, teacher, dim=1), student, fast_mode=fast)


def test_a_temperature_that_changes_before_backward(backend):
    """It is a tensor that the user anneals in place; the loss has been made already."""
    student, teacher = maps()
    temperature, upstream = torch.tensor(2.0), torch.ones(2, 5, 13)
    options = {"dim": 1, "reduction": "none"}
    wanted = run(functional.kl_div, student, teacher, upstream, temperature=2.0, **options)[1]
    student = student.clone().requires_grad_()
    loss = functional.kl_div(student, teacher, temperature=temperature, **options)
    if backend != "torch":
        temperature.mul_(0.5)
    loss.backward(upstream)
    torch.testing.assert_close(student.grad, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_student(backend, dtype):
    """One map for all samples of the batch, whose gradients add up."""
    student, teacher = maps(dtype=dtype)
    student = student[:1].clone().requires_grad_()
    functional.kl_div(student.expand(2, -1, -1, -1), teacher, dim=1, reduction="sum").backward()
    parts = [run(functional.kl_div, student, x, dim=1, reduction="sum")[1] for x in teacher.split(1)]
    step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 1e-6)
    torch.testing.assert_close(student.grad, parts[0] + parts[1], rtol=step, atol=step / 4)


def test_channels_last(backend):
    """Of which the classes lie next to each other: the rows are read as rows, and the gradient lies as the student."""
    student, teacher = (x.to(memory_format=torch.channels_last) for x in maps())
    loss, grad = run(functional.kl_div, student, teacher, dim=1)
    torch.testing.assert_close(loss, run(functional.kl_div, *maps(), dim=1)[0])
    assert grad.is_contiguous(memory_format=torch.channels_last) or backend == "torch"


@pytest.mark.parametrize("name", LOSSES)
def test_modules(name):
    student, teacher = maps()
    words = "".join(word.capitalize() for word in name.split("_"))
    module = getattr(fastkd, words.replace("Kl", "KL").replace("Js", "JS") + "Loss")(dim=1)
    assert torch.equal(module(student, teacher), getattr(functional, name)(student, teacher, dim=1))
    assert "dim=1" in repr(module)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    compiled = torch.compile(
        lambda s, t: functional.kl_div(s, t, dim=1, temperature=2.0), fullgraph=True, dynamic=dynamic
    )
    for shape in (MAPS, (1, 19, 4, 4)):
        student, teacher = maps(shape)
        loss, grad = run(compiled, student, teacher)
        wanted, wanted_grad = run(functional.kl_div, student, teacher, dim=1, temperature=2.0)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(grad, wanted_grad)
        assert grad.is_contiguous()


def test_a_pixel_does_not_depend_on_its_neighbours(kernel):
    """Nor on the threads, nor on how many are computed together: the same bits."""
    student, teacher = maps((1, 30, 1, 700))
    with torch.no_grad():
        rows = functional.kl_div(student, teacher, dim=1, reduction="none")[0, 0]
        for first, last in itertools.pairwise((0, 16, 290, 700)):
            part = [x[..., first:last].contiguous() for x in (student, teacher)]
            assert torch.equal(functional.kl_div(*part, dim=1, reduction="none")[0, 0], rows[first:last])


@pytest.mark.parametrize(
    ("dim", "error", "message"),
    [
        (4, ValueError, r"dim: a dimension of the student's shape \[2, 19, 5, 13\] wanted, got 4"),
        (-5, ValueError, r"dim: a dimension of the student's shape \[2, 19, 5, 13\] wanted, got -5"),
        (1.0, TypeError, "dim: a whole number wanted, got float"),
        (True, TypeError, "dim: a whole number wanted, got bool"),
        (None, TypeError, "dim: a whole number wanted, got NoneType"),
    ],
)
def test_errors(dim, error, message):
    student, teacher = maps()
    for name in LOSSES:
        with pytest.raises(error, match=message):
            getattr(functional, name)(student, teacher, dim=dim)


def test_errors_name_the_shapes_as_they_are():
    student, teacher = maps()
    wanted = r"teacher: the student's shape \[2, 19, 5, 13\] wanted, got \[2, 10, 5, 13\].*num_classes=10 takes"
    with pytest.raises(ValueError, match=wanted):
        functional.kl_div(student, teacher[:, :10], dim=1)
    with pytest.raises(ValueError, match=r"dim: a dimension of the teacher's shape \[13\] wanted, got 1"):
        functional.kl_div(student, teacher[0, 0, 0], dim=1)
    with pytest.raises(ValueError, match=r"mask: a shape that broadcasts to \[2, 5, 13\]"):
        functional.kl_div(student, teacher, dim=1, mask=torch.ones(2, 19, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="dim: a whole number wanted, got str"):
        fastkd.KLDivLoss(dim="1")


def test_cases_lie_as_they_say():
    """What the tests of rows call maps has its rows side by side in every dtype."""
    for case in cases.FINITE:
        student = case.inputs(torch.float16)[0]
        assert (student.stride(-1) != 1) == ("map" in case.name), case.name
