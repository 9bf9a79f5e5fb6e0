"""One file per schedule: fakes, autograd, and the ops of every backend."""

from . import attention, dist, features, relations, rows

NAMES = (*rows.NAMES, *relations.NAMES, *features.NAMES, *attention.NAMES, *dist.NAMES)


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known to every schedule."""
    for schedule in (rows, relations, features, attention, dist):
        schedule.use_namespace(namespace)
