"""One file per schedule: fakes, autograd, and the ops of every backend."""

from . import attention, complement, dist, features, head, relations, rows, standardize

SCHEDULES = (rows, head, standardize, complement, dist, relations, features, attention)
NAMES = tuple(name for schedule in SCHEDULES for name in schedule.NAMES)


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known to every schedule."""
    for schedule in SCHEDULES:
        schedule.use_namespace(namespace)
