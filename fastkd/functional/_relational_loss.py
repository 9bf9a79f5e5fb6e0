"""What every loss of relations does with its arguments: they are handed to the backend."""

from .. import _backend, _check, _dtensor, reference
from .._dtypes import without_autocast

# What each loss is with its two sides exchanged: the call that gives the teacher its gradient where both learn.
_EXCHANGED = {
    loss: f"{loss}({{}})" for loss in ("rkd_distance", "rkd_angle", "rkd_loss", "similarity_preserving", "gram_mse")
}


def _for_rows(student, *tensors):
    return (_check.for_rows(x, student.shape[:-1]) for x in tensors)


def _relational_loss(name, student, teacher, *options):
    """Hands a relational loss, whose arguments have been checked, to the backend."""
    if _dtensor.given(student, teacher, *options):
        return _dtensor.relational_loss(_relational_loss, name, student, teacher, options)
    if teacher is not None:
        _check.constant_teacher(teacher, name, _EXCHANGED.get(name))
    backend = _backend.select(student.device)
    if backend == "torch":
        with without_autocast(student.device):
            return getattr(reference, name)(student, teacher, *options)
    from ..ops import relations

    return getattr(relations, name)(_backend.namespace(backend), student, teacher, *options)
