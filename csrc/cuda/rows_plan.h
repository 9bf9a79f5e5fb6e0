// How rows are dealt to blocks. Host code, by arithmetic alone.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/rows_params.h"
#include "cuda/rows_launch.h"

namespace fastkd::cuda {

inline constexpr int64_t kPlanPack = 8;
inline constexpr int kPlanThreads = 256;
inline constexpr int64_t kRoomBytes = 1024;  // for the exchange between warps
inline constexpr int64_t kPartValues = 14;   // of a part of a row, in RowsParts
// Three blocks a multiprocessor: while one copies another computes and a third stores.
inline constexpr int64_t kSharedAimed = 72 << 10;
inline constexpr int kMaxCluster = 8;  // what every GPU that has clusters can do

struct RowsPlan {
  bool on_chip;
  int threads, rows_of_block, cluster, packs;  // packs: of a row that a block keeps
  int64_t shared_bytes;
  int splits;         // of a row, where it is not on chip
  int64_t wave_rows;  // at a time

  // Rows that lie side by side: 32 of them a block; see rows_lanes.cuh. Then only threads (warps * 32) and shared_bytes
  // of the above count.
  int64_t inner;   // rows of a run; 0: they do not lie so
  int64_t in_run;  // blocks of a run
  int64_t kept;    // classes that stay in shared memory
};

inline int threads_for(int64_t packs) {  // at least four packs a thread, in warps
  int threads = 32;
  while (threads < kPlanThreads && threads * 4 < packs) threads *= 2;
  return threads;
}

inline int splits_for(int64_t rows, int64_t packs, const Device& device) {
  // four blocks a multiprocessor, but no split without work for its threads
  const int64_t wanted = (4 * int64_t(device.multiprocessors) + rows - 1) / rows;
  const int64_t useful = std::max<int64_t>(packs / kPlanThreads, 1);
  return int(std::clamp<int64_t>(std::min(wanted, useful), 1, 32));
}

inline constexpr int kLanesPlanWarps = 16;
inline constexpr int64_t kLeastInner = 8;  // rows side by side, that fill what is read at a time
// What the threads of a block exchange: Sums and LossSums of each, and HardSums where there are targets.
template <class T>
int64_t lanes_room(int threads, bool targets) {
  return threads * (targets ? 14 : 8) * int64_t(sizeof(T));
}

// How many rows lie side by side in every tensor: their elements of a class one after the other. 0: none do, or nobody
// would gain by it: mixtures of types, and double, which have no kernels for it, are walked as rows.
template <class T>
int64_t rows_side_by_side(const RowsParams<T>& P) {
  if (sizeof(T) == 8 || P.student.dtype != P.teacher.dtype) return 0;
  const RowsTensor* tensors[] = {&P.student, &P.teacher, &P.grad};
  int64_t inner = P.N;
  for (const RowsTensor* x : tensors) {
    if (!x->data) continue;
    if (x->dims == 0 || x->stride[x->dims - 1] != 1 || x->stride_v == 1) return 0;
    inner = std::min(inner, x->size[x->dims - 1]);
  }
  if (inner < kLeastInner) return 0;
  for (const RowsTensor* x : tensors) {
    if (x->data && x->size[x->dims - 1] % inner != 0) return 0;
  }
  return inner;
}

template <class T>
RowsPlan rows_plan(const RowsParams<T>& P, const Device& device) {
  RowsPlan plan{};
  plan.inner = rows_side_by_side(P);
  if (plan.inner > 0) {
    plan.on_chip = true;
    plan.in_run = (plan.inner + 31) / 32;
    const int64_t class_bytes = 32 * (P.student.element_size + P.teacher.element_size);
    const bool many = P.V * class_bytes > kSharedAimed;  // few blocks fit: larger ones
    plan.threads = 32 * int(std::clamp<int64_t>((P.V + 7) / 8, 1, many ? kLanesPlanWarps : 8));
    const int64_t room = lanes_room<T>(plan.threads, P.hard.target != nullptr);
    plan.kept = std::min(P.V, (device.shared_memory - room) / class_bytes);
    plan.shared_bytes = room + plan.kept * class_bytes;
    return plan;
  }
  const int64_t pack_bytes = kPlanPack * (P.student.element_size + P.teacher.element_size);
  const int64_t packs = P.V / kPlanPack;
  const int most = device.compute_major >= 9 ? kMaxCluster : 1;
  const auto part = [&](int cluster) { return (packs + cluster - 1) / cluster; };
  int cluster = 1;
  while (cluster < most && part(cluster) * pack_bytes > kSharedAimed) cluster *= 2;
  while (cluster < most && P.N * cluster < device.multiprocessors && part(2 * cluster) >= kPlanThreads) cluster *= 2;
  const bool fits = part(cluster) * pack_bytes + kRoomBytes <= device.shared_memory;
  const bool idle = cluster == most && most == 1 && 2 * P.N <= device.multiprocessors && packs >= 4 * kPlanThreads;
  plan.on_chip = fits && !idle && sizeof(T) == 4;  // double has only the kernels of the passes: it is for checks
  if (plan.on_chip) {
    plan.cluster = cluster;
    plan.packs = int(part(cluster));
    plan.threads = threads_for(plan.packs);
    plan.rows_of_block = cluster > 1 ? 1 : std::max(1, 128 / plan.threads);
    plan.shared_bytes = kRoomBytes + plan.rows_of_block * plan.packs * pack_bytes;
    return plan;
  }
  const int64_t row_bytes = std::max<int64_t>(P.V * (P.student.element_size + P.teacher.element_size), 1);
  plan.wave_rows = std::clamp<int64_t>(device.l2_cache / 2 / row_bytes, 1, std::max<int64_t>(P.N, 1));
  plan.splits = splits_for(plan.wave_rows, packs, device);
  plan.threads = kPlanThreads;
  plan.shared_bytes = kRoomBytes;
  return plan;
}

// Of one phase by itself: a kernel of its own, several blocks a row.
template <class T>
RowsPlan rows_phase_plan(const RowsParams<T>& P, const Device& device) {
  RowsPlan plan{};
  plan.wave_rows = P.N;
  plan.splits = splits_for(P.N, P.V / kPlanPack, device);
  plan.threads = threads_for(P.V / kPlanPack / plan.splits);
  plan.shared_bytes = kRoomBytes;
  return plan;
}

}  // namespace fastkd::cuda
