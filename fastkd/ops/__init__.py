"""One file per schedule: fakes, autograd, and the ops of every backend."""

from . import attention, features, head, relations, rows

NAMES = (*rows.NAMES, *head.NAMES, *relations.NAMES, *features.NAMES, *attention.NAMES)


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known to every schedule."""
    for schedule in (rows, head, relations, features, attention):
        schedule.use_namespace(namespace)
