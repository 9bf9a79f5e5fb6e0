"""What two ranks look at of heads whose classes are split: a part of dtensor_behaviours.py."""

import functools

import torch
import torch.distributed as dist
from dtensor_ranks import whole

import fastkd
from fastkd import functional


class SplitHeads:
    """Each method is a test."""

    def heads_whose_classes_are_split(self):
        """By a group; by DTensors beside it; and by hidden states that are DTensors, which find their group."""
        from torch.distributed.tensor import Shard

        hidden, weight, bias = torch.randn(5, 3, 6), torch.randn(7, 6), torch.randn(7)
        teacher, group, form = torch.randn(5, 3, 7), self.mesh.get_group(), fastkd.LinearLogits
        target = torch.arange(15).view(5, 3) % 7

        def chunk(x, dim=0):
            return x.chunk(2, dim)[dist.get_rank()].contiguous()

        def placed(x, *placements):
            return self.of(x, list(placements))

        def results(loss_function, tensors, beside, **options):
            leaves = [x.detach().clone().requires_grad_() for x in tensors]
            loss = loss_function(form(*leaves), beside, **options)
            (loss if loss.dim() == 0 else (loss * torch.ones_like(loss).cumsum(0)).sum()).backward()
            whole_grads = []
            for x, of_whole in zip(leaves, (hidden, weight, bias), strict=True):
                grad = whole(x.grad)
                if grad.shape != of_whole.shape:
                    parts = [None, None]
                    dist.all_gather_object(parts, grad)
                    grad = torch.cat(parts)
                whole_grads.append(grad)
            return whole(loss).detach(), *whole_grads

        split = placed(weight, Shard(0)), placed(bias, Shard(0))
        replicated = placed(hidden, *self.whole)
        few = fastkd.TopKLogProbs(*teacher.log_softmax(-1).topk(3)[::-1])
        q = teacher.softmax(-1)
        mine, double = chunk(teacher, -1), form(hidden, weight * 2)
        cases = (
            ((hidden, chunk(weight), chunk(bias)), mine, teacher, {"group": group}),
            ((hidden, *split), mine, teacher, {"group": group}),
            ((replicated, *split), mine, teacher, {"group": group}),
            ((replicated, *split), placed(teacher, Shard(-1)), teacher, {}),
            ((replicated, *split), form(replicated, placed(weight * 2, Shard(0))), double, {}),
            ((hidden, *split), few, few, {"group": group}),
            ((replicated, *split), few, few, {}),
            ((hidden, *split), fastkd.Probabilities(chunk(q, -1)), fastkd.Probabilities(q), {"group": group}),
        )
        for name, options in (("kl_div", {}), ("js_div", {"reduction": "none"}), ("kd_loss", {"target": target})):
            for backend in ("cpu", "torch"):
                loss_function = functools.partial(getattr(functional, name), **options)
                for tensors, beside, of_whole, more in cases:
                    expected = results(loss_function, (hidden, weight, bias), of_whole)
                    with fastkd.backend(backend):
                        found = results(loss_function, tensors, beside, **more)
                    for x, y in zip(found, expected, strict=True):
                        torch.testing.assert_close(x, y)
        loss = functional.kl_div(form(replicated, *split), placed(teacher, Shard(-1)))
        assert loss.placements == tuple(self.whole)
        self.raises(
            "^teacher: beside a head whose classes are split", functional.kl_div, form(replicated, *split), teacher
        )
        bad = form(placed(hidden, Shard(0)), *split)
        self.raises(
            "^student: a head whose classes are split over the group", functional.kl_div, bad, teacher, group=group
        )

        alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
        given = form(replicated, *split), chunk(teacher, -1)
        self.raises("^student: a head whose classes are split over the group", functional.kl_div, *given, group=alone)
        given = chunk(teacher, -1), form(replicated, *split)
        self.raises("^teacher: a head whose classes are split over the group", functional.kl_div, *given, group=alone)

    def heads_beside_logits_in_place(self):
        from torch.distributed.tensor import Shard

        hidden, weight, logits = torch.randn(5, 6), torch.randn(7, 6), torch.randn(5, 7)
        teacher = fastkd.LinearLogits(self.of(hidden, self.whole), self.of(weight, [Shard(0)]))
        x = logits.clone().requires_grad_()
        functional.kl_div(x, fastkd.LinearLogits(hidden, weight)).backward()
        student = self.of(logits, [Shard(-1)]).requires_grad_()
        functional.kl_div(student * 1, teacher, inplace=True).backward()
        torch.testing.assert_close(whole(student.grad), x.grad)

    def heads_whose_classes_are_split_compile(self):
        hidden, weight, group = torch.randn(5, 6), torch.randn(8, 6), self.mesh.get_group()
        own = weight.chunk(2)[dist.get_rank()].contiguous()
        teacher = torch.randn(5, 8).chunk(2, -1)[dist.get_rank()].contiguous()

        def loss_of(hidden, own):
            student = fastkd.LinearLogits(hidden * 2, own)
            return functional.kl_div(student, teacher, group=group) + functional.js_div(student, teacher, group=group)

        def of_others(hidden, own):
            student = fastkd.LinearLogits(hidden * 2, own)
            losses = [functional.kl_div(student, x, group=group) for x in others]
            losses.append(functional.dist_loss(student, teacher, group=group))
            losses.append(functional.dkd_loss(student, teacher, torch.arange(5), group=group))
            losses.append(functional.adaptive_kl_div(student, teacher, standardize=True, group=group))
            return sum(losses)

        few = fastkd.TopKLogProbs(*torch.randn(5, 8).log_softmax(-1).topk(3)[::-1])
        others = few, fastkd.Probabilities(teacher.softmax(-1))
        compiled = torch.compile(lambda *x: loss_of(*x) + of_others(*x), fullgraph=True, backend="aot_eager")
        found = []
        for function in (lambda *x: loss_of(*x) + of_others(*x), compiled):
            leaves = [x.clone().requires_grad_() for x in (hidden, own)]
            loss = function(*leaves)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y)
