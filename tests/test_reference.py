"""The backend "torch", plain PyTorch: what it promises beside the values that all backends have in common."""

import cases
import feature_cases
import pytest
import relation_cases
import test_attention
import torch
from relation_checks import run
from relation_truth import nearest, triplets
from tolerances import error
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import functional
from fastkd._divergences import OF_RELATIONS


class WithoutFloat64(TorchDispatchMode):
    """As on a device that has no float64: whatever makes one raises."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype is torch.float64:
                raise TypeError(f"{func} makes a tensor of float64")
        return out


N, D = 8, 12
MASK, WEIGHT = torch.arange(N) % 3 > 0, torch.rand(N)
ROWS = {"mask": MASK, "weight": WEIGHT}
KEYS = torch.randn(2 * N, D), torch.randn(2 * N, 9)


def calls():
    """Every loss with every option, of a student [N, D] and teachers [N, D] and [N, 9]."""
    for name, loss in cases.LOSSES.items():
        for reduction in ("none", "sum", "batchmean", "mean"):
            options = {"reduction": reduction, **ROWS, "temperature": WEIGHT + 1, "teacher_temperature": 2.0}
            yield f"{name}-{reduction}", lambda s, t, _, loss=loss, options=options: loss(s, t, **options)
        for options in ({}, {"normalizer": 3.0}, {"normalizer": torch.tensor(3.0), "t_squared": False}):
            yield f"{name}-{list(options)}", lambda s, t, _, loss=loss, options=options: loss(s, t, **options)
        yield f"{name}-inplace", lambda s, t, _, loss=loss: loss(s * 1, t, inplace=True)
    for name, loss in feature_cases.LOSSES.items():
        for reduction in feature_cases.REDUCTIONS:
            options = {"reduction": reduction, **ROWS}
            yield f"{name}-{reduction}", lambda s, t, _, loss=loss, options=options: loss(s, t, **options)
        yield (
            f"{name}-lists",
            lambda s, t, _, loss=loss: loss([s, s], [t, t], layer_weights=[1.0, 0.5], return_layers=True)[0],
        )
        yield f"{name}-maps", lambda s, t, _, loss=loss: loss(s.view(2, 4, 3, 4), t.view(2, 4, 3, 4))
    for p in (1, 2, 2.5):
        yield (
            f"attention-{p}",
            lambda s, t, _, p=p: functional.attention_transfer(s.view(2, 4, 3, 4), t.view(2, 4, 3, 4), p=p),
        )
    for normalize in (None, "l2", "standardize"):
        yield f"linear-{normalize}", lambda s, _, t, normalize=normalize: functional.linear_feature_mse(
            s, torch.ones(9, D, dtype=s.dtype), t, projector_bias=torch.ones(9, dtype=s.dtype), normalize=normalize, **ROWS)  # fmt: skip
    for name, loss in relation_cases.LOSSES.items():
        row_options = {"mask": MASK} if name in ("rkd_angle", "rkd_loss") else ROWS
        for options in ({}, row_options):
            yield f"{name}-{list(options)}", lambda s, _, t, loss=loss, options=options: loss(s, t, **options)
    yield "rkd_distance-plain", lambda s, _, t: functional.rkd_distance(s, t, normalize=None, delta=0.5)
    for options in ({"normalize": False}, {"clamp": "both"}, {"clamp": "teacher"}):
        yield f"gram_mse-{options}", lambda s, _, t, options=options: functional.gram_mse(s, t, **options)
    yield "gram_mse-batch", lambda s, _, t: functional.gram_mse(s.view(2, 4, D), t.view(2, 4, 9), mask=MASK.view(2, 4))
    for divergence in OF_RELATIONS:
        for normalize in (False, True):
            options = {"divergence": divergence, "normalize": normalize, **ROWS}
            yield (
                f"relation_kl-{divergence}-{normalize}",
                lambda s, _, t, options=options: functional.relation_kl(s, t, **options),
            )
    keys = {"key_mask": torch.arange(2 * N) % 4 > 0, "temperature": WEIGHT + 1, "normalize": True}
    yield "relation_kl-keys", lambda s, _, t: functional.relation_kl(
        s, t, student_keys=KEYS[0].to(s.dtype).requires_grad_(), teacher_keys=KEYS[1], **keys)  # fmt: skip
    yield "triplet-labels", lambda s, *_: functional.relational_triplet(s, labels=torch.arange(N) % 3, **ROWS)
    yield "triplet-neighbours", lambda s, _, t: functional.relational_triplet(s, t, positives=3, return_active=True)[0]


CALLS = dict(calls())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_float64_is_made_of_smaller_dtypes(dtype):
    """Apple's GPUs have none."""
    student, teacher, other = (torch.randn(N, width).to(dtype) for width in (D, D, 9))
    with fastkd.backend("torch"), WithoutFloat64():
        for name, call in CALLS.items():
            loss = call(student.detach().requires_grad_(), teacher, other)
            try:
                sum(x.sum() for x in (loss if isinstance(loss, list) else [loss])).backward()
            except TypeError as problem:
                raise AssertionError(name) from problem


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_neighbours_whose_squares_leave_the_range(scale):
    """Tight clusters far apart: the order of distances is kept, which float32's squares would lose."""
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(20, 4, generator=generator)
    teacher = 100 * torch.randn(4, 6, generator=generator)[torch.arange(20) % 4] + 1e-3 * torch.randn(
        20, 6, generator=generator
    )
    with fastkd.backend("torch"):
        loss, grad = run(functional.relational_triplet, student, teacher * scale, positives=2)
    expected, expected_grad, _ = triplets(student, nearest(teacher * scale, 2), 1.0)
    assert error(loss, expected) <= 1e-6
    assert error(grad, expected_grad) <= 1e-5


@pytest.mark.parametrize("scale", [1e-9, 1e25])
@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_attention_whose_powers_leave_the_range(p, scale):
    student, teacher = (scale * x for x in test_attention.maps((2, 4, 3, 3), 5))
    with fastkd.backend("torch"):
        test_attention.check(student, teacher, p, upstream=256.0)


def test_lengths_of_long_rows():
    """A million squares are added up without losing digits."""
    student, teacher = 1 + torch.randn(2, 10**6), torch.randn(2, 10**6)
    with fastkd.backend("torch"):
        found, grad = run(functional.feature_mse, student, teacher, normalize="l2")
        expected, expected_grad = run(functional.feature_mse, student.double(), teacher.double(), normalize="l2")
    assert error(found, expected) <= 1e-6
    assert error(grad, expected_grad) <= 1e-6
