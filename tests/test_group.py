"""Losses of classes that are split over ranks: those of whole rows, in values and gradients, on every backend."""

from unittest import mock

import cases
import pytest
import split_ranks
import torch
from conftest import gpu_backends
from rows_checks import DTYPES, check, run
from split_ranks import Group, split
from tolerances import FLOOR, NEAR_CONVERGENCE, error

from fastkd import functional

LOSSES = [name for name in cases.LOSSES if name != "adaptive_kl_div"]


@pytest.fixture(autouse=True)
def threads():
    with split_ranks.threads():
        yield


KINKED = ("total_variation", "negative_log_acceptance")  # whose slope jumps where p = q, which a rounding decides


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.FINITE, ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.of_each_kind
def test_matches_float64(backend, name, case, dtype, reduction, ranks):
    if name in KINKED and "long_row" in case.name:
        name = "kl_div"
    check(name, case, dtype, reduction, backend == "torch", split(cases.LOSSES[name], Group(ranks)))


def both(loss_function, student, teacher, group=None, **options):
    """Loss and gradient of ranks, and of whole rows."""
    group = group or Group(3)
    return run(split(loss_function, group), student, teacher, **options), run(
        loss_function, student, teacher, **options
    )


def agree(loss_function, student, teacher, times=8, **options):
    for ours, whole in zip(*both(loss_function, student, teacher, **options), strict=True):
        assert ours.dtype == whole.dtype
        assert torch.equal(ours.isnan(), whole.isnan())
        assert torch.equal(ours.isinf(), whole.isinf())
        floor = FLOOR[whole.dtype if whole.dtype in (torch.float16, torch.bfloat16) else torch.float32]
        assert error(ours.nan_to_num(), whole.nan_to_num().double()) <= times * floor


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in (*KINKED, "soft_cross_entropy")])
def test_near_convergence(backend, name):
    """What the ranks sum up has terms of one sign: the loss keeps its digits."""
    generator = torch.Generator().manual_seed(3)
    teacher = 3 * torch.randn(16, 1000, generator=generator)
    student = teacher + 1e-3 * torch.randn(16, 1000, generator=generator)
    (loss, _), (exact, _) = both(cases.LOSSES[name], student, teacher)
    exact, _ = run(cases.LOSSES[name], student.double(), teacher.double())
    assert error(loss, exact) <= NEAR_CONVERGENCE * (50 if backend == "torch" else 1)


def test_one_exchange_a_row_and_one_number():
    """kl_div and what is like it sends 24 bytes a row before its gradient, kd_loss its targets' as well and how many
    classes there are, and one number for the loss; the others send their sums. Backward sends nothing."""
    s, t, target = torch.randn(5, 40), torch.randn(5, 40), torch.arange(5)
    sent = {
        "kl_div": (functional.kl_div, {}, [5 * 3, 1]),
        "none": (functional.kl_div, {"reduction": "none"}, [5 * 3, 5]),
        "reverse_kl_div": (functional.reverse_kl_div, {}, [5 * 3, 5 * 3]),
        "kd_loss": (functional.kd_loss, {"target": target}, [5 * 4 + 1, 1]),
        "smoothed": (functional.kd_loss, {"target": target, "label_smoothing": 0.1}, [5 * 5 + 1, 1]),
    }
    for name, (loss_function, options, numbers) in sent.items():
        group = Group(3)
        run(split(loss_function, group), s, t, **options)
        assert group.exchanges == numbers, name
    group = Group(3)
    run(split(functional.kl_div, group), s.double(), t.double())
    assert group.exchanges == [5 * 4, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0), (0.0, 2.0)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize(
    "divergence", ["kl_div", "soft_cross_entropy", "js_div", "negative_log_acceptance", "bernoulli_kl_div"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_targets(backend, dtype, divergence, reduction, weights, smoothing):
    s, t = (2 * torch.randn(6, 30).to(dtype) for _ in range(2))
    options = {
        "target": torch.tensor([0, 29, 7, -100, 12, 3]),
        "mask": torch.tensor([True, True, True, True, False, True]),
        "weight": torch.rand(6) + 0.5,
        "hard_weight": weights[0],
        "soft_weight": weights[1],
        "label_smoothing": smoothing,
        "divergence": divergence,
        "temperature": 2.0,
        "reduction": reduction,
    }
    agree(functional.kd_loss, s, t, **options)


@pytest.mark.parametrize(
    "name", ["kl_div", "soft_cross_entropy", "reverse_kl_div", "negative_log_acceptance", "alpha_beta_div"]
)
def test_impossible_classes(backend, name):
    """A shard without a possible class, a row without one on either side, NaN in one shard, and a masked row."""
    s, t = torch.randn(8, 24), torch.randn(8, 24)
    s[0, :4] = t[0, :4] = -torch.inf  # all that the first of three ranks has
    s[1], t[2] = -torch.inf, -torch.inf
    s[3, 20], t[4, 1] = torch.nan, torch.nan
    s[5, 3], s[6, 20] = torch.inf, -torch.inf
    t[6, 20] = -torch.inf
    s[7] = torch.nan
    mask = torch.arange(8) != 7
    agree(cases.LOSSES[name], s, t, mask=mask, reduction="none", temperature=2.0)


@pytest.mark.parametrize("bounds", [(0, 0, 5, 12), (0, 12, 12, 12), (0, 1, 2, 12)], ids=str)
@pytest.mark.parametrize("name", ["kl_div", "js_div", "bernoulli"])
def test_a_rank_without_classes(backend, name, bounds):
    loss_function = functional.bernoulli_kl_div if name == "bernoulli" else cases.LOSSES[name]
    s, t = torch.randn(5, 12), torch.randn(5, 12)
    ours = run(split(loss_function, Group(3), bounds), s, t, temperature=2.0)
    for out, whole in zip(ours, run(loss_function, s, t, temperature=2.0), strict=True):
        assert error(out, whole.double()) <= 8 * FLOOR[torch.float32]


@pytest.mark.parametrize("name", ["kl_div", "js_div"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_rows_may_have_numbers_of_their_own(backend, name, reduction):
    s, t = torch.randn(6, 40), torch.randn(6, 40)
    of_rows = {"temperature": torch.rand(6) + 0.5, "teacher_temperature": torch.rand(6) + 0.5}
    if name == "js_div":
        of_rows["beta"] = torch.tensor([0.0, 0.3, 1.0, 0.5, 0.9, 0.1])
    agree(cases.LOSSES[name], s, t, reduction=reduction, weight=torch.rand(6), **of_rows)


@pytest.mark.parametrize("name", ["kl_div", "reverse_kl_div"])
def test_inplace(backend, name):
    s, t = torch.randn(6, 40), torch.randn(6, 40)
    (loss, grad), (whole, whole_grad) = (run(f, s, t, **o) for f, o in (
        (split(cases.LOSSES[name], Group(3)), {"inplace": True}), (cases.LOSSES[name], {}),
    ))  # fmt: skip
    assert error(loss, whole.double()) <= FLOOR[torch.float32]
    assert error(grad, whole_grad.double()) <= 8 * FLOOR[torch.float32]


@pytest.mark.parametrize("divergence", ["kl_div", "soft_cross_entropy", "js_div"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_inplace_with_targets(backend, divergence, smoothing):
    """What is asked of the student's logits is asked before its gradient is written over them."""
    s, t = torch.randn(6, 40), torch.randn(6, 40)
    options = {"target": torch.arange(6) * 7, "divergence": divergence, "label_smoothing": smoothing}
    ours = run(split(functional.kd_loss, Group(3)), s, t, inplace=True, **options)
    for out, whole in zip(ours, run(functional.kd_loss, s, t, **options), strict=True):
        assert error(out, whole.double()) <= 8 * FLOOR[torch.float32]


def test_maps_and_no_gradient(backend):
    s, t = torch.randn(2, 12, 3, 4), torch.randn(2, 12, 3, 4)
    group = Group(3)
    shards = [x.split([2, 4, 6], 1) for x in (s, t)]
    losses = split_ranks.on_ranks(group, lambda r: functional.kl_div(shards[0][r], shards[1][r], dim=1, group=group))
    whole = functional.kl_div(s, t, dim=1)
    assert all(error(loss, whole.double()) <= FLOOR[torch.float32] for loss in losses)


def test_bad_input(computed_by):
    s, t, group = torch.randn(4, 9), torch.randn(4, 9), Group(2)
    kd = split(functional.kd_loss, group)
    with pytest.raises(ValueError, match="num_classes: not with classes that are split over ranks"):
        split(functional.kl_div, group)(s, t, num_classes=3)
    with pytest.raises(ValueError, match="return_parts: not with classes that are split"):
        kd(s, t, target=torch.zeros(4, dtype=torch.int64), return_parts=True)


@pytest.mark.parametrize("wrong", [9, -5])
def test_a_target_that_is_no_class(backend, wrong):
    s, t, target = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([0, wrong, 3, 4])
    with pytest.raises(ValueError, match=f"target: classes from 0 to 8 wanted, those of all ranks, got {wrong}"):
        split(functional.kd_loss, Group(2))(s, t, target=target)
    split(functional.kd_loss, Group(2))(s, t, target=target, mask=torch.tensor([True, False, True, True]))


@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kernel", gpu_backends(), indirect=True)
def test_a_target_that_is_no_class_is_nan_where_the_host_cannot_look(kernel, hard_weight, smoothing):
    s, t, target = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([0, 9, 3, 4])
    options = {"target": target, "hard_weight": hard_weight, "label_smoothing": smoothing, "reduction": "none"}
    with mock.patch("fastkd._split_classes.values_known", return_value=False):
        loss, grad = run(split(functional.kd_loss, Group(2)), s, t, **options)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert grad.isnan().all(-1).tolist() == [False, True, False, False]


def test_second_derivatives_are_refused(computed_by):
    s, t, group = torch.randn(4, 9), torch.randn(4, 9), Group(2)
    shards = [x.split([3, 6], -1) for x in (s, t)]

    def twice(rank):
        x = shards[0][rank].clone().requires_grad_()
        loss = functional.kl_div(x, shards[1][rank], group=group)
        torch.autograd.grad(loss, x, create_graph=True)

    with pytest.raises(RuntimeError, match="create_graph=True: fastkd"):
        split_ranks.on_ranks(group, twice)

    def forward_mode(rank):
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(shards[0][rank], torch.ones_like(shards[0][rank]))
            functional.kl_div(x, shards[1][rank], group=group)

    with pytest.raises(RuntimeError, match=r"student: fastkd.*forward-mode AD"):
        split_ranks.on_ranks(Group(2), forward_mode)


def test_one_rank_may_learn_alone(backend):
    """The others exchange what they would: nobody waits."""
    s, t, group = torch.randn(4, 12), torch.randn(4, 12), Group(3)
    shards = [x.split([2, 4, 6], -1) for x in (s, t)]

    def of_rank(rank):
        x = shards[0][rank].clone().requires_grad_(rank == 1)
        with torch.inference_mode(rank == 2):
            return functional.reverse_kl_div(x, shards[1][rank], group=group)

    losses = split_ranks.on_ranks(group, of_rank)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert [loss.requires_grad for loss in losses] == [False, True, False]


def test_widths_that_differ_are_not_a_matter_of_num_classes():
    group = Group(2)
    with pytest.raises(ValueError, match=r"^teacher: the student's shape \[4, 5\] wanted, got \[4, 6\]$"):
        split_ranks.on_ranks(group, lambda _: functional.kl_div(torch.randn(4, 5), torch.randn(4, 6), group=group))
