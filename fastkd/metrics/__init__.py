"""What a student has learned from its teacher, in numbers.

Each measure is a function of all rows at once; and a class of the same name in capitals, which takes batches one after
the other: ``update``, then ``compute``, and ``reset`` to begin again. What a class keeps are sums, so that its memory
does not grow with the number of rows; of :class:`Neighbours` it is the embeddings themselves. Nothing of N x N numbers
is ever held. Sums are in float64, on the device of what is given, or in float32 on Apple's, which have no float64.

Nothing here has a gradient. Student and teacher are plain tensors of float16, bfloat16, float32 or float64.

:func:`for_torchmetrics` makes a metric of ``torchmetrics`` of one of these, with which they go into its collections,
and are summed over ranks.
"""

from ._base import Metric, for_torchmetrics
from .predictions import (
    Agreement,
    Calibration,
    CalibrationBins,
    ClassDivergence,
    DivergenceByClass,
    agreement,
    calibration,
    divergence_by_class,
)
from .similarity import CKA, Neighbours, cka, neighbours

__all__ = [
    "CKA",
    "Agreement",
    "Calibration",
    "CalibrationBins",
    "ClassDivergence",
    "DivergenceByClass",
    "Metric",
    "Neighbours",
    "agreement",
    "calibration",
    "cka",
    "divergence_by_class",
    "for_torchmetrics",
    "neighbours",
]
