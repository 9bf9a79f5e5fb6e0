"""linear_feature_mse: loss and all gradients against the projection and feature_mse, one after the other."""

import pytest
import torch
from feature_truth import truth
from tolerances import FLOOR, error

import fastkd
from fastkd import functional

pytestmark = pytest.mark.products

PROMISED = {torch.float32: 4e-6, torch.float64: 1e-12}


def made(dtype=torch.float32, shape=(6, 5), student_features=7, teacher_features=12):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(*shape, student_features, generator=generator).to(dtype)
    weight = torch.randn(teacher_features, student_features, generator=generator).to(dtype) / 3
    bias = torch.randn(teacher_features, generator=generator).to(dtype)
    return [x.requires_grad_() for x in (student, weight, bias)], torch.randn(
        *shape, teacher_features, generator=generator
    )


def two_steps(learned, teacher, normalize, upstream=None, **options):
    """In float64."""
    student, weight, bias = (x.detach().double().requires_grad_() for x in learned)
    projected = torch.nn.functional.linear(student, weight, bias)
    name = "feature_mse" + (f"-{normalize}" if normalize else "")
    loss, grad = truth(name, projected, teacher, upstream, **options)
    return loss, torch.autograd.grad(projected, (student, weight, bias), grad)


@pytest.mark.parametrize("normalize", [None, "l2", "standardize"])
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", PROMISED, ids=str)
def test_all_gradients(backend, dtype, masked, reduction, normalize):
    learned, teacher = made(dtype)
    options = {"reduction": reduction}
    if masked:
        options |= {"mask": torch.rand(6, 5) < 0.6, "weight": torch.rand(6, 5)}
    upstream = torch.rand(6, 5, dtype=dtype) if reduction == "none" else torch.tensor(0.5, dtype=dtype)
    student, weight, bias = learned
    loss = functional.linear_feature_mse(student, weight, teacher, projector_bias=bias, normalize=normalize, **options)
    grads = torch.autograd.grad(loss, learned, upstream)
    loss_ref, grads_ref = two_steps(learned, teacher, normalize, upstream, **options)
    assert loss.dtype == dtype
    assert error(loss.detach(), loss_ref) <= PROMISED[dtype]
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        assert error(grad, grad_ref) <= PROMISED[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend, dtype):
    """The residual and the products have the dtype of the projection."""
    learned, teacher = made(dtype)
    loss = functional.linear_feature_mse(learned[0], learned[1], teacher, projector_bias=learned[2])
    grads = torch.autograd.grad(loss, learned, torch.tensor(64.0))
    loss_ref, grads_ref = two_steps(learned, teacher, None, torch.tensor(64.0))
    assert loss.dtype == torch.float32
    assert error(loss.detach(), loss_ref) <= 4 * FLOOR[dtype]
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        assert grad.dtype == dtype
        assert error(grad, grad_ref) <= 4 * FLOOR[dtype]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_what_is_learned_has_a_gradient(backend, which):
    learned, teacher = made()
    tensors = [x if i == which else x.detach() for i, x in enumerate(learned)]
    loss = functional.linear_feature_mse(tensors[0], tensors[1], teacher, projector_bias=tensors[2])
    loss.backward()
    everything = functional.linear_feature_mse(learned[0], learned[1], teacher, projector_bias=learned[2])
    assert error(learned[which].grad, torch.autograd.grad(everything, learned[which])[0]) <= 1e-6
    assert not functional.linear_feature_mse(*(x.detach() for x in learned[:2]), teacher).requires_grad


def test_a_retained_graph_gives_the_same_again(backend):
    learned, teacher = made()
    loss = 0.5 * functional.linear_feature_mse(learned[0], learned[1], teacher)
    first = torch.autograd.grad(loss, learned[:2], retain_graph=True)
    again = torch.autograd.grad(loss, learned[:2])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_one_row_and_no_rows(backend):
    for shape in ((), (0,), (3, 0)):
        learned, teacher = made(shape=shape)
        loss = functional.linear_feature_mse(learned[0], learned[1], teacher, projector_bias=learned[2])
        grads = torch.autograd.grad(loss, learned)
        assert [x.shape for x in grads] == [x.shape for x in learned]
        assert (loss == 0) == (teacher.numel() == 0)


def test_gradcheck(backend):
    learned, teacher = made(torch.float64, (3,), 3, 4)
    for normalize in (None, "l2"):
        assert torch.autograd.gradcheck(
            lambda s, w, b, normalize=normalize: functional.linear_feature_mse(
                s, w, teacher.double(), projector_bias=b, normalize=normalize
            ),
            learned,
        )


def test_module_learns_to_project(backend):
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 5), torch.randn(64, 5) @ torch.randn(5, 9)
    module = fastkd.LinearFeatureMSELoss(5, 9)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module(student, teacher)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert {name for name, _ in module.named_parameters()} == {"projector.weight", "projector.bias"}
    assert "normalize=None" in repr(module)


def test_autocast_projects_in_its_dtype(backend):
    learned, teacher = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.linear_feature_mse(learned[0], learned[1], teacher, projector_bias=learned[2])
    grads = torch.autograd.grad(loss, learned)
    _, grads_ref = two_steps(learned, teacher, None)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        assert grad.dtype == torch.float32
        assert error(grad, grad_ref) <= 8 * FLOOR[torch.bfloat16]
