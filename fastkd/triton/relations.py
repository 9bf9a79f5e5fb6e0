"""Relations between two samples: what a pair contributes, as the functor that the pairs schedule is handed. To add one,
write its two functions, in a file that imports triton.language, and give it a number in RELATIONS.

s and t are the distances of the student's and of the teacher's pair, at least 1e-6, and w is the pair's weight, the
mean of those of its samples. The schedule walks all ordered pairs of different samples up to three times:
  1. the means of s and of t, where the call normalizes; else both are 1
  2. pair(s, t, w, by_mu, by_tau, delta) -> loss, slope. by_mu and by_tau are 1 / those means, delta is the call's. The
     loss is 1/N^2 of the sum of the losses. slope is u d loss / d u, u = s by_mu; where no call normalizes, anything.
  3. weight(s, t, w, by_mu, by_tau, slope, delta), weight_ij: the gradient is 2/N^2 sum_j weight_ij (x_i - x_j). It is
     by_mu (d loss / d u - slope) / s, slope being the mean of the slopes, through which the pair is in the mean of s;
     it is 0 where the call does not normalize.

s, t and w are tiles, and w a scalar where samples have no weights; the others are scalars, all of one dtype, which the
results must have. Where there is no pair, s and t are 0 and results are dropped, be they infinite; and so is the weight
of equal samples, whose distance does not depend on them. NaN must stay NaN.
"""

from typing import NamedTuple

import triton
import triton.language as tl  # noqa: F401 - the interpreter asks for it beside every function

from ..ops.relations import RKD_DISTANCE
from .embeddings import clamp


class Relation(NamedTuple):
    """Functions of Triton, as the text above has them."""

    pair: triton.runtime.KernelInterface
    weight: triton.runtime.KernelInterface


# With u = s / mean s, v = t / mean t, e = u - v and r = clamp(e, +-delta):
# loss = w huber(e), d loss / d u = w r.


@triton.jit
def _rkd_distance(s, t, w, by_mu, by_tau, delta):
    u = s * by_mu
    e = u - t * by_tau
    r = clamp(e, delta)
    return w * (r * (e - 0.5 * r)), w * (r * u)


@triton.jit
def _rkd_distance_weight(s, t, w, by_mu, by_tau, slope, delta):
    r = clamp(s * by_mu - t * by_tau, delta)
    return by_mu * (w * r - slope) / s


# The numbers are those of csrc/common/embeddings_params.h.
RELATIONS = {RKD_DISTANCE: Relation(_rkd_distance, _rkd_distance_weight)}
