"""Faults that the tests must find, planted one at a time: ``make mutations``.

A fault is a text and what stands in its place; each is of a kind that has been made, or is easily made, in that place.
They are planted in a copy of the sources, in build/mutations, whose libraries are built again where C++ has changed:
for one instruction set of the CPU, as all of them are compiled from the same text.
``--part all`` runs the tests of every combination of parameters in place of those that cover all pairs: what they find
and the others do not is what the smaller suite costs.

    python tests/mutations.py                 all of them
    python tests/mutations.py --only pairs    those with pairs in their name
    python tests/mutations.py --list          their names
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutations"


class Mutation(NamedTuple):
    name: str
    path: str
    text: str
    instead: str
    first: str  # where to look first: the files of tests that are about it; if none fails, all are run


ROWS = "tests/test_rows.py tests/test_rows_edges.py tests/test_rows_gradients.py tests/test_rows_parameters.py"
STANDARDIZE = "tests/test_standardize.py"
LINEAR = "tests/test_linear_logits.py tests/test_linear_logits_errors.py"
TOP_K = "tests/test_top_k.py tests/test_top_k_ignore.py tests/test_top_k_errors.py"
PROBABILITIES = "tests/test_probabilities.py tests/test_probabilities_errors.py"
TARGETS = "tests/test_targets.py"
GROUP = "tests/test_group.py"
HEADS = "tests/test_group_heads.py"
GROUP_LOGITS = "tests/test_group_logits.py"
PARTED = "tests/test_parted_targets.py"
BEYOND = "tests/test_beyond_kl.py"
RELATIONS = "tests/test_relations.py tests/test_relations_gradients.py tests/test_row_options.py"
FEATURES = "tests/test_features.py tests/test_attention.py"
DIST = "tests/test_dist.py tests/test_dist_gradients.py tests/test_dist_errors.py"
PARTS = "tests/test_kd_parts.py"
NUM_CLASSES = "tests/test_num_classes.py"
MUTATIONS = [
    # functors, of the CPU and CUDA
    Mutation("functor: KL's far form without its first-order term", "csrc/math/divergences/kl_div.h",
             "const T far = (e.p - e.q) - e.q * e.w;", "const T far = -e.q * e.w;", ROWS),
    Mutation("functor: reverse KL's series has the other sign", "csrc/math/divergences/reverse_kl_div.h",
             "e.p * (e.w * e.w * bregman_series(-e.w))", "e.p * (e.w * e.w * bregman_series(e.w))", ROWS),
    Mutation("functor: js_div takes the other side's share", "csrc/math/divergences/js_div.h",
             "student_larger ? beta * (e.q - e.p) : rest * (e.p - e.q)", "student_larger ? rest * (e.q - e.p) : beta * (e.p - e.q)",
             ROWS),
    Mutation("functor: a row's beta of 1 is one of 0", "csrc/math/divergences/js_div.h",
             "using AtOne = ReverseKL<T>;", "using AtOne = ForwardKLEnd<T>;", ROWS),
    Mutation("functor: alpha_beta_div's series without the powers of beta", "csrc/math/divergences/alpha_beta_div.h",
             "products = products * (alpha + beta) + power;", "products = products * (alpha + beta);", BEYOND),
    Mutation("head: its limit is a share of nothing", "csrc/math/head.h",
             "return uint64_t(mu * double(total));", "return uint64_t(mu) * total;", "tests/test_adaptive.py"),
    Mutation("cpu head: the head counts for the tail as well", "csrc/cpu/head_kernel.cpp",
             "in_tail += teacher[i] > bound ? T(0) : of_class;", "in_tail += of_class;", "tests/test_adaptive.py"),
    Mutation("functor: rkd_distance forgets that the mean has a gradient", "csrc/math/relation.h",
             "slope_mean_ = T(sums.slope / options.pairs());", "slope_mean_ = T(0);", RELATIONS),
    Mutation("functor: the variance's epsilon", "csrc/math/feature.h",
             "kVarianceEpsilon = 1e-6", "kVarianceEpsilon = 1e-5", FEATURES),
    Mutation("functor: smooth L1 is steeper than 1", "csrc/math/feature.h",
             "u = T(0.5) < u ? T(0.5) : u;", "u = T(0.75) < u ? T(0.75) : u;", FEATURES),
    Mutation("functor: columns that are added up keep their means", "csrc/math/correlation.h",
             "const double p = x.mean - mean,", "const double p = 0 * mean,", DIST),
    Mutation("functor: a lesser teacher's rows have the slopes of near ones", "csrc/math/correlation.h",
             "if (!(m.DD < a * b / 2)) return", "if (false) return", DIST),
    # schedules of the CPU
    Mutation("cpu parts: an entropy without the logarithm of its sum", "csrc/cpu/rows_parts.cpp",
             "std::log(sum) + terms * inv_temperature / sum", "terms * inv_temperature / sum", PARTS),
    Mutation("cpu parts: of equal classes the last is the best", "csrc/cpu/rows_parts.cpp",
             "const T* z = load_block(logits, row, chunk, n, buffer);\n    for (int64_t i = 0; i < n; ++i) {\n      if (z[i]", "const T* z = load_block(logits, row, chunk, n, buffer);\n    for (int64_t i = n - 1; i >= 0; --i) {\n      if (z[i]", PARTS),
    Mutation("cpu parts: the soft part without T^2", "csrc/cpu/rows_lanes.h",
             "P.parts[row].soft = soft * squared(P, row);", "P.parts[row].soft = soft;", PARTS),
    Mutation("python parts: a soft part of weight 0 is what the kernels leave", "fastkd/ops/rows.py",
             "parts_too = options.return_parts and options.soft_weight != 0", "parts_too = options.return_parts", PARTS),
    Mutation("python heads: a softcap has no slope", "fastkd/ops/_head_products.py",
             "            grad.addcmul_(grad, logits.square_()", "            _ = (grad, logits.square_()", LINEAR),
    Mutation("python heads: the weight's gradient is that of the last slab", "fastkd/ops/_head_products.py",
             "of_weight, self.slabs > 1)", "of_weight, False)", LINEAR),
    Mutation("python heads: hidden states of masked rows reach the weight", "fastkd/ops/_head_products.py",
             "        if mask is not None:\n            self.hidden", "        if False:\n            self.hidden", LINEAR),
    Mutation("python heads: the bias is not scaled", "fastkd/ops/_head_products.py",
             "out.add_(self.bias, alpha=self.scale)", "out.add_(self.bias)", LINEAR),
    Mutation("cpu top-k: the bucket has the teacher's classes as well", "csrc/cpu/complement_kernel.cpp",
             "buffer[before = i] = -kInf<T>;", "before = i;", TOP_K),
    Mutation("cpu top-k: the bucket's gradient is all of its classes'", "csrc/common/complement_params.h",
             "return sum == 0 ? 0 : upstream / sum;", "return sum == 0 ? 0 : upstream;", TOP_K),
    Mutation("cpu top-k: masked rows pass on what they hold", "csrc/cpu/complement_kernel.cpp",
             "const bool counts = !P.rows.mask || P.rows.mask[row];", "const bool counts = true;", TOP_K),
    Mutation("cpu top-k: a block of larger logits forgets those before", "csrc/cpu/complement_kernel.cpp",
             "total *= total == 0 ? 0 : rebase(max, double(own), inverse);", "total = 0;", TOP_K),
    Mutation("cuda top-k: classes that share a bit count as known", "csrc/cuda/complement_kernel.cuh",
             "found = indices[k] == v + i;", "found = true;", TOP_K),
    Mutation("cuda top-k: the hard loss has no gradient at the teacher's classes", "csrc/cuda/complement_kernel.cuh",
             "if (addend) g += load_one", "if (false) g += load_one", TOP_K),
    Mutation("triton top-k: the teacher's classes have the bucket's gradient", "fastkd/triton/complement.py",
             "tl.store(grad[:, None] + classes * grad_step, g.to", "tl.store(grad[:, None] + classes * grad_step, 0.0 * g.to", TOP_K),
    Mutation("python top-k: what pads is a class", "fastkd/ops/top_k.py",
             "known = self.z.gather(-1, self.at).double().masked_fill(self.pad, -torch.inf)",
             "known = self.z.gather(-1, self.at).double()", TOP_K),
    Mutation("python top-k: what is raised from below has a gradient", "fastkd/ops/top_k.py",
             "slope.masked_fill(low, 0)", "slope", TOP_K),
    Mutation("python top-k: of an ignored tail all classes are the K", "fastkd/ops/top_k.py",
             "out.grad.copy_(weights.gradient(log_p, slope))", "out.grad.copy_(weights.gradient(log_p, slope) * 0 + slope)", TOP_K),
    Mutation("python probabilities: their sum is 1", "fastkd/ops/probabilities.py",
             "self.mass = _sum(q) if same else", "self.mass = _sum(q) * 0 + 1 if same else", PROBABILITIES),
    Mutation("python probabilities: the hard loss has the sum for a weight", "fastkd/ops/teachers.py",
             "weight = (ones if part.weight is None else part.weight) * soft_weight", "weight = (ones if part.weight is None else part.weight)", PROBABILITIES),
    Mutation("python probabilities: a mixture keeps its shares", "fastkd/_masses.py",
             "torch.where(is_reverse, 1.0, _over(beta * S, M).clamp(max=1 - torch.finfo(S.dtype).eps / 2))", "torch.where(is_reverse, 1.0, beta)",
             PROBABILITIES),
    Mutation("python probabilities: nkd_loss softens its hard part", "fastkd/ops/probabilities.py",
             "same = self.own == 1  # where its hard part is", "pass", PROBABILITIES),
    Mutation("python probabilities: rows that do not count have a sum", "fastkd/ops/probabilities.py",
             "        if part.mask is not None:  # of rows", "        if False:  # of rows", PROBABILITIES),
    Mutation("python dist of heads: a column's means are those of the last slab", "fastkd/ops/dist_forms.py",
             "(z + y * share for y, z in", "(z + y for y, z in", "tests/test_dist_forms.py"),
    Mutation("python dist of heads: rows that do not count are in the columns", "fastkd/ops/dist_forms.py",
             "None if mask is None else mask[:, None])", "None)", "tests/test_dist_forms.py"),
    Mutation("python heads: a sharded head's gradient is the sum over ranks", "fastkd/_sharded_heads.py",
             "return grad / ctx.ranks, None", "return grad, None", "tests/test_sharded_heads.py"),
    Mutation("terms: a slope without the mixture's own", "fastkd/_terms.py",
             "inside = Terms(f, f + (1 - alpha) * p * _over(q, m))", "inside = Terms(f, f + p * _over(q, m))", TOP_K),
    Mutation("python num_classes: other classes have the gradient that memory held", "fastkd/ops/rows.py",
             "        grad[..., num_classes:].zero_()\n", "        pass\n", NUM_CLASSES),
    Mutation("cpu dist: classes that are not there differ from the mean", "csrc/cpu/dist_kernel.cpp",
             "const T less = i < n ? mean : T(0);", "const T less = mean;", DIST),
    Mutation("cpu dist: a chunk begins again in every group of rows", "csrc/cpu/dist_kernel.cpp",
             "chunk.count + i == 0, chunk)", "i == 0, chunk)", DIST),
    Mutation("cpu rows: a masked row has the gradient that its memory held", "csrc/cpu/rows_kernel.cpp",
             "      zero_grad(P, row, 0, blocks);\n      continue;", "      continue;", ROWS),
    Mutation("cpu rows: a student without a class has a finite loss", "csrc/cpu/rows_kernel.cpp",
             "if (stats.sum_student == 0) loss = kInf<double>;", "", ROWS),
    Mutation("cpu lanes: runs but the first are not computed", "csrc/cpu/rows_groups.h",
             "const int64_t run = group / in_run * inner, begin", "const int64_t run = group / in_run * 0, begin", ROWS),
    Mutation("cpu lanes: a row's infinite slopes have a gradient", "csrc/cpu/rows_lanes.cpp",
             "if (!D::kCentred && no_gradient(group.stats(i))) second.keep(i, false);", "", ROWS),
    Mutation("cpu lanes: rows that differ in beta are computed with one", "csrc/cpu/rows_kernel.h",
             "if (!(x[row] == x[begin])) return false;", "", ROWS),
    Mutation("cpu rows: the rate that is accepted divides no gradient", "csrc/cpu/rows_math.h",
             "if (kTwoSums<D>) k.grad *= stats.factor;", "", BEYOND),
    Mutation("cpu lanes: coins are shifted by the row's maximum", "csrc/cpu/rows_math.h",
             "if constexpr (kGiven == Given::kLogOdds) return z * inv_temperature;",
             "if constexpr (kGiven == Given::kLogOdds) return (z - max) * inv_temperature;", BEYOND),
    Mutation("cpu pairs: weights of the columns are those of the rows", "csrc/cpu/pairs.cpp",
             "half_weights_ ? half_weights_.get() + bj.begin : nullptr", "half_weights_ ? half_weights_.get() + bi.begin : nullptr",
             RELATIONS),
    Mutation("cpu pairs: two blocks meet in one order alone", "csrc/cpu/pairs.cpp",
             "if (i != j) add_product(j, W.transposed(), i, column, beta);", "", RELATIONS),
    Mutation("cpu triplets: a threshold that is met counts", "csrc/cpu/triplet_kernel.cpp",
             "a[r + half - 1] <= d[k] ? half : 0", "a[r + half - 1] < d[k] ? half : 0", "tests/test_triplet.py"),
    Mutation("cpu samples: a row's own weight is that of all its pairs", "csrc/cpu/samples_kernel.cpp",
             "v = kWeighted ? half_i + half[j] : T(1)", "v = kWeighted ? 2 * half_i : T(1)", RELATIONS + " tests/test_gram.py"),
    Mutation("cpu samples: similarity's gradient goes to one side", "csrc/cpu/samples.cpp",
             "if (in_.save) symmetrize(G, N_);", "", RELATIONS),
    Mutation("cpu samples: sums of similarities have no gradient", "csrc/cpu/samples.cpp",
             "kernel_.subtract(G + i * N_, N_, q[i], q.data());", "(void)q;", RELATIONS + " tests/test_pkt.py"),
    Mutation("cpu samples: the length of a row has no gradient", "csrc/cpu/samples_kernel.cpp",
             "row.ratio == 0 ? 0 : row.ratio * dot(g, u, D)", "0", RELATIONS + " tests/test_pkt.py"),
    Mutation("cpu targets: blocks keep their own maximum", "csrc/cpu/rows_kernel.cpp",
             "out.sum_hard += k.sum_hard * rebase(k.max_student, out.max_student, 1.0);", "out.sum_hard += k.sum_hard;", TARGETS),
    Mutation("cpu targets: a smoothed label is a whole one in the gradient", "csrc/cpu/rows_math.h",
             "T(scale * (1 - smoothing))};", "T(scale)};", TARGETS),
    Mutation("cpu targets: the cube is a square", "csrc/cpu/rows_math.h",
             "return x * x * x;", "return x * x;", TARGETS),
    Mutation("cpu targets: lanes of several temperatures take the first one's power", "csrc/cpu/rows_lanes.h",
             "power = P.temperature[row] == P.temperature[begin] || P.hard.loss == TargetLoss::kDecoupled ? power : 0;", "", TARGETS),
    Mutation("cpu parted targets: the target is one of the other classes", "csrc/cpu/rows_chunks.h",
             "memory[target] = -kInf<T>;", "", PARTED),
    Mutation("cpu parted targets: a normalized loss takes the teacher's target at T", "csrc/cpu/rows_math.h",
             "inv_teacher = decoupled ? r.inv_teacher_temperature : 1;", "inv_teacher = r.inv_teacher_temperature;", PARTED),
    Mutation("functor: the gradient of a parted target has the other sign", "csrc/math/two_classes.h",
             "return {k.loss(), -k.slope()};", "return {k.loss(), k.slope()};", PARTED),
    Mutation("standardize: the deviation has no gradient", "csrc/common/standardize_params.h",
             "deviation == 0 ? 0 : 1 / ((count - 1)", "deviation >= 0 ? 0 : 1 / ((count - 1)", STANDARDIZE),
    Mutation("standardize: the variance is that of all classes", "csrc/cpu/standardize_kernel.cpp",
             "left / (count - 1)", "left / count", STANDARDIZE),
    Mutation("standardize: the hard loss sees standardized logits", "fastkd/ops/standardize.py",
             'room.of("hard", call.student).copy_(call.student)', 'room.of("hard", call.student).copy_(room.of("student", call.student))',
             STANDARDIZE),
    Mutation("checks: a masked row's target is looked at", "fastkd/_check/logits.py",
             "wrong = wrong & mask_", "pass", TARGETS),
    Mutation("dtensor: ignored rows of other ranks count", "fastkd/_dtensor.py",
             "valid = _whole(mesh, options.target) != options.ignore_index", "valid = _whole(mesh, options.target) != -7",
             "tests/test_dtensor.py"),
    # schedules of CUDA, run as host code
    Mutation("cuda rows: a row's edges are left out of its sums", "csrc/cuda/rows_kernel.cuh",
             "    add<T, 1, D::kTeacherEntropy, kParted>(own.sums, hard_sums, s1, t1, r, P.hard);\n", "", ROWS),
    Mutation("cuda targets: sums of a thread keep its own maximum", "csrc/cuda/rows_kernel.cuh",
             "    hard_sums = rebased<kParted>(hard_sums, own.sums, k);\n", "", TARGETS),
    Mutation("cuda targets: smoothed labels of classes that are not there", "csrc/cuda/rows_targets.cuh",
             "hard.logits += i < count ? s[i] - sums.max_student : T(0);", "hard.logits += s[i] - sums.max_student;", TARGETS),
    Mutation("cuda targets: a row without a soft gradient has none at all", "csrc/cuda/rows_split.cuh",
             "if (write) hard_grad<kParted>(P, L, slice.begin + rank, slice.end, threads, slice.edge, slice.edge_step, &hard);",
             "if (write) hard_grad<kParted, S, U, T>(P, L, slice.begin + rank, slice.end, threads, slice.edge, slice.edge_step, nullptr);", TARGETS),
    Mutation("cuda lanes: a warp's classes past those that are kept are the first ones", "csrc/cuda/rows_lanes.cuh",
             ": reinterpret_cast<const From*>(p);", ": reinterpret_cast<const From*>(room) + threadIdx.x;", ROWS),
    Mutation("cuda rows: of several blocks a row the mask is not asked", "csrc/cuda/rows_split.cuh",
             "P.grad.data;\n  const bool counts = !P.mask || P.mask[row];", "P.grad.data;\n  const bool counts = true;", ROWS + " tests/test_cuda_orders.py"),
    Mutation("cuda angles: the bound of Huber is one-sided", "csrc/cuda/angles_kernel.cuh",
             "return x < -bound ? -bound : x > bound ? bound : x; }", "return x > bound ? bound : x; }", RELATIONS),
    Mutation("cuda pairs: all rows are there", "csrc/cuda/pairs_tile.cuh",
             "N(rows_there(P.count, 0, P.options.N))", "N(P.options.N)", RELATIONS),
    Mutation("cuda features: the last rows of a block have no weight", "csrc/cuda/features_kernel.cuh",
             "double(sum[q]) * weight(place.row + q) : 0;", "double(sum[q]) * weight(place.row) : 0;", FEATURES),
    Mutation("cuda parts: the soft part with its weight", "csrc/cuda/rows_kernel.cuh",
             "soft_loss<T, D>(k, sums, r, squared, P.hard)", "soft_loss<T, D>(k, sums, r, r.loss_scale, P.hard)", PARTS),
    Mutation("cuda dist: a segment's sums are of the first row of the chunk", "csrc/cuda/dist_kernel.cuh",
             "      count = 0;\n    }\n  }\n  ColumnMoments* room", "      count = 1;\n    }\n  }\n  ColumnMoments* room", DIST),
    # schedules of Triton
    Mutation("triton: js_div's terms trade places", "fastkd/triton/divergences.py",
             "tl.where(by_student, log, log - finite)", "tl.where(by_student, log - finite, log)", ROWS),
    Mutation("triton: thresholds that are met count", "fastkd/triton/triplet.py",
             "negative[None, :] & ~(threshold[:, None] <= d[None, :])\n        above", "negative[None, :] & ~(threshold[:, None] < d[None, :])\n        above",
             "tests/test_triplet.py"),
    Mutation("triton: rows that are not there are pairs' all the same", "fastkd/triton/pairs_kernels.py",
             "pair = (i < n)[:, None] & (j < n)[None, :] & (i", "pair = (j < n)[None, :] & (i", RELATIONS),
    Mutation("triton targets: the logit of the target is left out", "fastkd/triton/rows_targets.py",
             "(1.0 - smoothing) * (max_student - logit)", "(1.0 - smoothing) * max_student", TARGETS),
    Mutation("triton targets: of a walk the last tile's logits", "fastkd/triton/rows_walks.py",
             "            logits += tl.sum(", "            logits = tl.sum(", TARGETS),
    # bindings
    Mutation("binding: the teacher's temperatures of rows are the student's", "csrc/common/rows_op.h",
             "temperature<T>(in.teacher_temperature, in.teacher_temperature_rows,",
             "temperature<T>(in.teacher_temperature, in.temperature_rows,", ROWS),
    Mutation("binding: a number that only the device knows is not divided by", "csrc/common/rows_op.h",
             "if (in.scale_tensor) {", "if (false) {", ROWS),
    Mutation("binding: a half-precision gradient is computed in forward", "fastkd/ops/rows.py",
             "ctx.recompute = per_row or student.dtype is torch.float16", "ctx.recompute = per_row",
             ROWS),
    Mutation("binding: backward forgets the layers' weights", "fastkd/ops/features.py",
             "_call(ctx.options, layer_weights, beta, tensors)", "_call(ctx.options, layer_weights * 0 + 1, beta, tensors)", FEATURES),
    Mutation("binding: backward forgets beta", "fastkd/ops/features.py",
             "_call(ctx.options, layer_weights, beta, tensors)", "_call(ctx.options, layer_weights, beta and beta * 0 + 1, tensors)", FEATURES),
    Mutation("binding: keys that are the rows have no gradient", "fastkd/ops/relation_kl.py",
             "s.add_gradients(rows, S, grad, grad if s.own_keys else keys_grad)", "s.add_gradients(rows, S, grad, keys_grad)",
             "tests/test_relation_kl.py tests/test_relation_kl_pairs.py"),
    Mutation("binding: an upstream gradient multiplies once more when a graph is retained", "fastkd/ops/gradient.py",
             "    if torch._C._autograd._get_current_graph_task_keep_graph():  # there may be another backward\n        return [grad * upstream for grad in grads]\n",
             "", ROWS),
    # classes that are split over ranks
    Mutation("group: sums of the ranks have their own maxima", "fastkd/ops/group.py",
             "factors = torch.exp((maximum - top) * inv_temperature)", "factors = torch.ones_like(maximum)", GROUP),
    Mutation("group: the target of another rank counts here", "fastkd/ops/group.py",
             "target = torch.where((target >= 0) & (target < V), target, -1)", "target = target.clamp(0, max(V - 1, 0))", GROUP),
    Mutation("group: every rank adds the teacher's log sum", "fastkd/ops/group.py",
             "if entry.teacher_entropy and ranks.rank == 0:", "if entry.teacher_entropy:", GROUP),
    Mutation("group: the gradient of hidden states is a rank's own", "fastkd/ops/group_forms.py",
             "            ranks.sum_(out.grad)\n", "            pass\n", HEADS),
    Mutation("group: backward of a slab has the statistics of the first one", "fastkd/ops/group_forms.py",
             "RowsBackward(stats[at].contiguous(), upstream, out.grad)", "RowsBackward(stats[: len(stats[at])].contiguous(), upstream, out.grad)", HEADS),
    Mutation("group: a bucket's gradient is shared out by the rank's own sum", "fastkd/ops/group_top_k.py",
             "torch.exp((whole - largest) / T)", "total", "tests/test_group_top_k.py"),
    Mutation("group: probabilities sum to what a rank has", "fastkd/ops/group_probabilities.py",
             "return self.ranks.gathered(super().sums_of(q).reshape(-1)).sum(0).view(q.shape[:-1])", "return super().sums_of(q)",
             "tests/test_group_probabilities.py"),
    Mutation("group: a head's bound is the rank's own", "fastkd/ops/group_logits.py",
             "bins = ranks.gathered(bins).sum(0).flip(1)", "bins = bins.flip(1)", GROUP_LOGITS),
    Mutation("group: equals of a head's bound are in it", "fastkd/ops/group_logits.py",
             "everything | (key > bound)", "everything | (key >= bound)", GROUP_LOGITS),
    Mutation("group: means of ranks count alike", "fastkd/ops/group_standardize.py",
             "beyond = squares.sum(0) + (n * torch", "beyond = squares.sum(0) + (1 * torch", GROUP_LOGITS),
    Mutation("group: a standardized row's gradient has the rank's own sums", "fastkd/ops/group_standardize.py",
             "sums = ranks.gathered(sums.view(-1, 2)).sum(0).view(sums.shape)", "", GROUP_LOGITS),
    Mutation("group: another rank's target is among the other classes", "fastkd/ops/group_targets.py",
             "here = (at >= 0) & (at < V) & ~wrong", "here = (at > 0) & (at < V) & ~wrong", GROUP_LOGITS),
    Mutation("group: what the target loses nobody gains", "fastkd/ops/group_targets.py",
             "        grad.sub_(slope * two.among_others(sides[0]))\n", "", GROUP_LOGITS),
    Mutation("group: a row's correlation has the rank's own classes", "fastkd/ops/dist_forms.py",
             "of_each if runs.ranks is None else of_all_ranks(of_each, runs.ranks)", "of_each", "tests/test_group_dist.py"),
    Mutation("group: backward of dist has the rank's own sum", "fastkd/ops/dist_forms.py",
             "total = runs.ranks.gathered(G.sum(-1, keepdim=True).double()).sum(0).to(dtype)",
             "total = G.sum(-1, keepdim=True)", "tests/test_group_dist.py"),
    Mutation("group: a rank's samples come first", "fastkd/_split_samples.py",
             "torch.cat([whole[:before], Own.apply(x, _OF_SPLIT), whole[before + len(x) :]])",
             "torch.cat([Own.apply(x, _OF_SPLIT), whole[:before], whole[before + len(x) :]])", "tests/test_group_samples.py"),
    Mutation("cpu phases: a block's entropy has its own maximum", "csrc/cpu/rows.cpp",
             "std::exp(below * inv_temperature) / stats.sum_teacher;", "1 / stats.sum_teacher;", GROUP),
    Mutation("cuda phases: only those that are split count in the entropy", "csrc/cuda/rows_split.cuh",
             "      add_entropy<D>(P, t, softmax, r, sums);\n", "", GROUP),
    Mutation("cuda targets: labels are smoothed over the classes that are here", "csrc/cuda/rows_targets.cuh",
             "T(P.hard.smoothing) / T(P.hard.classes)", "T(P.hard.smoothing) / T(P.V)", GROUP),
    Mutation("triton targets: labels are smoothed over the classes that are here", "fastkd/triton/rows_targets.py",
             "(smoothing / in_all)", "(smoothing / V)", GROUP),
    Mutation("cpu relation_kl: keys have lost a mean that the gradient does not know", "csrc/cpu/relation_kl_few.cpp",
             "kernel.add(grad + i * D, student.mean.data(), D, T(kernel.sum(W + i * N_, N_)));", "(void)kernel;",
             RELATIONS),
    # checks
    Mutation("check: a temperature of 0", "fastkd/_check/arguments.py",
             "if not 0 < value <= sys.float_info.max:  # false for NaN", "if not 0 <= value <= sys.float_info.max:  # false for NaN", "tests/test_errors.py"),
    Mutation("check: a view of a leaf is overwritten", "fastkd/_check/logits.py",
             "if student.is_leaf or (student._base is not None and student._base.is_leaf and student._base.requires_grad):",
             "if student.is_leaf:", "tests/test_inplace.py tests/test_errors.py"),
    Mutation("check: a mask of integers", "fastkd/_check/arguments.py",
             "if x.dtype is not torch.bool:", "if x.dtype is torch.float64:", "tests/test_errors.py"),
    # what is plain PyTorch
    Mutation("reference: the mean is over all rows", "fastkd/reference/_shared.py",
             "valid = rows.numel() if mask is None else mask.sum()", "valid = rows.numel()", ROWS),
    Mutation("products: features are trusted near convergence", "fastkd/ops/gram.py",
             "if may_cancel or (squares > MIN_SHARE * terms).all():  # false of NaN", "if True:", "tests/test_gram.py " + RELATIONS),
]  # fmt: skip


def run(*command, **options):
    return subprocess.run(
        command, cwd=COPY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )


def copy_sources():
    """What git knows of; the libraries' build folder stays as it was left."""
    COPY.mkdir(parents=True, exist_ok=True)
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        source, target = ROOT / name, COPY / name
        if not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != source.read_bytes():  # else ninja would compile it again
            target.write_bytes(source.read_bytes())


def build():
    environment = {**os.environ, "FASTKD_TESTING": "1", "FASTKD_CUDA": "0", "FASTKD_BASELINE": "1"}
    return run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", env=environment)


def first_failure(part, where, workers):
    """The first test that fails, or None."""
    environment = {**os.environ, "PYTHONPATH": str(COPY), "OMP_WAIT_POLICY": "PASSIVE"}
    command = ["-m", "pytest", "-x", "--part", part, "-n", workers, "--dist", "loadgroup", *where.split()]
    command += ["--deselect", "tests/test_package.py::test_the_library_asks_the_driver_for_code"]  # none is built here
    done = run(sys.executable, *command, env=environment)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if not found:
        sys.exit(f"the tests could not be run:\n{done.stdout[-3000:]}")
    return found[1]


def find(mutation, part, workers):
    """Which test finds a fault: "" if none does, "the build" if it does not compile."""
    path = COPY / mutation.path
    original = path.read_text()
    if original.count(mutation.text) != 1:
        sys.exit(
            f"{mutation.name}: {mutation.path} must have its text once, and has it {original.count(mutation.text)} times"
        )
    path.write_text(original.replace(mutation.text, mutation.instead))
    try:
        if build().returncode:  # of a fault in Python too: the library may be that of the fault before
            return "the build"
        return first_failure(part, mutation.first, workers) or first_failure(part, "tests", workers) or ""
    finally:
        path.write_text(original)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of their names")
    parser.add_argument("--part", default="test", choices=("test", "all"), help="of the suite, see tests/conftest.py")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--list", action="store_true", help="names alone")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if arguments.only in mutation.name]
    if arguments.list:
        return print("\n".join(mutation.name for mutation in chosen))
    copy_sources()
    if (built := build()).returncode:
        sys.exit(built.stdout)
    missed = 0
    for mutation in chosen:
        start = time.perf_counter()
        found = find(mutation, arguments.part, arguments.workers)
        missed += not found
        print(f"{mutation.name}: {found or 'NOT FOUND'} ({time.perf_counter() - start:.0f} s)", flush=True)
    build()
    print(f"{len(chosen)} faults, {len(chosen) - missed} found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
