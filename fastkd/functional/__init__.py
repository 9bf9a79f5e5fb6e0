"""The losses as functions. The student comes first, the teacher second, and options are keywords."""

from .adaptive import adaptive_kl_div
from .beyond_kl import alpha_beta_div, bernoulli_kl_div, negative_log_acceptance
from .cross_entropy import soft_cross_entropy
from .dist import dist_loss
from .features import attention_transfer, feature_cosine, feature_mse, feature_smooth_l1, linear_feature_mse
from .kd import KDParts, kd_loss
from .logits import kl_div, reverse_kl_div, total_variation
from .mixtures import js_div, symmetric_kl_div
from .relations import relation_kl, relational_triplet
from .rkd import rkd_angle, rkd_distance, rkd_loss
from .similarity import gram_mse, pkt, similarity_preserving
from .skew import skew_kl_div, skew_reverse_kl_div
from .targets import dkd_loss, nkd_loss

__all__ = [
    "KDParts",
    "adaptive_kl_div",
    "alpha_beta_div",
    "attention_transfer",
    "bernoulli_kl_div",
    "dist_loss",
    "dkd_loss",
    "feature_cosine",
    "feature_mse",
    "feature_smooth_l1",
    "gram_mse",
    "js_div",
    "kd_loss",
    "kl_div",
    "linear_feature_mse",
    "negative_log_acceptance",
    "nkd_loss",
    "pkt",
    "relation_kl",
    "relational_triplet",
    "reverse_kl_div",
    "rkd_angle",
    "rkd_distance",
    "rkd_loss",
    "similarity_preserving",
    "skew_kl_div",
    "skew_reverse_kl_div",
    "soft_cross_entropy",
    "symmetric_kl_div",
    "total_variation",
]
