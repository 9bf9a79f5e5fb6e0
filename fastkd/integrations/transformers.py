"""Hugging Face Trainer: a teacher and any loss of logits as its ``compute_loss_func``.

The Trainer calls a ``compute_loss_func`` with the student's outputs and the labels, and not with what the model was
given. :class:`TeacherLoss` watches the student for that, and shows the teacher the same.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# What a model is called with that tells of its own loss, and not of the batch.
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")


class TeacherLoss:
    """The loss of a student's logits beside those of a teacher that sees the same batch, for the ``compute_loss_func``
    of ``transformers.Trainer``.

    For each micro-batch the teacher is called, without gradients and under the same autocast, with those of the
    student's arguments that its ``forward`` takes, and not with labels. Then

    .. math:: L = \\frac{1}{n} \\sum_{i \\text{ with a label}} \\ell(\\text{student}_i, \\text{teacher}_i)

    where n is the Trainer's ``num_items_in_batch``: the number of labels of all micro-batches of a step, and of all
    processes with ``average_tokens_across_devices=True``, the Trainer's default. So a step has the same gradient
    however its samples are divided into micro-batches and among processes. Where there are no labels every row counts,
    the divisor is the loss's own, and the loss is divided by ``gradient_accumulation_steps``, which the Trainer leaves
    to its ``compute_loss_func``. ``torch.nn.DataParallel``, which splits a batch inside the model, is not supported.

    Args:
        student: the model that the Trainer trains. A hook on it remembers what it was last called with, until
            :meth:`remove`.
        teacher: called as the student is. It is put in evaluation mode, and moved to the device of the student's
            logits, unless a ``device_map`` has placed it; what it returns are logits ``[*, V]``, or has them as
            ``logits``.
        loss: a loss of logits of fastkd: a module or a function, with its options. One that takes a target, such as
            ``fastkd.KDLoss``, is given the labels; ``ignore_index`` of the loss and of this must be the same.
        shift: whether logits at a position are about the next label, as a causal language model's are; then the last
            position of both sides and the first label are left out. Default: as the Trainer counts labels of this
            student, which is by its loss in ``transformers``; of a model that is not of ``transformers`` False.
        ignore_index: the label of what does not count. Default: -100, the Trainer's.
        gradient_accumulation_steps: that of the Trainer. Only of use without labels.

    Raises:
        TypeError: student or teacher is no ``torch.nn.Module``, or the loss cannot be called.
        ValueError: no logits in what student or teacher returns; a loss with a target, and no labels; the student has
            not been called before the loss is.

    >>> loss = TeacherLoss(student, teacher, fastkd.KDLoss(temperature=2.0))  # doctest: +SKIP
    >>> Trainer(model=student, compute_loss_func=loss, ...).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: torch.nn.Module,
        loss: Callable[..., Any],
        *,
        shift: bool | None = None,
        ignore_index: int = -100,
        gradient_accumulation_steps: int = 1,
    ) -> None:
        for name, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, torch.nn.Module):
                raise TypeError(f"{name}: a torch.nn.Module wanted, got {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"loss: a module or function of fastkd wanted, got {type(loss).__name__}")
        if not isinstance(shift, bool | None):
            raise TypeError(f"shift: True, False or None wanted, got {shift!r}")
        if not isinstance(gradient_accumulation_steps, int) or gradient_accumulation_steps < 1:
            raise ValueError(
                f"gradient_accumulation_steps: a whole number of at least 1 wanted, got {gradient_accumulation_steps!r}"
            )
        self.teacher: torch.nn.Module = teacher
        self.loss: Callable[..., Any] = loss
        self.shift: bool = _shifts_labels(student) if shift is None else shift
        self.ignore_index: int = ignore_index
        self.gradient_accumulation_steps: int = gradient_accumulation_steps
        self._takes_target = "target" in inspect.signature(getattr(loss, "forward", loss)).parameters
        self._batch: dict[str, Any] | None = None
        self._hook = student.register_forward_pre_hook(_remembers(self, student), with_kwargs=True)

    def remove(self) -> None:
        """Takes the hook off the student again."""
        self._hook.remove()
        self._batch = None

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """As the Trainer calls it.

        Args:
            outputs: the student's.
            labels: ``[*]``, whole numbers, or None.
            num_items_in_batch: by how many labels the loss is divided. None: those of this batch.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            raise ValueError("student: it has not been called since the last loss; is it the model that is trained?")
        s = _logits("student", outputs)
        t = self._of_teacher(batch, s)
        labels, shift = (batch["shift_labels"], False) if "shift_labels" in batch else (labels, self.shift)
        if shift:
            s, t = s[..., :-1, :], t[..., :-1, :]
            labels = None if labels is None else labels[..., 1:]
        if labels is None:
            if self._takes_target:
                raise ValueError(f"labels: {type(self.loss).__name__} wants a label for each row, and there are none")
            return self.loss(s, t) / self.gradient_accumulation_steps
        if self._takes_target:
            return self.loss(s, t, labels, normalizer=num_items_in_batch)
        return self.loss(s, t, mask=labels != self.ignore_index, normalizer=num_items_in_batch)

    def _of_teacher(self, batch: Mapping[str, Any], like: Tensor) -> Tensor:
        """Its logits."""
        teacher, first = self.teacher.eval(), next(self.teacher.parameters(), like)
        if first.device != like.device and not hasattr(teacher, "hf_device_map"):
            teacher.to(like.device)
        given = {name: x for name, x in batch.items() if name not in _OF_THE_LOSS}
        takes = inspect.signature(teacher.forward).parameters
        if not any(x.kind is inspect.Parameter.VAR_KEYWORD for x in takes.values()):
            given = {name: x for name, x in given.items() if name in takes}
        if "use_cache" in takes:  # nothing follows that would read it
            given["use_cache"] = False
        with torch.no_grad():
            return _logits("teacher", teacher(**given)).to(like.device)


def _remembers(loss: TeacherLoss, student: torch.nn.Module) -> Callable[..., None]:
    """A hook that keeps the student's arguments, by their names."""
    signature = inspect.signature(student.forward)

    def hook(_: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        bound = signature.bind_partial(*arguments, **keywords).arguments
        rest = {name for name, x in signature.parameters.items() if x.kind is inspect.Parameter.VAR_KEYWORD}
        batch = {name: x for name, x in bound.items() if name not in rest}
        for name in rest:
            batch.update(bound.get(name, {}))
        loss._batch = batch

    return hook


def _logits(name: str, outputs: Any) -> Tensor:
    """Of what a model returned."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if isinstance(found, tuple | list):  # return_dict=False, without labels
        found = found[0] if found else None
    if not isinstance(found, Tensor):
        raise ValueError(f"{name}: no logits in what it returned, which is {type(outputs).__name__}")
    return found


def _shifts_labels(student: torch.nn.Module) -> bool:
    """As transformers.Trainer asks before it counts labels."""
    if getattr(student, "loss_type", None) is None or getattr(student.config, "is_encoder_decoder", False):
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return LOSS_MAPPING.get(student.loss_type) is ForCausalLMLoss
