"""Fused knowledge-distillation losses for PyTorch.

``fastkd.functional`` has the losses as functions; each has a module of its own here. Which
kernels compute them is chosen per device; ``fastkd.backend`` overrides the choice and
``python -m fastkd`` shows it. ``fastkd.metrics`` measures what a student has learned.
"""

from . import functional, metrics
from ._backend import backend
from .forms import LinearLogits, Probabilities, TopKLogProbs
from .modules import (
    AdaptiveKLDivLoss,
    AlphaBetaDivLoss,
    AttentionTransferLoss,
    BernoulliKLDivLoss,
    DISTLoss,
    DKDLoss,
    FeatureCosineLoss,
    FeatureMSELoss,
    FeatureSmoothL1Loss,
    GramMSELoss,
    JSDivLoss,
    KDLoss,
    KLDivLoss,
    LinearFeatureMSELoss,
    NegativeLogAcceptanceLoss,
    NKDLoss,
    PKTLoss,
    RelationalTripletLoss,
    RelationKLLoss,
    ReverseKLDivLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    RKDLoss,
    SimilarityPreservingLoss,
    SkewKLDivLoss,
    SkewReverseKLDivLoss,
    SoftCrossEntropyLoss,
    SymmetricKLDivLoss,
    TotalVariationLoss,
)

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
    "LinearLogits",
    "NKDLoss",
    "NegativeLogAcceptanceLoss",
    "PKTLoss",
    "Probabilities",
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
    "TopKLogProbs",
    "TotalVariationLoss",
    "backend",
    "functional",
    "metrics",
]
__version__ = "0.1.0"
