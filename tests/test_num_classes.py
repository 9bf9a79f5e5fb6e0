"""num_classes: heads that are padded, of which the first classes count."""

import functools

import pytest
import torch

import fastkd
from fastkd import functional
from fastkd._divergences import BY_NAME, TARGET_LOSSES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGET = torch.tensor([3, 0, -100, 6, 1, 2])
LOSSES = {name: getattr(functional, name) for name in (*BY_NAME, "dist_loss")}
LOSSES |= {name: functools.partial(getattr(functional, name), target=TARGET) for name in ("kd_loss", *TARGET_LOSSES)}
N, COUNTED = 6, 7


def logits(V, dtype=torch.float32, seed=0):
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed + V)).to(dtype)


def padded(x, V, fill=100.0):
    """In front of classes that do not count, whatever they hold."""
    return torch.cat([x, torch.full((*x.shape[:-1], V - x.shape[-1]), fill, dtype=x.dtype)], -1)


def run(loss_function, student, teacher, upstream=1.0, **options):
    student = student.detach().requires_grad_()
    loss = loss_function(student, teacher, **options)
    return loss.detach(), torch.autograd.grad((upstream * loss).sum(), student)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_loss_of_the_first_classes(backend, name, dtype):
    student, teacher = logits(COUNTED, dtype), logits(COUNTED, dtype, seed=1)
    for fill in (100.0, torch.nan, torch.inf):
        wide, wider = padded(student, 12, fill), padded(teacher, 9, fill)
        for reduction in ("batchmean",) if name == "dist_loss" else ("batchmean", "none"):
            options = {} if name == "dist_loss" else {"reduction": reduction}
            expected = run(LOSSES[name], student.clone(), teacher, upstream=3.0, **options)
            loss, grad = run(LOSSES[name], wide, wider, upstream=3.0, num_classes=COUNTED, **options)
            torch.testing.assert_close(loss, expected[0], equal_nan=True)
            torch.testing.assert_close(grad[:, :COUNTED], expected[1])
            assert grad.shape == wide.shape
            assert (grad[:, COUNTED:] == 0).all()


@pytest.mark.parametrize("name", ["kl_div", "dist_loss"])
def test_maps_standardized_and_in_place(backend, name):
    student, teacher = (torch.randn(2, V, 4, 5, generator=torch.Generator().manual_seed(V)) for V in (9, 11))
    options = {"dim": 1, "standardize": True, "num_classes": COUNTED}
    loss_function = LOSSES[name]
    expected = run(loss_function, student[:, :COUNTED], teacher[:, :COUNTED], dim=1, standardize=True)
    loss, grad = run(loss_function, student, teacher, **options)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad[:, :COUNTED], expected[1])
    leaf = student.clone().requires_grad_()
    loss_function(leaf * 1, teacher, inplace=True, **options).backward()
    torch.testing.assert_close(leaf.grad, grad)
    assert (leaf.grad[:, COUNTED:] == 0).all()


def test_mean_counts_them_alone(backend):
    student, teacher = logits(COUNTED), logits(COUNTED, seed=1)
    loss = functional.kl_div(padded(student, 8), padded(teacher, 10), num_classes=COUNTED, reduction="mean")
    torch.testing.assert_close(loss, functional.kl_div(student, teacher, reduction="mean"))


def test_parts_and_the_smoothing_see_them_alone(backend):
    student, teacher = logits(COUNTED), logits(COUNTED, seed=1)
    options = {"target": TARGET, "label_smoothing": 0.2, "return_parts": True}
    expected = functional.kd_loss(student, teacher, **options)
    found = functional.kd_loss(padded(student, 8), padded(teacher, 10), num_classes=COUNTED, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_target_is_one_of_them(backend):
    with pytest.raises(ValueError, match=r"^target: classes from 0 to 4 wanted"):
        functional.kd_loss(logits(9), logits(8), TARGET, num_classes=5)


def test_modules(backend):
    student, teacher = logits(12), logits(9)
    for module in (fastkd.KLDivLoss, fastkd.DISTLoss, fastkd.JSDivLoss):
        assert torch.equal(
            module(num_classes=COUNTED)(student, teacher), module()(student[:, :COUNTED], teacher[:, :COUNTED])
        )
    assert "num_classes=7" in repr(fastkd.KDLoss(num_classes=7))


@pytest.mark.parametrize("name", ["kl_div", "dist_loss"])
def test_bad_numbers_are_named(backend, name):
    student, teacher, loss_function = logits(12), logits(9), LOSSES[name]
    with pytest.raises(ValueError, match=r"^teacher: .*num_classes=9 takes the classes that both have"):
        loss_function(student, teacher)
    for bad, problem in ((0, ValueError), (-1, ValueError), (10, ValueError), (3.0, TypeError), (True, TypeError)):
        with pytest.raises(problem, match=r"^num_classes: .*wanted"):
            loss_function(student, teacher, num_classes=bad)
    for bad, problem in ((0, ValueError), ("7", TypeError)):
        with pytest.raises(problem, match=r"^num_classes: .*wanted"):
            fastkd.KLDivLoss(num_classes=bad)
        with pytest.raises(problem, match=r"^num_classes: .*wanted"):
            fastkd.DISTLoss(num_classes=bad)
    with pytest.raises(ValueError, match=r"^num_classes: .*no dimension of classes"):
        loss_function(torch.tensor(1.0), teacher, num_classes=2)
    with pytest.raises(ValueError, match=r"^teacher: .*wanted"):
        loss_function(student, teacher[:3], num_classes=2)


@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
@pytest.mark.parametrize("name", ["kl_div", "kd_loss", "dist_loss"])
def test_compiled(backend_name, name):
    options = {"target": TARGET} if name == "kd_loss" else {}
    loss_function = functools.partial(getattr(functional, name), num_classes=COUNTED, **options)
    with fastkd.backend(backend_name):
        torch.compiler.reset()
        compiled = torch.compile(loss_function, fullgraph=True, backend="aot_eager", dynamic=True)
        for V in (12, 15):
            student, teacher = logits(V), logits(V - 2)
            found, expected = (run(f, student, teacher) for f in (compiled, loss_function))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
