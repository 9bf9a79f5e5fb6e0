"""docs/which-divergence.md: its tables and pictures are what its script computes, and what it says of them holds."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from fastkd import _divergences, functional

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
COVERING = {"kl_div", "skew_kl_div alpha=0.1", "symmetric_kl_div student_weight=0.5", "js_div beta=0.1"}
PULLING = {"kl_div", "symmetric_kl_div student_weight=0.5", "soft_cross_entropy"}
# The page is about distributions, and what of them is a sum over classes.
SHOWN = {name for name, entry in _divergences.REGISTRY.items() if entry.given == "Probabilities" and not entry.two_sums}
UNBOUNDED = {"reverse_kl_div", "symmetric_kl_div student_weight=0.5"}


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(PICTURES))
    yield importlib.import_module("which_divergence")
    sys.path.remove(str(PICTURES))


def same_words(shown, computed):
    """Whether two texts differ in nothing but their numbers."""
    return NUMBER.sub("#", shown) == NUMBER.sub("#", computed)


def off_by(shown, computed):
    """The largest difference of numbers that stand at the same place, in units of the last digit that is shown."""
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(computed), strict=True)
    return max(abs(float(a) - float(b)) * 10 ** len(a.partition(".")[2]) for a, b in pairs)


@pytest.mark.parametrize("name", ["fits", "distances", "gradients"])
def test_tables_are_what_the_script_computes(name, script):
    """To a unit of the last digit: processors round otherwise."""
    page = script.PAGE.read_text()
    computed = script.with_table(page, name, script.TABLES[name]())
    assert same_words(page, computed)
    assert off_by(page, computed) < 1.01


@pytest.mark.parametrize("name", ["which-divergence-fits.svg", "which-divergence-pushes.svg"])
def test_pictures_are_what_the_script_draws(name, script):
    kept, drawn = (PICTURES / name).read_text(), script.DRAWINGS[name]()
    assert same_words(kept, drawn)
    assert off_by(kept, drawn) < 5.01  # half a point of the picture
    assert f"](pictures/{name})" in script.PAGE.read_text()


def test_what_is_written_is_what_is_kept(script, tmp_path, monkeypatch):
    page = tmp_path / script.PAGE.name
    page.write_text(script.PAGE.read_text())
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "PICTURES", tmp_path)
    monkeypatch.setattr(script, "TABLES", {"gradients": script.gradients_table})
    monkeypatch.setattr(script, "DRAWINGS", {"which-divergence-pushes.svg": script.draw_pushes})
    script.main()
    assert same_words(page.read_text(), (PICTURES.parent / page.name).read_text())
    assert (tmp_path / "which-divergence-pushes.svg").read_text().startswith("<svg")


def test_every_divergence_is_there(script):
    shown = {case.function for case in (*script.CASES, script.SAME_AS_KL)}
    assert shown == SHOWN
    headings = " ".join(re.findall("^### (.*)$", script.PAGE.read_text(), re.MULTILINE))
    assert set(re.findall(r"\w+_\w+", headings)) == shown


def test_those_that_are_not_shown_are_named(script):
    _, _, said = script.PAGE.read_text().partition("## Which are not here")
    others = {"kd_loss", "dist_loss", *_divergences.DERIVED, *_divergences.TARGET_LOSSES}
    assert set(re.findall(r"`(\w+_\w+)`", said.partition("\n## ")[0])) >= set(_divergences.REGISTRY) - SHOWN | others


def test_no_other_student_is_better(script):
    """Than the one that the search finds: none of many, nor those close to it."""
    teacher = script.two_peaks()
    for case in script.CASES:
        best = script.best(case)
        mean, width = script.mean_and_width(best)
        widths = torch.linspace(5, 120, 24, dtype=torch.float64)
        others = torch.cartesian_prod(torch.linspace(0, 199, 40, dtype=torch.float64), widths)
        near = torch.tensor([[mean, width]]) * (1 + 0.02 * torch.randn(200, 2, dtype=torch.float64))
        others = torch.cat([others, near])
        losses = case.losses(script.one_peak(others[:, 0], others[:, 1]), teacher)
        assert case.losses(best.log()[None], teacher).item() <= losses.min().item() + 1e-12, case


def test_which_cover_both_peaks_and_which_copy_the_heavier(script):
    teacher = script.two_peaks().exp()
    for case in script.CASES:
        best = script.best(case)
        covered = script.covered(best, teacher)
        if str(case) in COVERING:
            assert covered > 0.98, case
        else:
            mean, _ = script.mean_and_width(best)
            assert covered < 0.62, case
            assert abs(mean - script.HEAVY[0]) < 6, case


def test_kl_div_has_the_teachers_mean_and_width(script):
    best, teacher = script.best(script.CASES[0]), script.two_peaks().exp()
    assert script.mean_and_width(best) == pytest.approx(script.mean_and_width(teacher), abs=0.01)


def test_which_come_away_from_the_lighter_peak(script):
    for case in (*script.CASES, script.SAME_AS_KL):
        end, _ = script.mean_and_width(script.descent(case))
        best, _ = script.mean_and_width(script.best(case))
        if str(case) in PULLING:
            assert end == pytest.approx(best, abs=0.1), case
        else:
            assert abs(end - script.LIGHT[0]) < 6, case


def test_what_the_page_says_of_gradients(script):
    half, tiny = torch.tensor(0.5, dtype=torch.float64), torch.tensor([1e-6, 1e-12, 1e-24], dtype=torch.float64)
    halves, never = half.expand(3), torch.zeros(1, dtype=torch.float64)
    for case in (*script.CASES, script.SAME_AS_KL):
        _, up = script.loss_and_push(case, tiny, halves)
        _, down = script.loss_and_push(case, halves, tiny)
        assert (up > 0.2).all() if str(case) in PULLING else (up < 100 * tiny).all(), case
        doubles = down[2] / down[1] > 1.7
        assert doubles if str(case) in UNBOUNDED else down[2] == pytest.approx(down[1], abs=1e-5), case
        missed, _ = script.loss_and_push(case, never, half[None])
        excess, push = script.loss_and_push(case, half[None], never)
        assert missed.isinf().item() == (str(case) in PULLING), case
        assert excess.isinf().item() == (str(case) in UNBOUNDED), case
        assert push.item() == 0 if str(case) in UNBOUNDED else push.item() < 0, case


def formulas(p, q):
    """The gradients as the page writes them, [V] each, by call."""
    w, alpha, beta = 0.3, 0.2, 0.4
    kl, reverse = p - q, p * ((p / q).log() - (p * (p / q).log()).sum())
    m = alpha * q + (1 - alpha) * p
    skew = (1 - alpha) * p * ((p * q / m).sum() - q / m)
    m = alpha * p + (1 - alpha) * q
    s = (p / m).log() - alpha * p / m
    skew_reverse = p * (s - (p * s).sum())
    m = beta * q + (1 - beta) * p
    js = (1 - beta) * p * ((p / m).log() - (p * (p / m).log()).sum())
    s = (p - q).sign()
    yield "kl_div", {}, kl
    yield "soft_cross_entropy", {}, kl
    yield "reverse_kl_div", {}, reverse
    yield "symmetric_kl_div", {"student_weight": w}, (1 - w) * kl + w * reverse
    yield "skew_kl_div", {"alpha": alpha}, skew
    yield "skew_reverse_kl_div", {"alpha": alpha}, skew_reverse
    yield "js_div", {"beta": beta}, js
    yield "total_variation", {}, 0.5 * p * (s - (p * s).sum())


def test_gradients_have_the_formulas_of_the_page():
    student = torch.randn(1, 20, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 20, dtype=torch.float64)
    found = set()
    for name, options, wanted in formulas(student.detach().softmax(-1)[0], teacher.softmax(-1)[0]):
        loss = getattr(functional, name)(student, teacher, **options)
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient[0], wanted, rtol=1e-10, atol=1e-12, msg=name)
        found.add(name)
    assert found == SHOWN
