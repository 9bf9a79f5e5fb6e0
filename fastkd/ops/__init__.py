"""One file per schedule: fakes, autograd, and the ops of every backend."""

from . import attention, features, relations, rows, standardize

NAMES = (*rows.NAMES, *standardize.NAMES, *relations.NAMES, *features.NAMES, *attention.NAMES)


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known to every schedule."""
    for schedule in (rows, standardize, relations, features, attention):
        schedule.use_namespace(namespace)
