"""linear_feature_mse: loss and all gradients against the projection and feature_mse, one after the other."""

import pytest
import torch
from conftest import gradcheck
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
    """In float64, of rows."""
    student, weight, bias = (x.detach().double().requires_grad_() for x in learned)
    shape = student.shape[:-1]
    projected = torch.nn.functional.linear(student, weight, bias).reshape(-1, len(weight))
    name = "feature_mse" + (f"-{normalize}" if normalize else "")
    options |= {key: options[key].reshape(-1) for key in ("mask", "weight") if key in options}
    upstream = upstream if upstream is None or not upstream.dim() else upstream.reshape(-1)
    loss, grad = truth(name, projected, teacher.reshape(projected.shape), upstream, **options)
    return loss.view(shape) if loss.dim() else loss, torch.autograd.grad(projected, (student, weight, bias), grad)


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


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def every_other(x):
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


MAPS = {  # shapes of rows, where their features are, how maps lie in memory, and a reduction
    "maps": ((2, 5, 3), 1, torch.Tensor.contiguous, "mean"),
    "large_maps": ((2, 9, 8), 1, torch.Tensor.contiguous, "none"),  # of which a sample's products are one by one
    "channels_last": ((2, 5, 3), 1, channels_last, "none"),
    "mixed": ((2, 5, 3), 1, lambda x: channels_last(x) if x.shape[1] == 7 else x.contiguous(), "sum"),
    "gaps": ((2, 5, 3), 1, every_other, "batchmean"),
    "one_position": ((4, 1, 1), 1, torch.Tensor.contiguous, "none"),
    "first": ((6,), 0, torch.Tensor.contiguous, "mean"),
    "video": ((2, 2, 3, 2), 1, torch.Tensor.contiguous, "batchmean"),
    "heads": ((2, 3, 4), -1, torch.Tensor.contiguous, "mean"),
}


def made_maps(name, dtype=torch.float32):
    """Rows of features, and the same as maps."""
    shape, dim, lie, _ = MAPS[name]
    (student, weight, bias), teacher = made(dtype, shape)
    maps = lie(student.detach().movedim(-1, dim)).requires_grad_()
    given = {} if dim == 1 and len(shape) == 3 else {"dim": dim}
    return dim, given, (student, weight, bias), teacher, maps, lie(teacher.movedim(-1, dim))


@pytest.mark.parametrize("name", MAPS)
def test_maps(backend, name):
    """A 1x1 convolution over the channels; its rows are the positions."""
    dim, given, learned, teacher, maps, teacher_maps = made_maps(name)
    shape, reduction = teacher.shape[:-1], MAPS[name][-1]
    options = {"reduction": reduction}
    if reduction != "sum":
        options |= {"mask": torch.rand(shape) < 0.8, "weight": torch.rand(shape)}
    normalize = {"none": "l2", "batchmean": "standardize"}.get(reduction)
    upstream = torch.rand(shape) if reduction == "none" else torch.tensor(0.5)
    _, weight, bias = learned
    loss = functional.linear_feature_mse(
        maps, weight, teacher_maps, projector_bias=bias, normalize=normalize, **options, **given
    )
    assert loss.shape == upstream.shape
    grads = torch.autograd.grad(loss, (maps, weight, bias), upstream)
    loss_ref, grads_ref = two_steps(learned, teacher, normalize, upstream, **options)
    assert error(loss.detach(), loss_ref) <= PROMISED[torch.float32]
    for grad, grad_ref in zip((grads[0].movedim(dim, -1), *grads[1:]), grads_ref, strict=True):
        assert error(grad, grad_ref) <= PROMISED[torch.float32]
    without = functional.linear_feature_mse(
        maps.detach(),
        weight.detach(),
        teacher_maps,
        projector_bias=bias.detach(),
        normalize=normalize,
        **options,
        **given,
    )
    assert error(without, loss_ref) <= PROMISED[torch.float32]


@pytest.mark.parametrize("name", ["maps", "large_maps", "channels_last"])
def test_maps_in_half_precision_and_under_autocast(name):
    _, given, learned, teacher, maps, teacher_maps = made_maps(name, torch.bfloat16)
    loss = functional.linear_feature_mse(maps, learned[1], teacher_maps, **given)
    grads = torch.autograd.grad(loss, (maps, learned[1]), torch.tensor(64.0))
    _, single, (_, weight, bias), _, single_maps, _ = made_maps(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.linear_feature_mse(single_maps, weight, teacher_maps, projector_bias=bias, **single)
    single_grads = torch.autograd.grad(loss, (single_maps, weight, bias))
    without_bias = [*learned[:2], torch.zeros_like(learned[2])]
    _, grads_ref = two_steps(without_bias, teacher, None, torch.tensor(64.0))
    for grad, grad_ref in zip(grads, grads_ref[:2], strict=False):
        assert grad.dtype == torch.bfloat16
        assert error(grad.movedim(1, -1) if grad.dim() == 4 else grad, grad_ref) <= 4 * FLOOR[torch.bfloat16]
    _, grads_ref = two_steps(made_maps(name)[2], teacher, None)
    for grad, grad_ref in zip(single_grads, grads_ref, strict=True):
        assert grad.dtype == torch.float32
        assert error(grad.movedim(1, -1) if grad.dim() == 4 else grad, grad_ref) <= 8 * FLOOR[torch.bfloat16]


def test_maps_keep_their_layout():
    """Neither the student nor its gradient is copied into another."""
    for name in ("maps", "channels_last"):
        *_, maps, teacher = made_maps(name)
        loss = functional.linear_feature_mse(maps, torch.randn(12, 7), teacher)
        (grad,) = torch.autograd.grad(loss, maps)
        assert grad.stride() == maps.stride()


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
        assert gradcheck(
            backend,
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
    maps = fastkd.LinearFeatureMSELoss(5, 9, dim=0)
    maps.load_state_dict(module.state_dict())
    assert error(maps(student.T, teacher.T), module(student, teacher)) <= 1e-6
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_projector_made_in_inference_mode(backend, dtype):
    student = torch.randn(3, 4).to(dtype).requires_grad_()
    with torch.inference_mode():
        made = [torch.randn(shape).to(dtype) for shape in ((5, 4), (5,), (3, 5))]

    def run(weight, bias, teacher):
        loss = functional.linear_feature_mse(student, weight, teacher, projector_bias=bias)
        return loss.detach(), *torch.autograd.grad(loss, student)

    found, expected = run(*made), run(*(x.clone() for x in made))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("normalizer", [7, torch.tensor(7)], ids=["number", "tensor"])
def test_a_normalizer_replaces_the_divisor(backend, normalizer):
    student, weight, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4), torch.randn(6, 5)
    mask = torch.tensor([True, False, True, True, True, False])
    total = functional.linear_feature_mse(student, weight, teacher, mask=mask, reduction="sum")
    loss = functional.linear_feature_mse(student, weight, teacher, mask=mask, normalizer=normalizer)
    torch.testing.assert_close(loss, total / 7)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, total / 7)))
    nothing = {"mask": torch.zeros(6, dtype=torch.bool), "normalizer": normalizer * 0}
    assert functional.linear_feature_mse(student, weight, teacher, **nothing) == 0
    with pytest.raises(ValueError, match=r"^normalizer: 0 is wanted only where no row counts"):
        functional.linear_feature_mse(student, weight, teacher, normalizer=normalizer * 0)


def test_masks_and_weights_broadcast_to_the_rows(backend):
    student, weight, teacher = torch.randn(3, 5, 4), torch.randn(6, 4), torch.randn(3, 5, 6)
    mask = torch.tensor([[True], [False], [True]])
    loss = functional.linear_feature_mse(student, weight, teacher, mask=mask, weight=torch.arange(5.0))
    whole = {"mask": mask.expand(3, 5).contiguous(), "weight": torch.arange(5.0).repeat(3, 1)}
    assert torch.equal(loss, functional.linear_feature_mse(student, weight, teacher, **whole))
