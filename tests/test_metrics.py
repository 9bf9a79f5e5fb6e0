"""What a student has learned, in numbers: against published formulas and plain loops, on made and on real data."""

import doctest
import itertools

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.datasets import load_digits

from bench.measure import CLOCKS, Provider
from fastkd import functional, metrics
from fastkd.metrics import _base, predictions, similarity

TOLERANCE = 1e-10


def digits():
    """Pixels of handwritten digits, as embeddings of other widths."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 20, generator=generator, dtype=torch.float64)
    return pixels, (pixels @ weight).relu()


def made(N, widths, mean=0.0, common=0.5):
    generator = torch.Generator().manual_seed(N)
    both = torch.randn(N, max(widths), generator=generator, dtype=torch.float64)
    sides = [torch.randn(N, width, generator=generator, dtype=torch.float64) for width in widths]
    return [common * both[:, :width] + side + mean for width, side in zip(widths, sides, strict=True)]


EMBEDDINGS = {
    "digits": digits,
    "wider than long": lambda: made(30, (100, 70)),
    "longer than wide": lambda: made(500, (20, 33)),
    "far from 0": lambda: made(300, (8, 9), mean=100.0),
    "four rows": lambda: made(4, (3, 5)),
}


def u_centered(K):
    """Szekely and Rizzo 2014: the unbiased estimate is the mean of the products of such matrices."""
    n = len(K)
    K = K.clone().fill_diagonal_(0)
    means = K.sum(1) / (n - 2)
    return (K - means[:, None] - means[None, :] + K.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0)


def of_features(x, y):
    """The debiased estimate as it stands in the authors' notebook (feature_space_linear_cka), in float64."""
    x, y = (z - z.mean(0) for z in (x, y))

    def debiased(xty, rows_x, rows_y, squares_x, squares_y, n):
        return xty - n / (n - 2) * (rows_x * rows_y).sum() + squares_x * squares_y / ((n - 1) * (n - 2))

    n, rows = len(x), [z.square().sum(1) for z in (x, y)]
    squares = [r.sum() for r in rows]
    both = debiased((x.T @ y).square().sum(), *rows, *squares, n)
    alone = [debiased((z.T @ z).square().sum(), r, r, s, s, n) for z, r, s in zip((x, y), rows, squares, strict=True)]
    return both / (alone[0].sqrt() * alone[1].sqrt())


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_cka_is_the_published_one(name):
    x, y = EMBEDDINGS[name]()
    K, L = (u_centered(z @ z.T) for z in (x, y))
    right = (K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt()
    found = metrics.cka(x, y)
    assert found.dtype is torch.float64
    assert abs(found - right) <= TOLERANCE
    assert abs(found - of_features(x, y)) <= TOLERANCE
    in_single = metrics.cka(x.float(), y.float())
    assert abs(in_single - right) <= 1e-5


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_cka_of_batches_is_that_of_all(name):
    x, y = EMBEDDINGS[name]()
    measure = metrics.CKA()
    for _ in range(2):
        for first in range(0, len(x), 7):
            measure.update(x[first : first + 7], y[first : first + 7])
        assert abs(measure.compute() - metrics.cka(x, y)) <= TOLERANCE
        measure.reset()
    with pytest.raises(RuntimeError, match=r"CKA\.compute: no batch has been given yet; call update first"):
        measure.compute()


def test_cka_is_1_of_rotations_and_0_of_what_has_nothing_in_common():
    x, y = made(200, (10, 10), common=0.0)
    rotation = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    assert abs(metrics.cka(x, 3 * x @ rotation + 5) - 1) <= TOLERANCE
    assert abs(metrics.cka(x, y)) < 0.1
    wide = made(20, (1000, 1000), common=0.0)
    assert abs(metrics.cka(*wide)) < 0.2
    assert metrics.cka(x, torch.ones(200, 3)).isnan()


def test_cka_and_neighbours_hold_no_matrix_of_pairs():
    """N x N would be 1 GiB."""
    x, y = torch.randn(16384, 32), torch.randn(16384, 64)
    for measure in (metrics.cka, metrics.neighbours):
        provider = Provider("", lambda: (x, y), measure)
        provider.call(*provider.prepare())
        used = CLOCKS["cpu"].peak_extra_bytes(provider)
        assert used is None or used <= 128 << 20


@pytest.mark.parametrize("k", [1, 3, 10])
def test_neighbours_are_those_of_all_distances(k):
    for x, y in (digits(), made(300, (5, 8))):
        nearest = [torch.cdist(z, z).fill_diagonal_(torch.inf).topk(k, largest=False).indices for z in (x, y)]
        right = np.mean([len(set(a) & set(b)) / k for a, b in zip(*(z.tolist() for z in nearest), strict=True)])
        assert abs(metrics.neighbours(x, y, k) - right) <= 2e-3  # samples at the same distance are the nearest or not
        measure = metrics.Neighbours(k)
        for first in range(0, len(x), 101):
            measure.update(x[first : first + 101], y[first : first + 101])
        assert measure.compute() == metrics.neighbours(x, y, k)


def test_neighbours_of_half_precision():
    x, y = made(200, (6, 6))
    single = metrics.neighbours(x.bfloat16().float(), y.bfloat16().float())
    assert metrics.neighbours(x.bfloat16(), y.bfloat16()) == single
    assert metrics.neighbours(x, x) == 1


@pytest.mark.parametrize("k", [1, 2, 5])
def test_agreement_is_that_of_sets(k):
    student, teacher = torch.randn(2, 40, 7), torch.randn(2, 40, 7)
    mask = torch.rand(40) < 0.6
    best = [x.topk(k).indices.view(-1, k).tolist() for x in (student, teacher)]
    agrees = torch.tensor([set(a) == set(b) for a, b in zip(*best, strict=True)]).view(2, 40)
    assert metrics.agreement(student, teacher, k) == agrees.double().mean()
    assert metrics.agreement(student, teacher, k, mask=mask) == agrees[:, mask].double().mean()
    measure = metrics.Agreement(k)
    for i in range(2):
        measure.update(student[i], teacher[i], mask)
    assert measure.compute() == agrees[:, mask].double().mean()
    assert metrics.agreement(student, teacher, mask=torch.zeros(40, dtype=torch.bool)).isnan()


def test_divergence_by_class(backend):
    student, teacher, target = torch.randn(3, 50, 9), torch.randn(3, 50, 9), torch.randint(8, (3, 50))
    target[0, :5] = -100
    found = metrics.divergence_by_class(student, teacher, target)
    rows = functional.kl_div(student.double(), teacher.double(), reduction="none")
    q = teacher.double().softmax(-1).gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    p = student.double().softmax(-1).gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    of_target = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    for c in range(9):
        here = target == c
        assert found.count[c] == here.sum()
        if c == 8:
            assert found.kl[c].isnan()
            continue
        for ours, right in ((found.kl, rows), (found.target, of_target), (found.non_target, rows - of_target)):
            assert abs(ours[c] - right[here].mean()) <= 1e-5
    measure = metrics.DivergenceByClass()
    for x in zip(student, teacher, target, strict=True):
        measure.update(*x)
    for ours, right in zip(measure.compute(), found, strict=True):
        torch.testing.assert_close(ours, right, equal_nan=True)


def published_ece(logits, target, bins):
    """As in the authors' code (temperature_scaling), with its bins, in float64."""
    confidences, predictions = logits.double().softmax(1).max(1)
    edges, ece = torch.linspace(0, 1, bins + 1, dtype=torch.float64), 0.0
    for lower, upper in itertools.pairwise(edges):
        in_bin = confidences.gt(lower) & confidences.le(upper)
        if in_bin.any():
            accuracy = (predictions == target)[in_bin].double().mean()
            ece += (confidences[in_bin].mean() - accuracy).abs() * in_bin.double().mean()
    return ece


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_is_the_published_one(bins):
    logits, target = 3 * torch.randn(500, 4, dtype=torch.float64), torch.randint(4, (500,))
    logits[0], logits[1] = 0.0, torch.tensor([1000.0, 0, 0, 0])  # at the ends of bins
    found = metrics.calibration(logits, target, bins)
    assert abs(found.ece - published_ece(logits, target, bins)) <= TOLERANCE
    assert found.count.sum() == 500
    assert found.accuracy.isnan().equal(found.count == 0)
    target[:100] = -100
    found = metrics.calibration(logits.view(5, 100, 4).float(), target.view(5, 100), bins)
    assert abs(found.ece - published_ece(logits[100:], target[100:], bins)) <= 1e-6
    measure = metrics.Calibration(bins)
    for rows in range(0, 500, 37):
        measure.update(logits[rows : rows + 37], target[rows : rows + 37])
    assert abs(measure.compute().ece - published_ece(logits[100:], target[100:], bins)) <= TOLERANCE
    assert metrics.calibration(logits[:100], target[:100]).ece.isnan()


def test_half_precision_logits():
    logits, target = torch.randn(60, 5).bfloat16(), torch.randint(5, (60,))
    assert metrics.calibration(logits, target).ece == metrics.calibration(logits.float(), target).ece
    assert metrics.agreement(logits, logits) == 1


def test_batches_of_other_widths_change_nothing():
    x, y, target = torch.randn(20, 4), torch.randn(20, 6), torch.arange(20) % 4
    for measure, batch, other in (
        (metrics.CKA(), (x, y), (x[:, :3], y)),
        (metrics.Neighbours(3), (x, y), (x[:, :3], y)),
        (metrics.DivergenceByClass(), (x, x + 1, target), (y, y, target)),
    ):
        measure.update(*batch)
        before = measure.compute()
        with pytest.raises(ValueError, match="student: the width of the batches before, 4, wanted, got"):
            measure.update(*other)
        torch.testing.assert_close(measure.compute(), before, rtol=0, atol=0)
        measure.reset()
        measure.update(*other)


def test_autocast_rounds_nothing():
    x, y = torch.randn(50, 4), torch.randn(50, 6)
    right = metrics.cka(x, y), metrics.neighbours(x, y, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (metrics.cka(x, y), metrics.neighbours(x, y, 3)) == right
        measure = metrics.CKA()
        measure.update(x, y)
        assert abs(measure.compute() - right[0]) <= 1e-6


def test_a_collection_of_torchmetrics():
    """What each of them takes is found by name."""
    kinds = {
        "cka": metrics.CKA(), "neighbours": metrics.Neighbours(3), "agreement": metrics.Agreement(),
        "calibration": metrics.Calibration(), "divergence": metrics.DivergenceByClass(),
    }  # fmt: skip
    collection = torchmetrics.MetricCollection({name: metrics.for_torchmetrics(x) for name, x in kinds.items()})
    student, teacher, target = torch.randn(60, 6), torch.randn(60, 6), torch.randint(6, (60,))
    for _ in range(2):
        for part in torch.arange(60).split(25):
            collection.update(student=student[part], teacher=teacher[part], target=target[part], logits=student[part])
        found = collection.compute()
        assert abs(found["cka"] - metrics.cka(student, teacher)) <= 1e-8
        assert found["neighbours"] == metrics.neighbours(student, teacher, 3)
        assert found["agreement"] == metrics.agreement(student, teacher)
        torch.testing.assert_close(found["calibration"].ece, metrics.calibration(student, target).ece)
        right = metrics.divergence_by_class(student, teacher, target)
        torch.testing.assert_close(found["divergence"].kl, right.kl, equal_nan=True)
        collection.reset()
    alone = metrics.for_torchmetrics(metrics.Agreement(k=2))
    assert alone(student, teacher) == metrics.agreement(student, teacher, 2)
    with pytest.raises(TypeError, match=r"metric: one of fastkd\.metrics wanted, got int"):
        metrics.for_torchmetrics(1)


@pytest.mark.parametrize("module", [_base, predictions, similarity])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


X = torch.randn(6, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: metrics.cka(X[:3], X[:3]), ValueError, "student: at least 4 rows wanted, got 3"),
        (lambda: metrics.cka(X, X[:5]), ValueError, "teacher: the student's 6 rows wanted, got 5"),
        (lambda: metrics.cka(X[0], X), ValueError, r"student: embeddings \[N, D\] wanted, got shape \[3\]"),
        (lambda: metrics.cka(X.long(), X), TypeError, "student: float16, .* embeddings wanted"),
        (lambda: metrics.cka([1.0], X), TypeError, "student: a torch.Tensor wanted, got list"),
        (lambda: metrics.neighbours(X, X, 6), ValueError, "k: fewer neighbours than the 6 samples wanted, got 6"),
        (lambda: metrics.neighbours(X, X, 0), ValueError, "k: at least 1 wanted, got 0"),
        (lambda: metrics.neighbours(X, X / 0, 2), ValueError, "teacher: finite embeddings wanted"),
        (lambda: metrics.Neighbours(2.0), TypeError, "k: a whole number wanted, got float"),
        (lambda: metrics.agreement(X, X[:, :2]), ValueError, r"teacher: the student's shape \[6, 3\] wanted"),
        (lambda: metrics.agreement(X, X, 4), ValueError, "k: no more classes than the 3 wanted, got 4"),
        (lambda: metrics.agreement(X, X, mask=torch.ones(6)), TypeError, "mask: torch.bool wanted"),
        (lambda: metrics.divergence_by_class(X, X, torch.arange(6)), ValueError, "target: classes from 0 to 2 wanted"),
        (lambda: metrics.divergence_by_class(X, X, X[:, 0]), TypeError, "target: whole numbers wanted"),
        (lambda: metrics.calibration(X, torch.arange(6)), ValueError, "target: classes from 0 to 2 wanted"),
        (lambda: metrics.calibration(X, torch.zeros(5).long()), ValueError, r"target: shape \[6\] wanted"),
        (lambda: metrics.calibration(X.long(), torch.zeros(6).long()), TypeError, "logits: a floating dtype wanted"),
        (lambda: metrics.calibration(X, torch.zeros(6).long(), 0), ValueError, "bins: at least 1 wanted, got 0"),
        (lambda: metrics.Calibration().compute(), RuntimeError, "no batch has been given yet"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
