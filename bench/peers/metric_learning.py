"""pytorch-metric-learning: of our losses it has that of all triplets by labels."""

NAME, PACKAGE = "pytorch-metric-learning", "pytorch-metric-learning"
DEVICES, ELSEWHERE = ("cpu", "cuda"), ""
HOLDS = 0.4  # of what eager code does: indices of the triplets that there are
OTHERWISE = "has no such loss"


def _relational_triplet(labels, negatives):
    """A sum over triplets, over the negatives that each sample has and the number of samples."""
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.reducers import SumReducer

    loss = TripletMarginLoss(margin=1.0, distance=LpDistance(normalize_embeddings=False), reducer=SumReducer())
    return lambda student, teacher: loss(student, labels) / (negatives * len(student))


LOSSES = {"relational_triplet": _relational_triplet}
