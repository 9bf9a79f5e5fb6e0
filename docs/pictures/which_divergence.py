"""Draws the pictures of docs/which-divergence.md and writes its tables: what a student that is too small for its
teacher learns from each divergence.

The teacher's distribution over 200 classes has two peaks, and the student's can only have one: its logits are those
of a normal distribution, of which the mean and the width are learnt. Each divergence finds its own best ones.

    python docs/pictures/which_divergence.py
"""

import functools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import functional

sys.path.insert(0, str(Path(__file__).parent))
import svg

DOCS = Path(__file__).parents[1]
PAGE, PICTURES = DOCS / "which-divergence.md", DOCS / "pictures"
CLASSES = torch.arange(200, dtype=torch.float64)
HEAVY, LIGHT, HEAVY_SHARE = (60.0, 14.0), (140.0, 7.0), 0.6  # mean and width of each peak; the lighter one is taller
NEXT_TO_NONE = 1e-3  # a probability below it; of 200 equally likely classes each has 5e-3
PLACES = (100.0, 110.0, 120.0, 130.0, 140.0)  # of the lighter peak, in the table of distances
HALF = 0.5  # of two classes
SETTINGS = ((1e-6, HALF), (HALF, 1e-6), (HALF, 1e-12), (0.0, HALF), (HALF, 0.0))  # student, teacher: one class of two


class Case(NamedTuple):
    """A divergence and, where it has one, its parameter."""

    function: str
    parameter: str = ""
    value: float = 0.0

    def __str__(self) -> str:
        return f"{self.function} {self.parameter}={self.value:g}" if self.parameter else self.function

    def losses(self, student: Tensor, teacher: Tensor) -> Tensor:
        """One for each row of logits [*, V]."""
        options = {self.parameter: self.value} if self.parameter else {}
        return getattr(functional, self.function)(student, teacher.expand_as(student), reduction="none", **options)


CASES = [
    Case("kl_div"),
    Case("skew_kl_div", "alpha", 0.1),
    Case("symmetric_kl_div", "student_weight", 0.5),
    Case("js_div", "beta", 0.1),
    Case("js_div", "beta", 0.5),
    Case("js_div", "beta", 0.9),
    Case("total_variation"),
    Case("skew_reverse_kl_div", "alpha", 0.1),
    Case("reverse_kl_div"),
]
SAME_AS_KL = Case("soft_cross_entropy")  # in the tables, where it shows that it is


def one_peak(mean: Tensor, width: Tensor) -> Tensor:
    """Logits [*, V] of normal distributions with means and widths [*]."""
    return -0.5 * ((CLASSES - mean[..., None]) / width[..., None]) ** 2


def two_peaks(light_mean: float = LIGHT[0]) -> Tensor:
    """The teacher's logits [V], which are the logarithms of its probabilities."""
    means, widths = torch.tensor([HEAVY, (light_mean, LIGHT[1])], dtype=torch.float64).T
    shares = torch.tensor([HEAVY_SHARE, 1 - HEAVY_SHARE], dtype=torch.float64)
    peaks = torch.log_softmax(one_peak(means, widths), -1)
    return torch.logsumexp(shares.log()[:, None] + peaks, 0)


@functools.cache
def best(case: Case, light_mean: float = LIGHT[0]) -> Tensor:
    """The distribution [V] of the student with the least loss. Its mean and width are the best of a coarse grid over
    all of them, then of finer and finer grids around the best so far."""
    teacher = two_peaks(light_mean)
    means = torch.linspace(0, 200, 81, dtype=torch.float64)
    logs = torch.linspace(1, 5, 33, dtype=torch.float64)  # of widths from 3 to 150 classes
    around = torch.linspace(-2, 2, 9, dtype=torch.float64)
    steps = means[1] - means[0], logs[1] - logs[0]
    for _ in range(20):
        grid = torch.cartesian_prod(means, logs)
        mean, log = grid[case.losses(one_peak(grid[:, 0], grid[:, 1].exp()), teacher).argmin()]
        means, logs = mean + around * steps[0], log + around * steps[1]
        steps = steps[0] / 2, steps[1] / 2
    return one_peak(mean, log.exp()).softmax(-1)


def descent(case: Case) -> Tensor:
    """The distribution [V] at which gradient descent ends, from a student that is the lighter peak."""
    teacher = two_peaks()
    mean = torch.tensor(LIGHT[0] / 10, dtype=torch.float64, requires_grad=True)  # of the size of the other parameter
    log = torch.tensor(math.log(LIGHT[1]), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log], lr=0.2, betas=(0.9, 0.9))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    for _ in range(450):
        optimizer.zero_grad()
        case.losses(one_peak(10 * mean, log.exp()), teacher).backward()
        optimizer.step()
        schedule.step()
    return one_peak(10 * mean.detach(), log.detach().exp()).softmax(-1)


def covered(student: Tensor, teacher: Tensor) -> float:
    """How much of the teacher's probability [V] is that of classes to which the student gives more than next to none;
    with student and teacher exchanged, how much of the student's is not astray."""
    return teacher[student >= NEXT_TO_NONE].sum().item()


def mean_and_width(p: Tensor) -> tuple[float, float]:
    """Of a distribution [V]."""
    mean = (p * CLASSES).sum()
    return mean.item(), ((p * (CLASSES - mean) ** 2).sum()).sqrt().item()


def fits_table() -> list[list[str]]:
    q = two_peaks().exp()
    mean, width = mean_and_width(q)
    rows = [["fit by", "mean", "width", "of the teacher covered", "of the student astray", "from the lighter peak"]]
    rows += [["the teacher itself", f"{mean:.1f}", f"{width:.1f}", "", "", ""]]
    for case in (*CASES, SAME_AS_KL):
        p = best(case)
        mean, width = mean_and_width(p)
        end, _ = mean_and_width(descent(case))
        shares = [f"{covered(p, q):.0%}", f"{1 - covered(q, p):.0%}"]
        rows += [[f"`{case}`", f"{mean:.1f}", f"{width:.1f}", *shares, f"{end:.0f}"]]
    return rows


def distances_table() -> list[list[str]]:
    """How much of the teacher the best fit covers, as its peaks move apart."""
    rows = [["lighter peak at class", *(f"{place:g}" for place in PLACES)]]
    for case in CASES:
        rows += [[f"`{case}`", *(f"{covered(best(case, place), two_peaks(place).exp()):.0%}" for place in PLACES)]]
    return rows


def of_two(first: Tensor) -> Tensor:
    """Logits [*, 2] of two classes, of which the first has these probabilities [*]."""
    return torch.stack([first, 1 - first], -1).log()


def loss_and_push(case: Case, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of rows of two classes, whose first has these probabilities [*], and how hard gradient descent pushes
    its logit up: the gradient with its sign turned."""
    logits = of_two(student).requires_grad_()
    losses = case.losses(logits, of_two(teacher))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return losses.detach(), -gradient[..., 0]


def gradients_table() -> list[list[str]]:
    rows = [
        ["the class gets", *(f"student {p:g}, teacher {q:g}" for p, q in SETTINGS)],
        ["shown", "push", "push", "push", "loss; push", "loss; push"],
    ]
    student, teacher = torch.tensor(SETTINGS, dtype=torch.float64).T
    for case in (*CASES, SAME_AS_KL):
        losses, pushes = loss_and_push(case, student, teacher)
        shown = [f"{push:+.2f}" if abs(push) >= 0.005 else "0.00" for push in pushes.tolist()]
        shown[3:] = [f"{loss:.2f}; {push}" for loss, push in zip(losses[3:].tolist(), shown[3:], strict=True)]
        rows += [[f"`{case}`", *shown]]
    return rows


TABLES = {"fits": fits_table, "distances": distances_table, "gradients": gradients_table}


def draw_fits() -> str:
    """Nine panels: the teacher as an area, the best student of each divergence as a line."""
    teacher = two_peaks()
    picture = svg.Picture(
        760, 590, "One teacher with two peaks, and the one-peaked student that each divergence fits to it"
    )
    top = 0.03
    for number, case in enumerate(CASES):
        row, column = divmod(number, 3)
        panel = svg.Panel(picture, (62 + 236 * column, 62 + 176 * row, 208, 122), (0, 198), (0, top))
        panel.frame(f"{case.function} {case.value:g}" if case.parameter else case.function)
        panel.x_ticks({0: "0", 50: "50", 100: "100", 150: "150"}, "class" if row == 2 else "")
        heights = {0: "0", 0.01: "0.01", 0.02: "0.02", top: "0.03"}
        panel.y_ticks(heights if column == 0 else dict.fromkeys(heights, ""), "probability" if column == 0 else "")
        panel.area(CLASSES[::2].tolist(), teacher.exp()[::2].tolist())
        panel.line(CLASSES[::2].tolist(), best(case)[::2].tolist(), 2)
    picture.key([("area", "teacher"), ("c2", "best student with one peak")], 62, 24)
    return picture.text()


def draw_pushes() -> str:
    """Two panels: how hard a logit is pushed, over the student's probability and over the teacher's."""
    picture = svg.Picture(760, 400, "How hard each divergence pushes a class up or down")
    exponents = torch.linspace(-6, math.log10(HALF), 60, dtype=torch.float64)
    values = 10**exponents
    half = torch.full_like(values, HALF)
    ticks = {-6: "1e-6", -4: "1e-4", -2: "0.01", math.log10(HALF): "0.5"}
    sides = [
        ("the teacher gives a class one half", "student's probability of it", "push up", values, half, 1, 0.6),
        ("the student gives a class one half", "teacher's probability of it", "push down", half, values, -1, 3.6),
    ]
    shown = [case for case in CASES if case.parameter != "beta" or case.value == 0.5]
    for side, (title, x_label, y_label, student, teacher, sign, top) in enumerate(sides):
        panel = svg.Panel(picture, (62 + 384 * side, 92, 296, 250), (-6, math.log10(HALF)), (0, top))
        panel.frame(title)
        panel.x_ticks(ticks, x_label)
        panel.y_ticks({i * top / 6: f"{i * top / 6:.1f}" for i in range(7)}, y_label)
        for number, case in enumerate(shown, 1):
            panel.line(exponents.tolist(), (sign * loss_and_push(case, student, teacher)[1]).tolist(), number)
    names = [(f"c{number}", case.function) for number, case in enumerate(shown, 1)]
    picture.key(names[:4], 62, 24)
    picture.key(names[4:], 62, 46)
    return picture.text()


DRAWINGS = {"which-divergence-fits.svg": draw_fits, "which-divergence-pushes.svg": draw_pushes}


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *body))


def with_table(page: str, name: str, rows: list[list[str]]) -> str:
    """The page with this table between its two comments."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{markdown(rows)}\n{end}{after}"


def main() -> None:
    for name, draw in DRAWINGS.items():
        (PICTURES / name).write_text(draw())
    page = PAGE.read_text()
    for name, table in TABLES.items():
        page = with_table(page, name, table())
    PAGE.write_text(page)
    print(f"{PAGE.name}: {len(TABLES)} tables and {len(DRAWINGS)} pictures")


if __name__ == "__main__":
    main()
