"""The features that the features schedule is tested on, each with the reason why."""

import functools
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from fastkd import functional

# What follows a name is how rows are normalised, and a beta.
LOSSES = {
    "feature_mse": functional.feature_mse,
    "feature_mse-l2": functools.partial(functional.feature_mse, normalize="l2"),
    "feature_mse-standardize": functools.partial(functional.feature_mse, normalize="standardize"),
    "feature_cosine": functional.feature_cosine,
    "feature_smooth_l1": functional.feature_smooth_l1,
    "feature_smooth_l1-0": functools.partial(functional.feature_smooth_l1, beta=0),
    "feature_smooth_l1-l2-0.2": functools.partial(functional.feature_smooth_l1, normalize="l2", beta=0.2),
    "feature_smooth_l1-standardize-0.8": functools.partial(
        functional.feature_smooth_l1, normalize="standardize", beta=0.8
    ),
}
PLAIN = ("feature_mse", "feature_smooth_l1", "feature_smooth_l1-0")
NORMALIZED = tuple(name for name in LOSSES if name not in PLAIN)
STANDARDIZED = tuple(name for name in LOSSES if "standardize" in name)
REDUCTIONS = ("none", "sum", "batchmean", "mean")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    name: str
    why: str
    shape: tuple
    make: Any = None  # (student, teacher) in float64 -> the same, changed
    layout: Any = None  # of a tensor -> the same values, laid out differently
    losses: tuple = tuple(LOSSES)
    dtypes: tuple = DTYPES

    def generator(self):
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

    def inputs(self, dtype, teacher_dtype=None):
        """Student and teacher, always the same."""
        generator = self.generator()
        student, teacher = (torch.randn(self.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        if self.make:
            student, teacher = self.make(student, teacher)
        student, teacher = student.float().to(dtype), teacher.float().to(teacher_dtype or dtype)
        return tuple(self.layout(x) if self.layout else x for x in (student, teacher))

    def rows(self):
        """The shape without the features."""
        return (self.shape[0], *self.shape[2:]) if len(self.shape) == 4 else self.shape[:-1]

    def options(self):
        """A mask and weights."""
        generator = self.generator()
        return {
            "mask": torch.rand(self.rows(), generator=generator) < 0.7,
            "weight": 0.5 + torch.rand(self.rows(), generator=generator),
        }

    def __str__(self):
        return self.name


def zero_rows(student, teacher):
    student[1], teacher[2] = 0, 0
    student[4], teacher[4] = 0, 0
    return student, teacher


def constant_rows(student, teacher):
    student[1], teacher[2], student[3] = 1e5, -7.0, 0.1
    return student, teacher


def scaled(factor, teacher_factor):
    return lambda student, teacher: (factor * student, teacher_factor * teacher)


def edge_of_half(student, teacher):
    """Squares and their sums leave float16's range."""
    return (3e4 * student).clamp(-6e4, 6e4), (1e4 * teacher).clamp(-6e4, 6e4)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def every_other(x):
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


WIDE = (torch.float32, torch.float64)
CASES = [
    Case("one_feature", "D = 1", (5, 1), losses=(*PLAIN, *STANDARDIZED)),
    Case("one_row", "a tensor without leading dimensions", (7,)),
    Case("odd", "no multiple of any vector", (37, 50)),
    Case("sequence", "[B, L, D]", (3, 5, 33)),
    Case("vectors", "D a multiple of every vector", (4, 64)),
    Case("long", "D beyond one tile", (3, 5003)),
    Case("maps", "[B, C, H, W], rows side by side", (2, 7, 5, 9)),
    Case("wide_maps", "more positions than a thread takes at once", (2, 40, 9, 9)),
    Case("aligned_maps", "packs of positions, each of which has a mask and a weight of its own", (2, 7, 4, 8)),
    Case("one_channel", "C = 1", (2, 1, 3, 3), losses=PLAIN),
    Case("channels_last", "the channels lie next to each other", (2, 7, 5, 9), layout=channels_last),
    Case("every_other", "strides of 2", (4, 6, 18), layout=every_other),
    Case("transposed", "the features lie apart", (20, 3, 9), layout=transposed),
    Case("misaligned", "no vector is aligned", (9, 32), layout=misaligned),
    Case("misaligned_maps", "the same of maps", (2, 16, 4, 8), layout=misaligned),
    Case("zero_rows", "without a direction", (6, 20), zero_rows, losses=NORMALIZED),
    Case("constant_rows", "without a variance", (6, 20), constant_rows, losses=STANDARDIZED, dtypes=WIDE),
    Case("huge", "squares leave float32's range", (5, 24), scaled(1e25, 1e30), losses=NORMALIZED, dtypes=WIDE),
    Case("huge_maps", "the same of maps", (2, 12, 3, 3), scaled(1e25, 1e30), losses=NORMALIZED, dtypes=WIDE),
    Case("tiny", "squares far below 1, lengths above 1e-12", (5, 24), scaled(1e-11, 1e-10), losses=NORMALIZED, dtypes=WIDE),
    Case("vanishing", "squares vanish in float32, lengths are below 1e-12", (5, 24), scaled(1e-25, 1), losses=NORMALIZED, dtypes=WIDE),
    Case("far_from_the_origin", "a mean far above the deviation", (5, 40), lambda s, t: (1e3 + s, t - 500), losses=STANDARDIZED, dtypes=DTYPES[:1]),
    Case("edge_of_half", "sums leave float16's range", (5, 40), edge_of_half),
]  # fmt: skip

# The student has nearly learned.
NEAR = [
    Case("converging", "differences of nearly equal rows", (17, 40), lambda s, t: (t + 1e-3 * s, t), dtypes=WIDE),
    Case("converging_maps", "the same of maps", (2, 40, 5, 5), lambda s, t: (t + 1e-3 * s, t), dtypes=WIDE),
]  # fmt: skip


def each(cases, dtypes=DTYPES):
    return [(loss, case, dtype) for case in cases for loss in case.losses for dtype in dtypes if dtype in case.dtypes]
