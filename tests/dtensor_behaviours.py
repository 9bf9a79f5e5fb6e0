"""What two ranks look at beside values of DTensors: errors, communication, torch.compile."""

import functools

import dtensor_cases
import pytest
import torch
import torch.distributed as dist
from dtensor_heads import SplitHeads
from dtensor_ranks import placed, whole

import fastkd
from fastkd import functional


class Behaviours(SplitHeads):
    """What two ranks look at beside values; each method is a test."""

    def __init__(self, mesh):
        from torch.distributed.tensor import Replicate, Shard

        self.mesh, self.whole, self.split = mesh, [Replicate()], [Shard(0)]
        torch.manual_seed(0)
        self.student, self.teacher = torch.randn(5, 3, 8), torch.randn(5, 3, 8)

    def of(self, x, placements):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x, self.mesh, placements)

    def raises(self, words, function, *arguments, **options):
        with pytest.raises(ValueError, match=words):
            function(*arguments, **options)

    def classes_that_the_teacher_alone_splits_are_an_error(self):
        from torch.distributed.tensor import Shard

        whole, split = self.of(self.student, self.whole), self.of(self.student, [Shard(-1)])
        for loss in ("kl_div", "reverse_kl_div", "js_div", "soft_cross_entropy"):
            function = getattr(functional, loss)
            self.raises(r"^teacher: .*classes that are split over ranks.*full_tensor", function, whole, split)
            maps = self.of(self.student, [Shard(1)])
            self.raises(
                r"^teacher: .*classes that are split.*Shard\(dim=1\)", functools.partial(function, dim=1), whole, maps
            )

    def _of_classes(self, function, student, teacher, dim, **options):
        """Loss and gradient of whole tensors, of DTensors whose classes are split, and of shards with a group."""
        from torch.distributed.tensor import Shard

        chunks = [x.chunk(2, dim)[dist.get_rank()].contiguous() for x in (student, teacher)]
        split = [self.of(x, [Shard(dim)]) for x in (student, teacher)]
        cases = (
            (student, teacher, {}),
            (*split, {}),
            (split[0], teacher, {}),
            (*chunks, {"group": self.mesh.get_group()}),
        )
        for logits, beside, more in cases:
            x = logits.detach().clone().requires_grad_()
            loss = function(x, beside, dim=dim, **options, **more)
            (loss if loss.dim() == 0 else (loss * torch.ones_like(loss).cumsum(0)).sum()).backward()
            grad = x.grad
            if grad.shape != student.shape:  # of a chunk
                parts = [None, None]
                dist.all_gather_object(parts, grad)
                grad = torch.cat(parts, dim)
            yield whole(loss).detach(), whole(grad)

    def classes_that_are_split_by_ranks(self):
        """By a group, and by DTensors, which find theirs themselves: uneven shards, both backends, all kinds of losses."""
        target = torch.arange(15).view(5, 3) % 7
        losses = {
            "kl_div": {},
            "js_div": {"beta": 0.3},
            "negative_log_acceptance": {},
            "kd_loss": {"target": target, "label_smoothing": 0.1},
        }
        student, teacher = torch.randn(5, 3, 7), torch.randn(5, 3, 7)
        for backend in ("cpu", "torch"):
            for name, options in losses.items():
                for reduction in ("none", "batchmean"):
                    with fastkd.backend(backend):
                        function = functools.partial(getattr(functional, name), temperature=2.0, reduction=reduction)
                        (loss, grad), *others = self._of_classes(function, student, teacher, 2, **options)
                    for other, other_grad in others:
                        torch.testing.assert_close(other, loss)
                        torch.testing.assert_close(other_grad, grad)
        (loss, grad), *others = self._of_classes(functional.kl_div, student, teacher, 1)  # maps
        for other, other_grad in others:
            torch.testing.assert_close(other, loss)
            torch.testing.assert_close(other_grad, grad)

    def what_does_not_go_with_classes_that_are_split(self):
        from torch.distributed.tensor import Shard

        split, group = self.of(self.student, [Shard(-1)]), self.mesh.get_group()
        target = torch.zeros(5, 3, dtype=torch.int64)
        self.raises("^return_parts: ", functional.kd_loss, split, split, target, return_parts=True)
        self.raises("^num_classes: ", functional.kl_div, split, split, num_classes=5)
        self.raises("^student: plain tensors, each rank", functional.kl_div, split, self.teacher, group=group)
        given = fastkd.Probabilities(torch.rand(5, 3, 8))
        words = "^group: not with total_variation of Probabilities"
        self.raises(words, functional.total_variation, self.student, given, group=group)
        with pytest.raises(TypeError, match=r"^group: a torch.distributed.ProcessGroup wanted, got str"):
            fastkd.KLDivLoss(group="tensor parallel")
        with pytest.raises(TypeError, match=r"^group: a torch.distributed.ProcessGroup wanted, got int"):
            functional.kl_div(self.student, self.teacher, group=1)
        module = fastkd.KDLoss(group=group)
        loss = module(self.student, self.teacher, target)
        torch.testing.assert_close(loss, functional.kd_loss(self.student, self.teacher, target, group=group))

    def rows_that_are_split_are_an_error_of_dist_loss(self):
        from torch.distributed.tensor import Shard

        whole = self.of(self.student, self.whole)
        for dim in range(self.student.dim()):
            split = self.of(self.student, [Shard(dim)])
            words = ": all rows wanted on every rank, got logits that are split over ranks.*full_tensor"
            if dim < self.student.dim() - 1:
                self.raises(f"^student{words}", functional.dist_loss, split, whole)
            self.raises(f"^teacher{words}", functional.dist_loss, whole, split, dim=1)

    def losses_that_exchange_more_take_classes_that_are_split(self):
        from torch.distributed.tensor import Shard

        target = torch.arange(15).view(5, 3) % self.student.shape[-1]
        for name, options in (
            ("dist_loss", {}),
            ("dist_loss", {"standardize": True, "mask": torch.arange(3) != 1}),
            ("adaptive_kl_div", {}),
            ("dkd_loss", {"target": target}),
            ("nkd_loss", {"target": target}),
            ("js_div", {"standardize": True, "reduction": "none"}),
        ):
            for inplace in (False, True):
                found = []
                for split in (False, True):
                    x, t = self.student.clone(), self.teacher
                    if split:
                        x, t = (self.of(y, [Shard(-1)]) for y in (x, t))
                    x.requires_grad_()
                    loss = getattr(functional, name)(x * 1 if inplace else x, t, inplace=inplace, **options)
                    (whole(loss) if loss.dim() == 0 else loss.sum()).backward()
                    found.append((whole(loss).detach(), whole(x.grad)))
                for x, y in zip(*found, strict=True):
                    torch.testing.assert_close(x, y)

    def heads_in_place_of_logits_have_plain_hidden_states(self):
        """What such heads learn: tests/test_sharded_heads.py."""
        hidden, weight = torch.randn(5, 3, 6), torch.randn(self.teacher.shape[-1], 6)
        form = fastkd.LinearLogits
        for head in (weight, self.of(weight, self.whole)):
            bad = form(self.of(hidden, self.split), head)
            self.raises("^student: LinearLogits of plain tensors.*full_tensor", functional.kl_div, bad, self.teacher)
            self.raises("^teacher: LinearLogits of plain tensors", functional.kl_div, self.student, bad)
            loss = functional.kl_div(self.student, form(hidden, head))
            torch.testing.assert_close(loss, functional.kl_div(self.student, form(hidden, weight)))
        student = self.of(self.student, self.split)
        self.raises("^student, teacher: beside LinearLogits", functional.kl_div, student, form(hidden, weight))

    def features_that_are_split_are_an_error(self):
        from torch.distributed.tensor import Shard

        whole, split = self.of(self.student, self.whole), self.of(self.student, [Shard(2)])
        for loss in (functional.feature_mse, functional.feature_smooth_l1, functional.feature_cosine):
            self.raises("^student: .*features that are split over ranks", loss, split, whole)
            self.raises("^teacher: .*features that are split over ranks", loss, [whole], [split])
        maps = [torch.randn(4, 4, 4, 4) for _ in range(2)]
        for dim in (1, 2, 3):
            split = self.of(maps[0], [Shard(dim)])
            self.raises("^student: .*maps that are split", functional.attention_transfer, split, maps[1])
        self.raises("^student: .*features that", functional.feature_mse, self.of(maps[0], [Shard(1)]), maps[1])

    def samples_that_are_split_are_an_error_of_every_relation(self):
        whole, split = (self.of(self.student[:, 0], placements) for placements in (self.whole, self.split))
        for loss in dict.fromkeys(case.loss for case in dtensor_cases.relational_cases()):
            function = getattr(functional, loss)
            self.raises("^student: .*samples that are split over ranks.*full_tensor", function, split, whole)
            self.raises("^teacher: .*samples that are split over ranks.*full_tensor", function, whole, split)
        keys = {"student_keys": split, "teacher_keys": whole}
        self.raises("^student_keys: .*samples that are split", functional.relation_kl, whole, whole, **keys)

    def layers_that_are_split_otherwise_are_an_error(self):
        students = [self.of(self.student, placements) for placements in (self.whole, self.split)]
        teachers = [self.teacher, self.teacher]
        self.raises(
            "^student: layers that the same dimensions of the mesh split", functional.feature_mse, students, teachers
        )

    def a_plain_shard_is_an_error(self):
        student, rank = self.of(self.student, self.split), self.mesh.get_rank()
        shard = self.teacher.chunk(2)[rank]
        counts_as_whole = "Beside DTensors a plain tensor counts as whole"
        self.raises(f"^teacher: .*{counts_as_whole}", functional.kl_div, student, shard)
        self.raises(f"^teacher: .*{counts_as_whole}", functional.feature_mse, student, shard)
        self.raises(f"^teacher: .*{counts_as_whole}", functional.feature_mse, [student], [shard])
        teacher = self.of(self.teacher, self.split)
        self.raises(f"^teacher: .*{counts_as_whole}", functional.kl_div, self.student.chunk(2)[rank], teacher)
        mask = torch.ones(shard.shape[:-1], dtype=torch.bool)
        for loss in (functional.kl_div, functional.feature_mse):
            self.raises(f"^mask: .*{counts_as_whole}", loss, student, self.teacher, mask=mask)
            self.raises(f"^weight: .*{counts_as_whole}", loss, student, self.teacher, weight=mask.float())
        self.raises("^temperature: .*counts", functional.kl_div, student, self.teacher, temperature=mask + 1.0)

    def a_plain_mask_that_may_be_a_shard_is_an_error(self):
        student, teacher = (
            self.of(self.student[:3, 0], self.split),
            self.teacher[:3, 0],
        )  # of three rows one rank has one
        for loss in (functional.kl_div, functional.feature_mse):
            mask = torch.ones(1, dtype=torch.bool)
            self.raises("^mask: .*may as well be what one rank has", loss, student, teacher, mask=mask)
            assert whole(loss(student, teacher, mask=mask[0])).isfinite()
        student, teacher = self.of(self.student[:4, 0], self.split), self.teacher[:4, 0]  # none has
        assert whole(functional.kl_div(student, teacher, mask=torch.ones(1, dtype=torch.bool))).isfinite()

    def errors_of_whole_tensors_are_raised_on_every_rank(self):
        student, teacher = self.of(self.student[:1], self.split), self.of(self.teacher[:1], self.split)
        for loss in (functional.kl_div, functional.feature_mse):
            self.raises("^normalizer: 0 is wanted only where", loss, student, teacher, normalizer=0)
            self.raises("^reduction: one of", loss, student, teacher, reduction="average")
        self.raises("^teacher: the student's shape", functional.kl_div, student, self.of(self.teacher, self.split))
        self.raises("^teacher: no gradient flows to it", functional.kl_div, student, teacher.clone().requires_grad_())
        broken = self.student[:, 0].clone()
        broken[0] = torch.nan
        self.raises("^student: finite", functional.rkd_distance, self.of(broken, self.whole), self.teacher[:, 0])
        both = self.of(self.student[:, 0], self.whole), self.teacher[:, 0]
        keys = {"student_keys": both[0], "teacher_keys": self.of(broken, self.whole)}
        self.raises("^teacher_keys: finite", functional.relation_kl, *both, **keys)
        negative = self.of(-torch.ones(5), self.split)
        self.raises("^temperature: positive", functional.relation_kl, *both, temperature=negative)
        self.raises("^teacher_temperature: positive", functional.relation_kl, *both, teacher_temperature=negative)
        self.raises("^temperature: positive", functional.kl_div, *both, temperature=negative)

    def one_mesh_is_wanted(self):
        other = dist.init_device_mesh("cpu", (2, 1))
        from torch.distributed.tensor import Replicate, distribute_tensor

        student, teacher = self.of(self.student, self.whole), distribute_tensor(self.teacher, other, [Replicate()] * 2)
        for loss in (functional.kl_div, functional.feature_mse):
            self.raises("^teacher: all DTensors on one mesh", loss, student, teacher)
        flat = student[:, 0], teacher[:, 0]
        self.raises("^teacher: all DTensors on one mesh", functional.rkd_distance, *flat)

    def a_loss_that_is_endless_or_no_number_is_so_on_every_rank(self):
        for value in (torch.inf, torch.nan):
            student, teacher = self.student.clone(), self.teacher.clone()
            student[4, 0, 0], teacher[4, 0, 0] = -torch.inf, 0.0 if value == torch.inf else torch.nan  # of one rank
            loss = functional.kl_div(self.of(student, self.split), self.of(teacher, self.split))
            torch.testing.assert_close(whole(loss), torch.tensor(value), equal_nan=True)

    def backward_of_logits_communicates_nothing(self):
        from torch.distributed.tensor.debug import CommDebugMode

        student = self.of(self.student, self.split).requires_grad_()
        teacher, mask = self.of(self.teacher, self.split), self.of(torch.rand(5, 3) < 0.5, self.split)
        with CommDebugMode() as forward:
            loss = functional.kl_div(student, teacher, mask=mask)
        assert forward.get_total_counts() == 2  # numbers: of rows, and the loss
        with CommDebugMode() as backward:
            loss.backward()
        assert backward.get_total_counts() == 0
        student, teacher = self.of(self.student, self.whole).requires_grad_(), self.of(self.teacher, self.whole)
        with CommDebugMode() as replicated:
            functional.kl_div(student, teacher).backward()
        assert replicated.get_total_counts() == 0

    def what_comes_from_above_may_be_pending(self):
        """A loss times something that is split: the gradient of the loss is a sum over ranks."""
        rows = torch.rand(5)
        for loss in (functional.kl_div, functional.feature_mse):
            student, expected = (
                self.of(self.student, self.split).requires_grad_(),
                self.student.clone().requires_grad_(),
            )
            (loss(student, self.teacher) * self.of(rows, self.split)).sum().backward()
            (loss(expected, self.teacher) * rows).sum().backward()
            torch.testing.assert_close(whole(student.grad), expected.grad)

    def logits_that_overwrites_a_loss_are_not_differentiated_again(self):
        leaf = self.of(self.student, self.split).requires_grad_()
        logits = leaf * 2
        used = logits * logits
        functional.kl_div(logits, self.teacher, inplace=True)
        with pytest.raises(RuntimeError, match="wrote its gradient over these logits"):
            logits.sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            used.sum().backward()
        self.raises("^inplace: .*overwritten by a loss", functional.kl_div, logits, self.teacher, inplace=True)
        self.raises("^inplace: .*are a leaf", functional.kl_div, leaf, self.teacher, inplace=True)

    def modules_take_them(self):
        student, teacher = (self.of(x, self.split) for x in (self.student, self.teacher))
        torch.testing.assert_close(
            whole(fastkd.KLDivLoss(temperature=2.0)(student, teacher)),
            fastkd.KLDivLoss(temperature=2.0)(self.student, self.teacher),
        )
        hint = fastkd.LinearFeatureMSELoss(8, 8)
        hint(student, teacher).backward()
        expected = fastkd.LinearFeatureMSELoss(8, 8)
        expected.load_state_dict(hint.state_dict())
        expected(self.student, self.teacher).backward()
        torch.testing.assert_close(hint.projector.weight.grad, expected.projector.weight.grad)

    def every_backend_computes_them(self):
        import conftest

        student, teacher = self.student[..., :4].contiguous(), self.teacher[..., :4].contiguous()
        for name in conftest.BACKENDS:
            with conftest.use(name):
                for loss in (functional.kl_div, functional.feature_mse):
                    x = self.of(student, self.split).requires_grad_()
                    found = loss(x, self.of(teacher, self.split))
                    found.backward()
                    expected = student.clone().requires_grad_()
                    wanted = loss(expected, teacher)
                    wanted.backward()
                    torch.testing.assert_close(whole(found.detach()), wanted.detach())
                    torch.testing.assert_close(whole(x.grad), expected.grad)
                    x.grad = None
                    found = loss(x, teacher, mask=torch.zeros(5, 1, dtype=torch.bool))
                    found.backward()
                    assert whole(found) == 0
                    assert not whole(x.grad).any()
                x = self.of(student[:, 0], self.whole).requires_grad_()
                functional.rkd_distance(x, self.of(teacher[:, 0], self.whole)).backward()
                assert whole(x.grad).isfinite().all()

    def they_are_traced_by_torch_compile(self):
        student, teacher, mask = self.student, self.teacher, torch.rand(5, 3) < 0.5
        for loss in (functional.kl_div, functional.feature_mse):
            torch._dynamo.reset()
            compiled = torch.compile(
                lambda *x, loss=loss: loss(x[0], x[1], mask=x[2]), fullgraph=True, backend="aot_eager"
            )
            x = self.of(student, self.split).requires_grad_()
            found = compiled(x, self.of(teacher, self.split), self.of(mask, self.split))
            found.backward()
            expected = student.clone().requires_grad_()
            loss(expected, teacher, mask=mask).backward()
            torch.testing.assert_close(whole(found.detach()), loss(student, teacher, mask=mask))
            torch.testing.assert_close(whole(x.grad), expected.grad)

    def what_another_operation_has_not_received_yet_is_waited_for(self):
        from torch.distributed.tensor import Partial, Replicate

        student = placed(self.mesh, self.student, "P")
        assert student.placements == (Partial(),)
        student = student.redistribute(placements=[Replicate()], async_op=True).requires_grad_()
        teacher = self.of(self.teacher, self.split).redistribute(placements=[Replicate()], async_op=True)
        loss = functional.kl_div(student, teacher)
        loss.backward()
        expected = self.student.clone().requires_grad_()
        wanted = functional.kl_div(expected, self.teacher)
        wanted.backward()
        torch.testing.assert_close(whole(loss.detach()), wanted.detach())
        torch.testing.assert_close(whole(student.grad), expected.grad)


_METHODS = {**vars(SplitHeads), **vars(Behaviours)}
BEHAVIOURS = [name for name in _METHODS if name[0] != "_" and name not in ("of", "raises")]
