"""The inputs that the losses of the rows schedule are tested on, each with the reason why."""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from fastkd import functional

# Every logit loss; what follows a name is its parameter.
LOSSES = {
    "kl_div": functional.kl_div,
    "soft_cross_entropy": functional.soft_cross_entropy,
    "reverse_kl_div": functional.reverse_kl_div,
    "js_div": functional.js_div,
    "js_div-0.1": functools.partial(functional.js_div, beta=0.1),
    "symmetric_kl_div": functional.symmetric_kl_div,
    "skew_kl_div": functional.skew_kl_div,
    "skew_reverse_kl_div": functional.skew_reverse_kl_div,
    "total_variation": functional.total_variation,
    "negative_log_acceptance": functional.negative_log_acceptance,
    "alpha_beta_div": functional.alpha_beta_div,
    "adaptive_kl_div": functional.adaptive_kl_div,
}

# One of each kind, as the kernels see divergences: one that asks for the teacher's entropy, one whose slopes do not add
# up to 0, one with a parameter. Every case meets them on every backend; the others meet cases that cover all pairs, as
# a divergence is one functor in kernels that are the same for all.
KINDS = ("kl_div", "soft_cross_entropy", "reverse_kl_div", "js_div-0.1")


@dataclass
class Case:
    name: str
    why: str
    shape: tuple
    make: Any = None  # (student, teacher) in float64 -> the same, changed
    options: dict = field(default_factory=dict)  # a value that is callable is called with the shape

    def inputs(self, dtype, teacher_dtype=None):
        """Student and teacher, and the options, always the same."""
        generator = torch.Generator().manual_seed(len(self.name) + sum(self.shape))
        student = 2.0 * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        teacher = 2.0 * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.make:
            student, teacher = self.make(student, teacher)
        student, teacher = student.to(dtype), teacher.to(teacher_dtype or dtype)
        return student, teacher, self.resolved(generator)

    def resolved(self, generator):
        leading = self.shape[:-1]
        return {k: v(leading, generator) if callable(v) else v for k, v in self.options.items()}

    def __str__(self):
        return self.name


def some_rows(leading, generator):
    return torch.rand(leading, generator=generator) < 0.6


def positive(leading, generator):
    return 0.5 + 2.0 * torch.rand(leading, generator=generator)


def no_rows(leading, generator):
    return torch.zeros(leading, dtype=torch.bool)


def holes(student, teacher):
    """-inf on the student's side only where the teacher has it too."""
    teacher[..., ::3] = -torch.inf
    student[..., ::6] = -torch.inf
    return student, teacher


def impossible_block(student, teacher):
    student[:, :1024], teacher[:, :1024] = -torch.inf, -torch.inf
    return student - 200, teacher - 200


def side_by_side(student, teacher):
    """Neighbouring rows lie next to each other, the classes of a row do not: maps whose classes are not last."""
    return tuple(x.movedim(-1, 1).contiguous().movedim(1, -1) for x in (student, teacher))


def holes_side_by_side(student, teacher):
    return side_by_side(*holes(student, teacher))


def nan_side_by_side(student, teacher):
    student[0, 0, 0], teacher[0, 0, 0] = torch.nan, torch.inf
    return side_by_side(student, teacher)


def students_side_by_side(student, teacher):
    return side_by_side(student, teacher)[0], teacher


def nan_in_first_row(student, teacher):
    student[0], teacher[0] = torch.nan, torch.inf
    return student, teacher


def not_first_row(leading, generator):
    mask = torch.ones(leading, dtype=torch.bool)
    mask[(0,) * len(leading)] = False
    return mask


FINITE = [
    Case("one_class", "V = 1: p = q = 1, loss and gradient are 0", (3, 1)),
    Case("two_classes", "far below a vector's width", (5, 2), options={"temperature": 3.0}),
    Case("digits", "V = 10, padded to one vector", (32, 10), options={"temperature": 4.0}),
    Case("odd", "V no multiple of any vector's width", (7, 333), options={"temperature": 2.0}),
    Case("imagenet", "V just below one block", (6, 1000), options={"temperature": 2.0}),
    Case("one_block", "V exactly one block", (3, 1024)),
    Case("block_and_one", "a second block of one class", (3, 1025), options={"temperature": 0.5}),
    Case("one_long_row", "one row is shared by all threads", (1, 40001), options={"temperature": 2.0}),
    Case("three_long_rows", "rows shared by threads, with a mask", (3, 33000), options={"mask": some_rows}),
    Case("vector", "no leading dimension: one row", (50,), options={"temperature": 2.0}),
    Case("sequence", "[B, L, V]", (3, 5, 65), options={"temperature": 2.0}),
    Case("many_dims", "dimensions of size 1, and many", (2, 1, 2, 1, 2, 1, 2, 1, 2, 9), options={"mask": some_rows, "temperature": positive}),
    Case("row_temperatures", "a temperature per row", (4, 6, 37), options={"temperature": positive}),
    Case("both_temperatures", "teacher and student at different ones, per row", (6, 130), options={"temperature": positive, "teacher_temperature": positive}),
    Case("teacher_temperature", "a teacher that was trained sharper", (6, 130), options={"temperature": 2.0, "teacher_temperature": 3.0}),
    Case("plain", "without the factor T^2", (6, 40), options={"temperature": 3.0, "t_squared": False}),
    Case("masked", "half the rows count", (9, 4, 50), options={"mask": some_rows, "temperature": 2.0}),
    Case("weighted", "a weight per row, and a mask", (20, 50), options={"mask": some_rows, "weight": positive}),
    Case("normalized", "a divisor of the caller's", (20, 50), options={"normalizer": 7.0, "mask": some_rows}),
    Case("normalized_by_tensor", "the same on the device", (20, 50), options={"normalizer": lambda *_: torch.tensor(7)}),
    Case("huge_logits", "a softmax that overflows unless the maximum is subtracted", (5, 300), lambda s, t: (s * 500, t * 500)),
    Case("shifted", "a constant added to a row changes nothing", (5, 300), lambda s, t: (s + 300, t - 200)),
    Case("peaked", "nearly all the teacher's mass on one class", (5, 300), lambda s, t: (s, t * 20)),
    Case("half_way", "a student that has learned something", (8, 2000), lambda s, t: (t + 0.1 * s, t)),
    Case("impossible_classes", "-inf on both sides: q = 0 contributes 0", (6, 70), holes),
    Case("impossible_block", "a whole block of -inf, and a maximum far below 0", (2, 2500), impossible_block),
    Case("impossible_block_of_a_long_row", "the same in a row that threads share", (1, 33000), impossible_block),
    Case("nan_under_mask", "a masked row may hold anything", (6, 70), nan_in_first_row, {"mask": not_first_row}),
    Case("all_masked", "loss 0, gradient 0", (6, 70), options={"mask": no_rows}),
    Case("maps", "[B, V, H, W]: rows lie side by side, 77 in a run", (2, 7, 11, 19), side_by_side, {"mask": some_rows, "temperature": positive, "teacher_temperature": positive}),
    Case("one_map", "a run of more rows than are computed together, and more classes than a warp", (1, 5, 60, 150), side_by_side, {"weight": positive}),
    Case("maps_of_many_classes", "more than stay on chip", (2, 3, 4, 2500), side_by_side, {"temperature": 2.0}),
    Case("small_maps", "runs shorter than a vector", (5, 3, 3, 40), side_by_side, {"temperature": 2.0}),
    Case("tiny_maps", "too few rows side by side to gain anything", (3, 2, 2, 40), side_by_side),
    Case("maps_with_impossible_classes", "-inf side by side", (2, 4, 9, 21), holes_side_by_side, {"t_squared": False}),
    Case("maps_with_nan_under_mask", "a masked row beside others", (2, 4, 9, 21), nan_side_by_side, {"mask": not_first_row}),
    Case("maps_beside_rows", "a teacher that lies otherwise", (2, 4, 9, 21), students_side_by_side, {"temperature": 2.0}),
    Case("no_rows", "N = 0", (0, 70)),
    Case("no_rows_in_the_middle", "N = 0 of three dimensions", (3, 0, 7)),
]  # fmt: skip
