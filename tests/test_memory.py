"""Peak extra memory, measured on the process: one gradient, or none."""

import pytest
import torch

from bench.measure import CLOCKS, Provider
from fastkd import functional
from fastkd._divergences import DERIVED, REGISTRY, TARGET_LOSSES
from fastkd.ops import standardize

N, V = 320, 32000  # more than 32 MiB, which are always pages that were not the process's before
GRADIENT = N * V * 4
MANY = 6144
SLACK = 6 << 20  # the loss per row, scratch memory of 12 bytes a class and thread, the interpreter


def peak(step, prepare):
    provider = Provider("", prepare, step)
    provider.call(*provider.prepare())  # scratch memory is kept from here on
    found = CLOCKS["cpu"].peak_extra_bytes(provider)
    if found is None:
        pytest.skip("this system does not tell a process's peak memory")
    return found


@pytest.fixture(scope="module")
def logits():
    return torch.randn(N, V), torch.randn(N, V)


def test_training_holds_one_gradient(logits):
    student, teacher = logits
    used = peak(lambda s: functional.kl_div(s, teacher).backward(), lambda: (student.detach().requires_grad_(),))
    assert GRADIENT <= used <= GRADIENT + SLACK  # the lower bound proves that the measure sees it


@pytest.mark.parametrize("name", [*REGISTRY, *DERIVED, *TARGET_LOSSES, "kd_loss", "dist_loss"])
def test_every_loss_of_logits_holds_one_gradient(logits, name):
    student, teacher = logits
    loss, more = getattr(functional, name), ()
    if name in {*TARGET_LOSSES, "kd_loss"}:
        more = (torch.arange(N),)
    used = peak(lambda s: loss(s, teacher, *more).backward(), lambda: (student.detach().requires_grad_(),))
    columns = 8 << 20 if name == "dist_loss" else 0  # the moments of every class
    assert GRADIENT <= used <= GRADIENT + SLACK + columns


def test_an_upstream_factor_costs_no_second_gradient(logits):
    student, teacher = logits
    used = peak(
        lambda s: (0.5 * functional.kl_div(s, teacher)).backward(), lambda: (student.detach().requires_grad_(),)
    )
    assert used <= GRADIENT + SLACK


def test_inplace_holds_none(logits):
    student, teacher = logits
    used = peak(
        lambda s: (0.5 * functional.kl_div(s, teacher, inplace=True)).backward(),
        lambda: (student.detach().requires_grad_().clone(),),
    )
    assert used <= SLACK


@pytest.mark.parametrize("inplace", [False, True])
def test_standardized_logits_are_held_in_slabs(logits, inplace):
    student, teacher = logits
    used = peak(
        lambda s: (0.5 * functional.kl_div(s, teacher, standardize=True, inplace=inplace)).backward(),
        lambda: (student.detach().requires_grad_().clone(),),
    )
    assert used <= (0 if inplace else GRADIENT) + 2 * 4 * standardize.SLAB["cpu"] + SLACK


def test_inference_holds_none(logits):
    student, teacher = logits
    assert peak(lambda: functional.kl_div(student, teacher), tuple) <= SLACK


def test_maps_are_not_copied(logits):
    """The gradient lies as they do, so that none is made of it either."""
    student, teacher = (x.view(5, 250, 128, 64) for x in logits)
    used = peak(
        lambda s: (0.5 * functional.kl_div(s, teacher, dim=1)).backward(), lambda: (student.detach().requires_grad_(),)
    )
    assert GRADIENT <= used <= GRADIENT + SLACK
    assert peak(lambda: functional.kl_div(student, teacher, dim=1), tuple) <= SLACK


def test_a_slice_is_not_copied(logits):
    student, teacher = (x.view(8, N // 8, V) for x in logits)
    assert peak(lambda: functional.kl_div(student[:, :-1], teacher[:, :-1]), tuple) <= SLACK


def test_similarity_preserving_holds_no_matrix_of_pairs():
    """N x N would be 1 GiB; a gradient and blocks of rows are a few MiB."""
    student, teacher = torch.randn(16384, 64), torch.randn(16384, 64)
    used = peak(
        lambda s: functional.similarity_preserving(s, teacher).backward(), lambda: (student.detach().requires_grad_(),)
    )
    assert used <= student.numel() * 4 + (48 << 20)


@pytest.mark.parametrize("clamp", [None, "both"])
def test_gram_mse_is_linear_in_memory(clamp):
    """N x N would be 144 MiB."""
    student, teacher = torch.randn(MANY, 32), torch.randn(MANY, 32)
    used = peak(
        lambda s: functional.gram_mse(s, teacher, clamp=clamp).backward(), lambda: (student.detach().requires_grad_(),)
    )
    assert used <= 6 * student.numel() * 4 + (48 << 20)


@pytest.mark.parametrize("name", ["relation_kl", "pkt"])
def test_strips_are_linear_in_memory(name):
    """N x N would be 144 MiB."""
    student, teacher = torch.randn(MANY, 32), torch.randn(MANY, 32)
    loss = getattr(functional, name)
    used = peak(lambda s: loss(s, teacher).backward(), lambda: (student.detach().requires_grad_(),))
    assert used <= 6 * student.numel() * 4 + (48 << 20)


@pytest.mark.parametrize("by", ["labels", "teacher"])
def test_relational_triplet_is_linear_in_memory(by):
    """N x N would be 144 MiB."""
    student = torch.randn(MANY, 32)
    who = {"labels": torch.arange(MANY) % 100} if by == "labels" else {"teacher": torch.randn(MANY, 32)}
    used = peak(
        lambda s: functional.relational_triplet(s, **who).backward(), lambda: (student.detach().requires_grad_(),)
    )
    assert used <= 8 * student.numel() * 4 + (64 << 20)


def test_rkd_distance_is_linear_in_memory():
    """N x N would be 144 MiB."""
    student, teacher = torch.randn(MANY, 32), torch.randn(MANY, 32)
    used = peak(lambda s: functional.rkd_distance(s, teacher).backward(), lambda: (student.detach().requires_grad_(),))
    assert used <= 6 * student.numel() * 4 + (48 << 20)


def test_rkd_angle_holds_no_tensor_of_triples():
    """N x N x N would be 256 MiB."""
    student, teacher = torch.randn(640, 64), torch.randn(640, 64)
    used = peak(lambda s: functional.rkd_angle(s, teacher).backward(), lambda: (student.detach().requires_grad_(),))
    assert used <= 48 << 20


@pytest.mark.parametrize("normalize", [None, "l2", "standardize"])
def test_feature_mse_holds_one_gradient(normalize):
    student, teacher = torch.randn(16384, 1024), torch.randn(16384, 1024)
    used = peak(
        lambda s: (0.5 * functional.feature_mse(s, teacher, normalize=normalize)).backward(),
        lambda: (student.detach().requires_grad_(),),
    )
    assert student.numel() * 4 <= used <= student.numel() * 4 + SLACK


def test_attention_transfer_holds_one_gradient():
    student, teacher = torch.randn(16, 256, 64, 64), torch.randn(16, 128, 64, 64)
    used = peak(
        lambda s: functional.attention_transfer(s, teacher).backward(), lambda: (student.detach().requires_grad_(),)
    )
    assert student.numel() * 4 <= used <= student.numel() * 4 + SLACK


def maps_of(rows, layout):
    """[B, C, 32, 32] of rows [B x 32 x 32, C]."""
    maps = rows.view(-1, 32, 32, rows.shape[1]).movedim(-1, 1)
    return maps.contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [None, torch.contiguous_format, torch.channels_last], ids=str)
def test_linear_feature_mse_holds_the_residual_alone(layout):
    """Of what has the teacher's width; and a gradient of the student's."""
    student, teacher, weight = torch.randn(16384, 64), torch.randn(16384, 1024), torch.randn(1024, 64)
    if layout is not None:
        student, teacher = maps_of(student, layout), maps_of(teacher, layout)
    used = peak(
        lambda s, W: functional.linear_feature_mse(s, W, teacher).backward(),
        lambda: (student.detach().requires_grad_(), weight.detach().requires_grad_()),
    )
    assert used <= (teacher.numel() + student.numel()) * 4 + SLACK
