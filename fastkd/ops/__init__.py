"""One file per schedule: fakes, autograd, and the ops of every backend."""

from . import elements, relations, rows

NAMES = (*rows.NAMES, *relations.NAMES, *elements.NAMES)


def use_namespace(namespace):
    """Makes the ops of a namespace, which _library has defined, known to every schedule."""
    for schedule in (rows, relations, elements):
        schedule.use_namespace(namespace)
