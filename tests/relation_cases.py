"""The embeddings that the relational losses are tested on, each with the reason why."""

import functools
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from relation_truth import TRUTH

from fastkd import functional

LOSSES = {name: getattr(functional, name) for name in TRUTH}
OPTIONS = {
    "rkd_distance": ("normalize", "delta"),
    "rkd_angle": ("delta",),
    "rkd_loss": ("distance_delta", "angle_delta"),
    "similarity_preserving": (),
    "gram_mse": ("normalize", "clamp"),
    "relation_kl": ("temperature", "normalize"),
    "pkt": (),
    "relational_triplet": ("margin",),
}
SIMILARITIES = ("similarity_preserving", "gram_mse", "relation_kl", "pkt")
TRIPLET = ("relational_triplet",)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    name: str
    why: str
    N: int
    widths: tuple = (16, 16)  # of student and teacher
    make: Any = None  # (student, teacher) in float64 -> the same, changed
    options: dict = field(default_factory=dict)  # each loss takes its own
    losses: tuple = ("rkd_distance", "rkd_angle", *SIMILARITIES, *TRIPLET)
    dtypes: tuple = DTYPES
    spread: float = 1.0  # of the distances, where the cosines of an angle lose digits by it
    long: tuple = ()  # losses that an interpreter is too long at: smaller cases take the same ways there

    def inputs(self, dtype, teacher_dtype=None):
        """Student and teacher, always the same."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        student, teacher = (
            torch.randn(self.N, width, generator=generator, dtype=torch.float64) for width in self.widths
        )
        if self.make:
            student, teacher = self.make(student, teacher)
        # as float32 has them: the truth is one for both
        return student.float().to(dtype), teacher.float().to(teacher_dtype or dtype)

    def options_of(self, loss):
        return {name: value for name, value in self.options.items() if name in OPTIONS[loss]}

    def truth(self, loss, dtype, teacher_dtype=None):
        dtypes = (torch.float64 if x is torch.float32 else x for x in (dtype, teacher_dtype or dtype))
        return _truth(loss, self.name, *dtypes)

    def __str__(self):
        return self.name


@functools.cache  # every backend asks for it
def _truth(loss, name, dtype, teacher_dtype):
    case = next(case for case in (*CASES, *NEAR, *NOTHING, *LARGE, MIXED) if case.name == name)
    return TRUTH[loss](*case.inputs(dtype, teacher_dtype), **case.options_of(loss))


def repeated(student, teacher):
    """Samples that are equal for the student, others for the teacher, some for both."""
    quarter = len(student) // 4
    student[quarter : 2 * quarter] = student[:quarter]
    student[-3:] = student[0]
    teacher[-quarter:] = teacher[:quarter]
    return student, teacher


def equal_students(student, teacher):
    return student[:1].expand_as(student).clone(), teacher


def all_equal(student, teacher):
    return student[:1].expand_as(student).clone(), teacher[:1].expand_as(teacher).clone()


def shifted(student, teacher):
    return 100 + 0.01 * student, 100 + 0.01 * teacher


def clusters(student, teacher, apart=1000.0, members=0.01):
    """Three for the student, four for the teacher: members of one are apart for the other."""
    centres, teacher_centres = apart * student[:3], apart * teacher[:4]
    which = torch.arange(len(student))
    return centres[which % 3] + members * student, teacher_centres[which % 4] + members * teacher


def one_far_away(student, teacher):
    student[1] += 3e4
    teacher[2] -= 3e4
    return student, teacher


def edge_of_half(student, teacher):
    """Near the ends of float16's range: what is centred lies beyond them."""
    side = torch.where(torch.arange(len(student)) % 8 == 0, -5e4, 6e4)[:, None]
    return side + 1e3 * student, teacher


def converging(student, teacher):
    return teacher + 1e-3 * student, teacher


def zero_rows(student, teacher):
    student[3], teacher[3], student[5], teacher[7] = 0, 0, 0, 0
    return student, teacher


def scaled(factor, teacher_factor):
    return lambda student, teacher: (factor * student, teacher_factor * teacher)


RKD = ("rkd_distance", "rkd_angle")
DISTANCE = ("rkd_distance",)
CASES = [
    Case("three_samples", "the fewest that have a shape", 3, (5, 4)),
    Case("one_feature", "D = 1; on a line angles and similarities hardly change", 7, (1, 3), losses=DISTANCE),
    Case("one_teacher_feature", "D = 1: its cosines are 1 and -1", 7, (2, 1)),
    Case("line", "D = 1 of the student", 9, (1, 3), losses=TRIPLET),
    Case("odd", "no multiple of any tile, different widths", 33, (20, 7)),
    Case("narrow_margin", "few triplets are active", 40, (3, 5), options={"margin": 0.05}, losses=TRIPLET),
    Case("wide_margin", "all are", 40, (3, 5), options={"margin": 30.0}, losses=TRIPLET),
    Case("wide", "D above one slice of a product", 9, (70, 65)),
    Case("tile_and_one", "one row and one feature beyond a tile", 65, (17, 33), losses=("rkd_distance", *SIMILARITIES, *TRIPLET), long=TRIPLET),
    Case("tile_and_one_of_angles", "one row beyond a tile", 65, (5, 3), losses=("rkd_angle",), dtypes=DTYPES[:1]),
    Case("repeated", "equal samples: distance 0, no gradient from each other", 24, (6, 9), repeated, losses=(*RKD, *SIMILARITIES)),
    Case("repeated_students", "the same, of neighbours that are not equally near", 24, (6, 9), lambda s, t: (repeated(s, t.clone())[0], t), losses=TRIPLET),
    Case("equal_students", "a student that has collapsed; of gram_mse it has no gradient", 12, (6, 9), equal_students, losses=(*RKD, "similarity_preserving")),
    Case("shifted", "one tight cluster far from the origin", 20, (8, 12), shifted, losses=(*RKD, *TRIPLET)),
    Case("clusters", "several tight clusters far apart", 20, (8, 8), clusters, losses=RKD, spread=1e5),
    Case("clusters_by_a_margin", "near pairs have most of the gradient", 20, (8, 8), clusters, {"margin": 2000.0}, TRIPLET, DTYPES[:2]),
    Case("loose_clusters", "the same, less so: products do not quite cancel", 20, (8, 8), functools.partial(clusters, apart=10.0, members=0.3), losses=(*RKD, *TRIPLET)),
    Case("one_far_away", "one distance is far above the others", 20, (8, 8), one_far_away, losses=RKD, spread=1e5),
    Case("edge_of_half", "centred embeddings leave float16's range; their directions are nearly two", 17, (8, 8), edge_of_half, losses=(*RKD, "similarity_preserving")),
    Case("small", "distances far below 1", 17, (8, 8), scaled(1e-3, 1e-2), losses=(*RKD, "similarity_preserving", "gram_mse", "pkt")),
    Case("large", "squares far above 1", 17, (8, 8), scaled(1e4, 1e3), losses=(*RKD, "similarity_preserving", "gram_mse", "pkt")),
    Case("sharp", "cosines at a low temperature", 40, (8, 12), options={"normalize": True, "temperature": 0.05}, losses=("relation_kl",)),
    Case("soft", "products at a high one", 40, (8, 12), options={"temperature": 3.0}, losses=("relation_kl",)),
    Case("far_off_the_origin", "what all rows have in common is far above the rest", 20, (8, 12), lambda s, t: (300 + s, t - 200), losses=("relation_kl",), dtypes=DTYPES[:2]),
    Case("clamped", "most of Huber's loss is linear", 19, (8, 5), options={"delta": 0.1}, losses=RKD),
    Case("barely_clamped", "some of it is", 19, (8, 5), options={"delta": 0.7}, losses=RKD),
    Case("plain", "distances are not divided by their mean", 19, (8, 5), options={"normalize": None}, losses=DISTANCE),
    Case("plain_clamped", "the same in Huber's linear part", 19, (8, 5), scaled(4, 1), {"normalize": None, "delta": 0.5}, DISTANCE),
    Case("plain_two_samples", "one pair", 2, (3, 4), options={"normalize": None}, losses=DISTANCE),
    Case("plain_equal_students", "distance 0 against the teacher's", 9, (3, 4), equal_students, {"normalize": None}, DISTANCE),
    Case("two_samples", "similarities of one pair", 2, (3, 4), losses=SIMILARITIES),
    Case("zero_rows", "samples without a direction", 12, (6, 9), zero_rows, losses=SIMILARITIES),
    Case("many", "similarities by features", 300, (12, 20), losses=(*SIMILARITIES, *TRIPLET), long=TRIPLET),
    Case("wide_teacher", "by samples, for the teacher's width", 200, (8, 130), losses=SIMILARITIES),
    Case("wide_student", "for the student's", 200, (130, 8), losses=SIMILARITIES),
    Case("as_they_are", "rows of any length", 20, (8, 12), options={"normalize": False}, losses=("gram_mse",)),
    Case("many_as_they_are", "the same by features", 300, (12, 20), options={"normalize": False}, losses=("gram_mse",)),
    Case("clamped_teacher", "half of the similarities are negative", 70, (6, 5), options={"clamp": "teacher"}, losses=("gram_mse",)),
    Case("clamped_both", "on both sides", 70, (6, 5), options={"clamp": "both"}, losses=("gram_mse",)),
    Case("huge", "squares leave float32's range", 20, (8, 12), scaled(1e25, 1e30), losses=("gram_mse", "pkt"), dtypes=DTYPES[:2]),
    Case("tiny", "squares vanish", 20, (8, 12), scaled(1e-30, 1e-10), losses=("gram_mse",), dtypes=DTYPES[:2]),
    Case("off_the_origin", "all similarities nearly 1", 20, (8, 12), lambda s, t: (3 + s, t - 2), losses=SIMILARITIES),
]  # fmt: skip

# A student that has nearly learned: the loss is right to 1e-3.
NEAR = [
    Case(
        "converging",
        "the difference of nearly equal relations",
        33,
        (16, 16),
        converging,
        losses=(*RKD, "similarity_preserving", "gram_mse", "pkt"),
    ),
    Case("converging_small", "the same of few samples", 5, (12, 12), converging, losses=(*RKD, *SIMILARITIES)),
]

# Loss and gradient 0 by mathematics, whatever the teacher.
NOTHING = [
    Case("no_samples", "N = 0", 0, (5, 4)),
    Case(
        "one_sample",
        "N = 1: no pairs",
        1,
        (5, 4),
        losses=(*RKD, "similarity_preserving", "relation_kl", "pkt", *TRIPLET),
    ),
    Case("one_pair", "N = 2: divided by their mean its distances are 1, its cosines are 1", 2, (3, 4), losses=RKD),
    Case("all_equal", "distances 0 on both sides", 9, (5, 4), all_equal, losses=(*RKD, *SIMILARITIES)),
]

# Several tiles and strips of the CPU's kernels; too slow for those of GPUs on the host.
LARGE = [
    Case("three_blocks", "tiles of the upper triangle", 700, (16, 24), losses=("rkd_distance", *SIMILARITIES, *TRIPLET)),
    Case("five_blocks", "an odd number of blocks, which do not stay in memory", 1300, (9, 16), losses=("rkd_distance",)),
    Case("many_blocks", "distances are computed again, twice where pairs were clamped", 1500, (8, 8), options={"delta": 0.2}, losses=DISTANCE),
    Case("many_plain_blocks", "not divided by their mean", 1500, (8, 8), options={"normalize": None}, losses=DISTANCE),
    Case("many_clusters", "close pairs in all tiles", 700, (8, 8), clusters, losses=DISTANCE),
    Case("many_repeated", "equal samples in different tiles", 700, (8, 8), repeated, losses=DISTANCE),
    Case("blocks_of_angles", "several blocks of one strip", 300, (16, 9), losses=("rkd_angle",)),
    Case("strips_of_angles", "several strips", 530, (8, 5), options={"delta": 0.5}, losses=("rkd_angle",), dtypes=DTYPES[:1]),
    Case("clusters_of_angles", "distances of a large spread", 300, (8, 8), clusters, losses=("rkd_angle",), spread=1e5),
    Case("repeated_angles", "equal samples in different blocks", 300, (8, 8), repeated, losses=("rkd_angle",)),
]  # fmt: skip

MIXED = Case("mixed", "dtypes and widths differ", 12, (9, 6))


def each(cases, dtypes=DTYPES):
    """Every loss of every case in every dtype."""
    return [(loss, case, dtype) for case in cases for loss in case.losses for dtype in dtypes if dtype in case.dtypes]
