"""One file per schedule: fakes, autograd, and the ops of every backend."""

from . import attention, features, head, relations, rows, standardize

NAMES = (*rows.NAMES, *head.NAMES, *standardize.NAMES, *relations.NAMES, *features.NAMES, *attention.NAMES)


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known to every schedule."""
    for schedule in (rows, head, standardize, relations, features, attention):
        schedule.use_namespace(namespace)
