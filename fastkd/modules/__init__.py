"""Every loss as a ``torch.nn.Module``: options in the constructor, tensors in ``forward``."""

from .dist import DISTLoss
from .features import AttentionTransferLoss, FeatureCosineLoss, FeatureMSELoss, LinearFeatureMSELoss
from .logits import KLDivLoss, ReverseKLDivLoss, SoftCrossEntropyLoss, TotalVariationLoss
from .mixtures import JSDivLoss, SkewKLDivLoss, SkewReverseKLDivLoss, SymmetricKLDivLoss
from .relations import (
    GramMSELoss,
    PKTLoss,
    RelationalTripletLoss,
    RelationKLLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    RKDLoss,
    SimilarityPreservingLoss,
)
from .targets import KDLoss

__all__ = [
    "AttentionTransferLoss",
    "DISTLoss",
    "FeatureCosineLoss",
    "FeatureMSELoss",
    "GramMSELoss",
    "JSDivLoss",
    "KDLoss",
    "KLDivLoss",
    "LinearFeatureMSELoss",
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
