"""relational_triplet beyond what every relational loss is tested for: labels, neighbours, strips, the active share."""

import math

import pytest
import relation_cases as cases
import torch
from conftest import cpu_levels
from relation_checks import PROMISED, check, rounding, run
from relation_truth import nearest, triplets
from tolerances import error

import fastkd
from fastkd import functional
from fastkd.ops import triplet

pytestmark = pytest.mark.products

GENERATOR = torch.Generator().manual_seed(11)
N = 24  # the interpreter takes its time for every row
S, T = torch.randn(N, 6, generator=GENERATOR), torch.randn(N, 9, generator=GENERATOR)


def classes(*sizes):
    """As many samples of each class, mixed."""
    labels = torch.cat([torch.full((n,), 7 * c - 5) for c, n in enumerate(sizes)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


LABELS = {
    "four": classes(6, 6, 6, 6),
    "halves": classes(12, 12),
    "uneven": classes(14, 1, 2, 6, 1),
    "pairs": classes(*(2 for _ in range(12))),
    "extremes": torch.where(classes(12, 12) > 0, 2**63 - 1, -(2**63)),
}
NOTHING = {"one_class": torch.zeros(N, dtype=torch.int64), "no_positives": torch.arange(N)}


def similar(labels):
    return (labels[:, None] == labels).fill_diagonal_(False)


def triplet_loss(*inputs, **options):
    """Loss, gradient and the active share."""
    student = inputs[0].detach().requires_grad_()
    loss, active = functional.relational_triplet(student, *inputs[1:], return_active=True, **options)
    assert (active.dtype, active.shape, active.requires_grad) == (torch.float32, (), False)
    return loss.detach(), torch.autograd.grad(loss, student)[0], active.item()


def agrees(found, truth, dtype=torch.float32):
    compute = torch.promote_types(dtype, torch.float32)
    loss, grad, active = found
    assert error(loss, truth[0]) <= PROMISED[compute]
    assert error(grad, truth[1]) <= PROMISED[compute] + rounding(grad, truth[1], compute)
    assert active == pytest.approx(truth[2], rel=1e-6)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", LABELS)
def test_labels(backend, name, dtype):
    student, labels = S.to(dtype), LABELS[name]
    agrees(triplet_loss(student, labels=labels), triplets(student, similar(labels)), dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_dtypes_of_labels(backend, dtype):
    labels = LABELS["four"] + 5
    loss = functional.relational_triplet(S, labels=labels.to(dtype))
    assert torch.equal(loss, functional.relational_triplet(S, labels=labels))


@pytest.mark.parametrize("name", NOTHING)
def test_without_positives_or_negatives(backend, name):
    loss, grad, active = triplet_loss(S, labels=NOTHING[name])
    assert loss == 0
    assert active == 0
    assert not grad.any()


@pytest.mark.parametrize("positives", [1, 2, 11, N - 2, N - 1])
def test_nearest_neighbours(backend, positives):
    found = triplet_loss(S, T, positives=positives)
    agrees(found, triplets(S, nearest(T, positives)))
    if positives == N - 1:  # nobody is left
        assert found[0] == 0


def test_neighbours_of_a_teacher_far_from_the_origin(backend):
    """Where products of rows as they are would have no digits left."""
    teacher = 1000 + T
    agrees(triplet_loss(S, teacher), triplets(S, nearest(teacher, 5)))


def test_labels_decide(backend):
    labels = LABELS["four"]
    expected = functional.relational_triplet(S, labels=labels)
    for teacher in (T, T[:3] / 0):  # which is not looked at
        assert torch.equal(functional.relational_triplet(S, teacher, labels), expected)


@pytest.mark.parametrize(("rows", "positives"), [(0, 0), (1, 0), (2, 0), (3, 1), (6, 4), (7, 5), (20, 5)])
def test_default_positives(backend, rows, positives):
    found = triplet_loss(S[:rows], T[:rows])
    agrees(found, triplets(S[:rows], nearest(T[:rows], positives)))
    assert bool(found[0] > 0) == (positives > 0)


@pytest.mark.parametrize("margin", [1e-3, 0.3, 100])
def test_margins(backend, margin):
    labels = LABELS["uneven"]
    found = triplet_loss(S, labels=labels, margin=margin)
    agrees(found, triplets(S, similar(labels), margin))
    if margin == 100:
        assert found[2] == 1


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_nearly_equal_samples(backend, dtype):
    """Of a class, and of different ones: their differences are exact, where products of rows would have cancelled."""
    noise = torch.randn(18, 6, generator=torch.Generator().manual_seed(3))
    student = (30 * S[torch.arange(18) % 7] + 0.02 * noise).to(dtype)
    for labels in (torch.arange(18) % 7, LABELS["four"][:18]):
        agrees(triplet_loss(student, labels=labels, margin=60.0), triplets(student, similar(labels), 60.0), dtype)


@pytest.mark.parametrize("block", [1, 250])
@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", ["odd", "repeated_students", "loose_clusters"])
def test_strips(backend, monkeypatch, case, dtype, block):
    monkeypatch.setattr(triplet, "BLOCK", {"cpu": block, "cuda": block})
    check(backend, "relational_triplet", next(c for c in cases.CASES if c.name == case), dtype)


@pytest.mark.parametrize("backend", cpu_levels(), indirect=True)
@pytest.mark.parametrize("sizes", [(350, 350), (690, 5, 5), (70,) * 10], ids=str)
def test_many_positives(backend, sizes):
    generator = torch.Generator().manual_seed(4)
    student, labels = torch.randn(700, 8, generator=generator), classes(*sizes)
    truth = triplets(student, similar(labels))
    agrees(triplet_loss(student.double(), labels=labels), truth, torch.float64)
    # of so many triplets some are within a rounding of the hinge, and their gradient is there or not
    loss, grad, _ = triplet_loss(student, labels=labels)
    assert error(loss, truth[0]) <= PROMISED[torch.float32]
    assert error(grad, truth[1]) <= 1e-4


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("block", [1, 2**21])
def test_masked_rows_with_labels(backend, monkeypatch, block, name):
    """Neither similar nor different to any; their labels may be the last number there is."""
    monkeypatch.setattr(triplet, "BLOCK", {"cpu": block, "cuda": block})
    mask = torch.rand(N, generator=torch.Generator().manual_seed(2)) < 0.6
    weight = torch.rand(N, generator=torch.Generator().manual_seed(3))
    hidden = S.masked_fill(~mask[:, None], torch.nan)
    labels = LABELS[name]
    expected = triplet_loss(S[mask], labels=labels[mask], weight=weight[mask])
    found = triplet_loss(hidden, labels=labels, mask=mask, weight=weight.masked_fill(~mask, torch.nan))
    assert error(found[0], expected[0]) <= 1e-6
    assert error(found[1][mask], expected[1]) <= 1e-6
    assert not found[1][~mask].any()
    assert found[2] == expected[2]


def test_fewer_rows_that_count_than_positives(backend):
    """All of them are positives then, and there are no triplets."""
    loss, grad, active = triplet_loss(S, T, positives=10, mask=torch.arange(N) < 8)
    assert (loss, active) == (0, 0)
    assert not grad.any()


@pytest.mark.parametrize("positives", [1, 5])
def test_a_nan_among_the_teachers_neighbours(backend, monkeypatch, positives):
    monkeypatch.setattr("fastkd._check.arguments.values_known", lambda _: False)
    teacher = T.clone()
    teacher[3, 3] = torch.nan
    loss, grad = run(functional.relational_triplet, S, teacher, positives=positives)
    assert loss.isnan()
    assert grad.isnan().all() or backend == "torch"
    mask = torch.arange(N) != 3
    loss = functional.relational_triplet(S, teacher, mask=mask)
    assert error(loss, functional.relational_triplet(S[mask], T[mask])) <= 1e-6


def test_value_by_hand(backend):
    """Points 0, 1 and 3 of a line, the first two similar: 1 + 1 - 3 < 0 at 0, 1 + 1 - 2 = 0 at 1; margin 2."""
    student, labels = torch.tensor([[0.0], [1], [3]]), torch.tensor([4, 4, 0])
    loss, grad, active = triplet_loss(student, labels=labels, margin=2.5)
    assert loss.item() == pytest.approx((0.5 + 1.5) / 3)
    assert active == 1
    # d_01 counts twice, d_02 and d_12 once each, with the other sign
    assert grad.flatten().tolist() == pytest.approx([(-2 + 1) / 3, (2 + 1) / 3, -2 / 3])


def test_a_triplet_at_its_hinge_is_not_active(backend):
    """Samples at 0, 1 and 2: of the first two the margin of one is met exactly, that of the other is not."""
    student = torch.tensor([[0.0], [1.0], [2.0]])
    loss, grad, active = triplet_loss(student, labels=torch.tensor([0, 0, 1]), margin=1.0)
    assert loss.item() == pytest.approx(1 / 3)
    assert active == 0.5
    assert grad.flatten().tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3])


def test_similar_samples_come_nearer(backend):
    """The sign: a step along the gradient makes neighbours of the teacher the student's."""
    student, labels = S[:20].clone(), LABELS["four"][:20]

    def ratio(x):
        d = torch.cdist(x, x)
        return (d[similar(labels)].mean() / d[labels[:, None] != labels].mean()).item()

    before = ratio(student)
    for _ in range(4):
        student = student - 8 * run(functional.relational_triplet, student, None, labels=labels)[1]
    assert ratio(student) < 0.8 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plain_form(backend, dtype):
    """As anyone would write it, with a tensor of triplets."""
    labels = LABELS["uneven"]
    x = S.to(dtype).requires_grad_()
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    positive, negative = similar(labels), labels[:, None] != labels
    e = torch.relu(1 + d[:, :, None] - d[:, None, :]) * positive[:, :, None] * negative[:, None, :]
    loss = (e.sum((1, 2)) / negative.sum(1)).mean()
    found = triplet_loss(S.to(dtype), labels=labels)
    assert error(found[0], loss.detach()) <= 2 * PROMISED[dtype]
    assert error(found[1], torch.autograd.grad(loss, x)[0]) <= 2 * PROMISED[dtype]


@pytest.mark.parametrize("by_labels", [False, True])
def test_compiled(by_labels):
    options = {"labels": LABELS["four"]} if by_labels else {"teacher": T}
    compiled = torch.compile(
        lambda s: functional.relational_triplet(s, return_active=True, **options), fullgraph=True
    )  # fmt: skip
    student = S.clone().requires_grad_()
    loss, active = compiled(student)
    expected = triplet_loss(S, **options)
    assert torch.equal(loss, expected[0])
    assert active == expected[2]
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected[1])


def test_module():
    labels = LABELS["four"]
    module = fastkd.RelationalTripletLoss(margin=0.4, return_active=True)
    loss, active = module(S, labels=labels)
    assert (loss, active) == functional.relational_triplet(S, labels=labels, margin=0.4, return_active=True)
    assert "margin=0.4, positives=None, return_active=True" in repr(module)
    loss = fastkd.RelationalTripletLoss(positives=2)(S, T)
    assert torch.equal(loss, functional.relational_triplet(S, T, positives=2))


BAD = {
    "nobody": ((S,), {}, ValueError, "teacher, labels: one of the two wanted, .*; got neither"),
    "vector": ((S[0], T), {}, ValueError, r"student: embeddings of shape \[N, D\] wanted"),
    "rows": ((S, T[:3]), {}, ValueError, "teacher: the student's 24 rows wanted, got 3"),
    "dtype": ((S, T.long()), {}, TypeError, "teacher: float16, .* embeddings wanted"),
    "nan": ((S / 0,), {"labels": LABELS["four"]}, ValueError, "student: finite embeddings wanted"),
    "labels_length": ((S,), {"labels": torch.arange(23)}, ValueError, r"labels: shape \[24\] wanted.* got \[23\]"),
    "labels_shape": ((S,), {"labels": torch.zeros(N, 1).long()}, ValueError, r"labels: shape \[24\] wanted"),
    "labels_dtype": ((S,), {"labels": torch.zeros(N)}, TypeError, "labels: an integer dtype wanted.* torch.float32"),
    "labels_bool": ((S,), {"labels": torch.zeros(N) > 0}, TypeError, "labels: an integer dtype wanted"),
    "labels_list": ((S,), {"labels": [0] * N}, TypeError, "labels: a torch.Tensor wanted, got list"),
    "too_many": ((S, T), {"positives": N}, ValueError, "positives: at most the 23 other rows wanted, got 24"),
    "none": ((S, T), {"positives": 0}, ValueError, "positives: at least 1 wanted, got 0"),
    "half_a_neighbour": ((S, T), {"positives": 1.5}, TypeError, "positives: a whole number wanted, got float"),
    "both": ((S,), {"labels": LABELS["four"], "positives": 3}, ValueError, "positives: .* labels tell who is similar"),
    "margin": ((S, T), {"margin": 0.0}, ValueError, "margin: a positive finite number wanted, got 0"),
    "margin_nan": ((S, T), {"margin": math.nan}, ValueError, "margin: a positive finite number wanted"),
    "active": ((S, T), {"return_active": 1}, TypeError, "return_active: True or False wanted"),
    "mask": ((S, T), {"mask": torch.ones(23) > 0}, ValueError, r"mask: a shape that broadcasts to \[24\] wanted"),
    "weight": ((S, T), {"weight": torch.ones(N).int()}, TypeError, "weight: a floating dtype wanted"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    given, options, kind, message = BAD[name]
    with pytest.raises(kind, match=f"^{message}"):
        functional.relational_triplet(*given, **options)
    own = {key: options[key] for key in ("margin", "positives", "return_active") if key in options}
    with pytest.raises(kind, match=f"^{message}"):
        fastkd.RelationalTripletLoss(**own)(*given, **{key: options[key] for key in options if key not in own})


def test_the_strips_op_checks_its_own_contract():
    N, D = 9, 4
    index = torch.arange(N)
    right = [torch.randn(3, N), torch.randn(N, D), torch.rand(N), index, index, index + 1, index >= 0, torch.tensor(N),
             torch.rand(N), 1.0, 2, torch.zeros(N, D)]  # fmt: skip
    torch.ops.fastkd.triplet_strip_(*right)
    for at, wrong in ((0, torch.randn(3, N).half()), (1, torch.randn(N - 1, D)), (2, torch.rand(N + 1)), (3, index.int()),
                      (3, index + 1), (4, index - 5), (5, index + 9), (6, index), (7, torch.tensor(1.0)),
                      (8, torch.rand(N).double()), (9, 0.0), (10, 7), (10, -1), (11, torch.zeros(D, N).T)):  # fmt: skip
        with pytest.raises(RuntimeError, match="wanted"):
            torch.ops.fastkd.triplet_strip_(*right[:at], wrong, *right[at + 1 :])
