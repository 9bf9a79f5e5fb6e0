"""The types that several signatures name."""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from .forms import LinearLogits, Probabilities, TopKLogProbs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:  # a torch that was built without it has none
    ProcessGroup = Any

# What a loss of logits compares.
Logits: TypeAlias = Tensor | LinearLogits
TeacherLogits: TypeAlias = Tensor | LinearLogits | TopKLogProbs | Probabilities
WholeTeacher: TypeAlias = Tensor | LinearLogits | Probabilities  # of losses that need all of its classes
Reduction: TypeAlias = Literal["none", "sum", "batchmean", "mean"]
Divergence: TypeAlias = Literal["kl_div", "soft_cross_entropy", "reverse_kl_div", "js_div", "total_variation"]
SoftDivergence: TypeAlias = Literal[
    "kl_div",
    "soft_cross_entropy",
    "reverse_kl_div",
    "js_div",
    "symmetric_kl_div",
    "skew_kl_div",
    "skew_reverse_kl_div",
    "total_variation",
    "negative_log_acceptance",
    "alpha_beta_div",
    "bernoulli_kl_div",
    "adaptive_kl_div",
]
# Of losses with a target: they have no "mean", which libraries read in three ways.
TargetReduction: TypeAlias = Literal["none", "sum", "batchmean"]
FeatureNormalize: TypeAlias = Literal["l2", "standardize"] | None
# One layer, or one tensor for each of several layers.
Layers: TypeAlias = Tensor | list[Tensor] | tuple[Tensor, ...]
# A loss, unless an option asks for something beside it or for a list. Any: a type checker takes either without a cast.
LossOrMore: TypeAlias = Tensor | Any
