"""sentence-transformers: any loss of fastkd as one of its losses, whose labels are what a teacher said before.

As its own losses do, these take the student model first, and are called with the columns of a batch, tokenized, and
with the column ``label``; ``SentenceTransformerTrainer(loss=...)`` takes them. Labels are computed once, by
``dataset.map``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import functional


def _embeddings(model: torch.nn.Module, sentence_features: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """Of each column, [B, D]."""
    return [model(column)["sentence_embedding"] for column in sentence_features]


def _needed(labels: Tensor | None, what: str) -> Tensor:
    if labels is None:
        raise ValueError(f"labels: {what} of the teacher wanted in a column 'label', and there is none")
    return labels.detach()


class TeacherEmbeddingsLoss(torch.nn.Module):
    """A loss of features or of relations between the student's embeddings and the teacher's; the mean over the columns
    of text.

    Losses of relations, such as ``fastkd.RelationKLLoss``, ``GramMSELoss``, ``RKDLoss`` and ``PKTLoss``, compare the
    samples of a batch with each other, and need no common width. ``fastkd.FeatureMSELoss()`` computes what
    sentence-transformers has as ``MSELoss``, and ``fastkd.FeatureCosineLoss()`` its ``EmbedDistillLoss``.

    Args:
        model: the student.
        loss: called with the embeddings ``[B, D]`` of both sides; a module or a function. One that has parameters, such
            as the projector of ``fastkd.LinearFeatureMSELoss``, is trained with the student.

    Labels are the teacher's embeddings: ``[B, D_t]``, the same for all columns, or ``[B, columns, D_t]``.

    >>> TeacherEmbeddingsLoss(model, fastkd.RelationKLLoss(temperature=0.1))  # doctest: +SKIP
    """

    def __init__(self, model: torch.nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss: a module or function of fastkd wanted, got {type(loss).__name__}")
        self.model: torch.nn.Module = model
        self.loss: Callable[..., Tensor] = loss

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """The loss, a tensor without dimensions."""
        labels, embeddings = _needed(labels, "embeddings"), _embeddings(self.model, sentence_features)
        if labels.dim() not in (2, 3) or (labels.dim() == 3 and labels.shape[1] != len(embeddings)):
            raise ValueError(
                f"labels: the teacher's embeddings [B, D] or [B, {len(embeddings)}, D] wanted, one of each column, got "
                f"{list(labels.shape)}"
            )
        each = [labels] * len(embeddings) if labels.dim() == 2 else labels.unbind(1)
        found = [self.loss(x, t.to(x.device, x.dtype)) for x, t in zip(embeddings, each, strict=True)]
        return torch.stack(found).mean()

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card tells of it."""
        return {"loss": repr(self.loss)}


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


class _Scores(torch.nn.Module):
    """Scores of a query, the first column, beside each of its passages, the others."""

    def __init__(self, model: torch.nn.Module, similarity_fct: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.model: torch.nn.Module = model
        self.similarity_fct: Callable[[Tensor, Tensor], Tensor] = similarity_fct or _dot

    def scores(self, sentence_features: Iterable[dict[str, Tensor]]) -> Tensor:
        """[B, passages]"""
        query, *passages = _embeddings(self.model, sentence_features)
        if len(passages) < 2:
            raise ValueError(f"sentence_features: a query and two passages at least wanted, got {1 + len(passages)}")
        return torch.stack([self.similarity_fct(query, x) for x in passages], 1)

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card tells of it."""
        return {"similarity_fct": getattr(self.similarity_fct, "__name__", repr(self.similarity_fct))}


class TeacherScoresLoss(_Scores):
    """A loss of logits between the scores that student and teacher give the passages of a query, which are the logits.

    ``fastkd.KLDivLoss(temperature=T)`` computes what sentence-transformers has as ``DistillKLDivLoss``, with
    ``teacher_temperature`` as there.

    Args:
        model: the student.
        loss: called with scores ``[B, passages]`` of both sides; a module or a function.
        similarity_fct: of embeddings ``[B, D]`` of queries and of passages, ``[B]``. Default: the dot product.

    Labels are the teacher's scores ``[B, passages]``; of text the first column is the query, the others are passages.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[..., Tensor],
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(model, similarity_fct)
        if not callable(loss):
            raise TypeError(f"loss: a module or function of fastkd wanted, got {type(loss).__name__}")
        self.loss: Callable[..., Tensor] = loss

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """The loss, a tensor without dimensions."""
        labels, scores = _needed(labels, "scores"), self.scores(sentence_features)
        if labels.shape != scores.shape:
            raise ValueError(f"labels: the teacher's scores {list(scores.shape)} wanted, got {list(labels.shape)}")
        return self.loss(scores, labels.to(scores.device))


class MarginMSELoss(_Scores):
    """The mean squared error of margins: by how much a query's first passage scores above each of the others.

    Args:
        model: the student.
        similarity_fct: of embeddings ``[B, D]`` of queries and of passages, ``[B]``. Default: the dot product.

    Labels are the teacher's scores ``[B, passages]``, or its margins ``[B, passages - 1]``, or ``[B]`` of two passages.

    Source: https://arxiv.org/abs/2010.02666; ``MarginMSELoss`` of sentence-transformers 6.2.
    """

    def __init__(
        self, model: torch.nn.Module, similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(model, similarity_fct)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """The loss, a tensor without dimensions."""
        labels, scores = _needed(labels, "scores or margins"), self.scores(sentence_features)
        if labels.shape == scores.shape:
            labels = labels[:, :1] - labels[:, 1:]
        margins = scores[:, :1] - scores[:, 1:]
        labels = labels[:, None] if labels.dim() == 1 else labels
        if labels.shape != margins.shape:
            raise ValueError(
                f"labels: the teacher's scores {list(scores.shape)} or margins {list(margins.shape)} wanted, got "
                f"{list(labels.shape)}"
            )
        return functional.feature_mse(margins, labels.to(margins.device, margins.dtype))
