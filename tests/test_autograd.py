"""What torch asks of a differentiable function: gradcheck, autocast, tensors without values; and modules."""

import cases
import pytest
import relation_cases
import torch
from conftest import gradcheck
from integration_checks import RELATIONAL, both
from tolerances import FLOOR, error

import fastkd
from fastkd import functional

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("name", [name for name in cases.LOSSES if name != "adaptive_kl_div"])  # whose g is a constant
def test_gradcheck(backend, name, reduction):
    loss_function = cases.LOSSES[name]
    student, teacher = (
        torch.randn(3, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 7, dtype=torch.float64),
    )
    options = {
        "temperature": torch.rand(3, dtype=torch.float64) + 1,
        "teacher_temperature": 2.0,
        "mask": torch.tensor([True, False, True]),
        "weight": torch.rand(3, dtype=torch.float64),
        "reduction": reduction,
    }
    assert gradcheck(backend, lambda s: loss_function(s, teacher, **options), student)
    assert gradcheck(backend, lambda s: loss_function(s, teacher), student)


def test_module_equals_function(backend):
    student, teacher, mask = torch.randn(4, 20), torch.randn(4, 20), torch.tensor([True, True, False, True])
    module = fastkd.KLDivLoss(temperature=3.0, teacher_temperature=2.0, t_squared=False, reduction="sum")
    expected = functional.kl_div(
        student, teacher, temperature=3.0, teacher_temperature=2.0, t_squared=False, reduction="sum", mask=mask
    )
    assert torch.equal(module(student, teacher, mask=mask), expected)
    per_row = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = functional.kl_div(
        student, teacher, temperature=per_row, teacher_temperature=2.0, t_squared=False, reduction="sum"
    )
    assert torch.equal(module(student, teacher, temperature=per_row), expected)
    assert "temperature=3.0" in repr(module)


def test_autocast_training_step(backend):
    model = torch.nn.Linear(8, 30)
    x, teacher = torch.randn(5, 8), torch.randn(5, 30)
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.kl_div(model(x), teacher, temperature=2.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.weight.grad.abs().sum() > 0


def test_meta_tensors_have_shapes():
    loss = functional.kl_div(torch.empty(4, 20, device="meta"), torch.empty(4, 20, device="meta"), reduction="none")
    assert loss.shape == (4,)
    assert loss.device.type == "meta"


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_meta_and_fake_tensors_differentiate(reduction):
    def step(student, teacher):
        loss = functional.kl_div(student.requires_grad_(), teacher, reduction=reduction)
        return torch.autograd.grad((0.5 * loss).sum(), student)[0]

    grad = step(torch.empty(4, 20, device="meta"), torch.empty(4, 20, device="meta"))
    assert (grad.shape, grad.device.type) == ((4, 20), "meta")
    with torch._subclasses.FakeTensorMode():
        assert step(torch.empty(4, 20), torch.empty(4, 20)).shape == (4, 20)


@pytest.mark.parametrize("name", RELATIONAL)
def test_gradcheck_of_relations(backend, name):
    student = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 4, dtype=torch.float64)
    assert gradcheck(backend, lambda s: RELATIONAL[name](s, teacher), student)


@pytest.mark.parametrize("name", relation_cases.LOSSES)
def test_autocast_leaves_relations_alone(backend, name):
    """Embeddings in float32 keep their digits, whatever autocast does to products; those in half precision train."""
    student, teacher = torch.randn(9, 6), torch.randn(9, 4)
    loss, grad = both(RELATIONAL[name], student, teacher)
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        autocast_loss = RELATIONAL[name](leaf, teacher)
    (autocast_grad,) = torch.autograd.grad(autocast_loss * 0.5, leaf)
    assert error(autocast_loss, loss) < 2 * FLOOR[torch.float32]
    assert error(autocast_grad, grad) < 2 * FLOOR[torch.float32]
    model = torch.nn.Linear(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = RELATIONAL[name](model(torch.randn(9, 8)), teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", relation_cases.LOSSES)
def test_relations_of_meta_and_fake_tensors(name, dtype):
    def step(student, teacher):
        loss = RELATIONAL[name](student.requires_grad_(), teacher)
        return loss, torch.autograd.grad(0.5 * loss, student)[0]

    loss, grad = step(*(torch.empty(4, width, device="meta", dtype=dtype) for width in (6, 3)))
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "meta")
    assert (grad.shape, grad.dtype, grad.device.type) == ((4, 6), dtype, "meta")
    with torch._subclasses.FakeTensorMode():
        loss, grad = step(torch.empty(4, 6, dtype=dtype), torch.empty(4, 3))
        assert (loss.shape, grad.shape, grad.dtype) == ((), (4, 6), dtype)
