"""Ranks of a process group as threads of this process, so that every backend computes losses of classes that are split.
One of them runs at a time: the kernels that run on the host are not made for two."""

import contextlib
import contextvars
import itertools
import threading
from unittest import mock

import torch
from tolerances import FLOOR, error


class Group:
    """In place of a process group, as fastkd._split_classes.Ranks has it."""

    def __init__(self, size):
        self.size = size
        self.turn, self.barrier = threading.Lock(), threading.Barrier(size)
        self.places = [None] * size
        self.exchanges = []  # the numbers that each rank sent, call by call

    def meet(self):
        self.turn.release()
        try:
            self.barrier.wait(timeout=60)
        finally:
            self.turn.acquire()


_rank = threading.local()


class Ranks:
    def __init__(self, group):
        self.group, self.rank, self.size = group, _rank.number, group.size

    def gathered(self, x):
        group = self.group
        group.places[self.rank] = x.clone()
        if self.rank == 0:
            group.exchanges.append(x.numel())
        group.meet()
        shapes = {tuple(place.shape) for place in group.places}
        assert len(shapes) == 1, f"ranks exchange tensors of several shapes: {shapes}"
        found = torch.stack(group.places)
        group.meet()
        return found

    def sum_(self, x):
        x.copy_(self.gathered(x).sum(0))


@contextlib.contextmanager
def threads():
    """Losses take a Group for a process group here."""
    with (
        mock.patch("fastkd._split_classes.Ranks", Ranks),
        mock.patch("fastkd.ops.group.Ranks", Ranks),
        mock.patch("fastkd.ops.group_forms.Ranks", Ranks),
        mock.patch("fastkd.ops.dist_forms.Ranks", Ranks),
        mock.patch("fastkd._split_samples.Ranks", Ranks),
        mock.patch("fastkd._check.logits.group"),
        mock.patch("fastkd._check.dist.group"),
        mock.patch("fastkd._check.group"),
    ):
        yield


def on_ranks(group, function):
    """function(rank) of all ranks; an error of one of them is raised here."""
    results, errors = [None] * group.size, []

    def run(rank):
        _rank.number = rank
        with group.turn:
            try:
                results[rank] = function(rank)
            except BaseException as error:
                if not isinstance(error, threading.BrokenBarrierError):
                    errors.append(error)
                group.barrier.abort()

    workers = [threading.Thread(target=contextvars.copy_context().run, args=(run, rank)) for rank in range(group.size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return results


def upstream_of(loss):
    """An upstream gradient of which no two rows' are alike."""
    return torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)


def same_bits(x, y):
    """Whether two losses are the same on all ranks; NaN is."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


def of_ranks(loss_function, student, teacher, bounds, group=None, **options):
    """The loss and the student's gradient, by ranks that have some of the classes each. teacher: that of all ranks, or
    a function of a rank's classes."""
    group, grads = group or Group(len(bounds) - 1), {}

    def of_rank(rank):
        classes = slice(bounds[rank], bounds[rank + 1])
        x = student[:, classes].clone().requires_grad_()
        beside = teacher(classes) if callable(teacher) else teacher
        loss = loss_function(x * 1 if options.get("inplace") else x, beside, group=group, **options)
        (grads[rank],) = torch.autograd.grad(loss, x, upstream_of(loss))
        return loss.detach()

    losses = on_ranks(group, of_rank)
    assert all(same_bits(loss, losses[0]) for loss in losses)
    return losses[0], torch.cat([grads[rank] for rank in range(group.size)], 1)


def agree(found, wanted, times=20):
    """Losses and gradients, to some roundings of their dtype."""
    for ours, right in zip(found, wanted, strict=True):
        floor = FLOOR[ours.dtype if ours.dtype.itemsize == 2 else torch.float32]
        assert error(ours, right) <= times * floor


def shards(x, bounds):
    """The classes of each rank."""
    return [x[..., first:last] for first, last in itertools.pairwise(bounds)]


def bounds_of(V, size):
    """Uneven ones."""
    steps = [i + 1 for i in range(size)]
    return [V * sum(steps[:i]) // sum(steps) for i in range(size + 1)]


class _Split(torch.autograd.Function):
    """A loss of whole logits, which ranks compute."""

    @staticmethod
    def forward(ctx, loss_function, group, bounds, options, student, teacher):
        students = [x.detach().clone().requires_grad_(student.requires_grad) for x in shards(student, bounds)]
        teachers = shards(teacher.detach(), bounds)
        inputs = students
        if options.get("inplace"):  # which wants logits that are no leaf
            with torch.enable_grad():
                inputs = [x * 1.0 for x in students]

        def of_rank(rank):
            with torch.enable_grad():
                return loss_function(inputs[rank], teachers[rank], group=group, **options)

        ctx.losses, ctx.students = on_ranks(group, of_rank), students
        first, *others = ctx.losses
        assert all(same_bits(first, x) for x in others), "each rank has another loss"
        return first.detach().clone()

    @staticmethod
    def backward(ctx, upstream):
        grads = [torch.autograd.grad(loss, x, upstream)[0] for loss, x in zip(ctx.losses, ctx.students, strict=True)]
        return None, None, None, None, torch.cat(grads, -1), None


def split(loss_function, group, bounds=None):
    """loss_function(student, teacher, **options), by ranks that have some of the classes each."""

    def of_whole(student, teacher, **options):
        found = bounds or bounds_of(student.shape[-1], group.size)
        return _Split.apply(loss_function, group, found, options, student, teacher)

    return of_whole
