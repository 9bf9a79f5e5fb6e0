"""The losses in plain PyTorch, to be read: the truth for tests and benches, and the fallback.

In float64 these are what every kernel is measured against. Of half and single precision they make no float64, which
some devices do not have.
"""

from .._dtypes import compute_dtype
from . import forms
from ._shared import gradient_dtype, ordinary
from .dist import dist_loss
from .divergences import DIVERGENCES, OF_DERIVED
from .features import attention_transfer, feature_loss, linear_feature_loss
from .logits import STANDARDIZE_EPS, log_softmax, logits_loss
from .relations import (
    gram_mse,
    pkt,
    positives_of,
    relation_kl,
    relational_triplet,
    rkd_angle,
    rkd_distance,
    rkd_loss,
    similarity_preserving,
)

__all__ = [
    "DIVERGENCES",
    "OF_DERIVED",
    "STANDARDIZE_EPS",
    "attention_transfer",
    "compute_dtype",
    "dist_loss",
    "feature_loss",
    "forms",
    "gradient_dtype",
    "gram_mse",
    "linear_feature_loss",
    "log_softmax",
    "logits_loss",
    "ordinary",
    "pkt",
    "positives_of",
    "relation_kl",
    "relational_triplet",
    "rkd_angle",
    "rkd_distance",
    "rkd_loss",
    "similarity_preserving",
]
