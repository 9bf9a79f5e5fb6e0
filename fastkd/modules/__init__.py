"""Every loss as a ``torch.nn.Module``: options in the constructor, tensors in ``forward``."""

from .adaptive import AdaptiveKLDivLoss
from .beyond_kl import AlphaBetaDivLoss, BernoulliKLDivLoss, NegativeLogAcceptanceLoss
from .cross_entropy import SoftCrossEntropyLoss
from .dist import DISTLoss
from .features import (
    AttentionTransferLoss,
    FeatureCosineLoss,
    FeatureMSELoss,
    FeatureSmoothL1Loss,
    LinearFeatureMSELoss,
)
from .kd import KDLoss
from .logits import KLDivLoss, ReverseKLDivLoss, TotalVariationLoss
from .mixtures import JSDivLoss, SymmetricKLDivLoss
from .relations import RelationalTripletLoss, RelationKLLoss
from .rkd import RKDAngleLoss, RKDDistanceLoss, RKDLoss
from .similarity import GramMSELoss, PKTLoss, SimilarityPreservingLoss
from .skew import SkewKLDivLoss, SkewReverseKLDivLoss
from .targets import DKDLoss, NKDLoss

__all__ = [
    "AdaptiveKLDivLoss",
    "AlphaBetaDivLoss",
    "AttentionTransferLoss",
    "BernoulliKLDivLoss",
    "DISTLoss",
    "DKDLoss",
    "FeatureCosineLoss",
    "FeatureMSELoss",
    "FeatureSmoothL1Loss",
    "GramMSELoss",
    "JSDivLoss",
    "KDLoss",
    "KLDivLoss",
    "LinearFeatureMSELoss",
    "NKDLoss",
    "NegativeLogAcceptanceLoss",
    "PKTLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RKDLoss",
    "RelationKLLoss",
    "RelationalTripletLoss",
    "ReverseKLDivLoss",
    "SimilarityPreservingLoss",
    "SkewKLDivLoss",
    "SkewReverseKLDivLoss",
    "SoftCrossEntropyLoss",
    "SymmetricKLDivLoss",
    "TotalVariationLoss",
]
