// The scheduler: in which order the warps and blocks of a launch run. A part of cusim.cpp, which alone includes it.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "waiting.h"

namespace cusim {
namespace {

// A warp runs as far as it can before the next one starts: the order that shows a missing barrier.
bool run_warp(Warp& warp) {
  const unsigned n = warp.lanes.size();
  unsigned lanes[32];
  for (unsigned i = 0; i < n; ++i) lanes[i] = order_mode == kReverse ? n - 1 - i : i;
  if (order_mode == kRandom) std::shuffle(lanes, lanes + n, rng);
  bool ran = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned i = 0; i < n; ++i) {
      Fiber& f = warp.lanes[lanes[i]];
      if (f.state != State::kReady) continue;
      resume(f);
      if (failed) return true;
      ran = again = true;
    }
  }
  return ran;
}

// The numbers 0 .. n - 1 in the order of the mode.
std::vector<uint64_t> ordered(uint64_t n) {
  std::vector<uint64_t> order(n);
  for (uint64_t i = 0; i < n; ++i) order[i] = order_mode == kReverse ? n - 1 - i : i;
  if (order_mode == kRandom) std::shuffle(order.begin(), order.end(), rng);
  return order;
}

void run_cluster() {
  release(&current->start_tag);
  const auto returned = [](const Block& b) { return b.returned == current->threads; };
  while (!failed && !std::all_of(current->cluster.begin(), current->cluster.end(), returned)) {
    bool ran = false;
    for (uint64_t w : ordered(current->warps.size())) {
      ran |= run_warp(current->warps[w]);
      if (failed) return;
    }
    if (!ran) set_error(deadlock_text());
  }
  if (races_in_cluster_only) acquire(&current->end_tag);
}

// Puts the fibers into the blocks of cluster c, before its first thread runs.
void make_cluster(uint64_t c, unsigned fiber_set) {
  Launch& l = *current;
  const unsigned per_block = (l.threads + 31) / 32;
  l.cluster = std::span(l.blocks).subspan(c * l.cluster_size, l.cluster_size);
  l.cluster_barrier = &l.cluster_barriers[c];
  l.cluster_barrier->threads = l.fibers;
  for (unsigned rank = 0; rank < l.cluster_size; ++rank) {
    Block& b = l.cluster[rank];
    const uint64_t i = c * l.cluster_size + rank;
    b.index = {unsigned(i % gridDim.x), unsigned(i / gridDim.x % gridDim.y), unsigned(i / gridDim.x / gridDim.y)};
    b.rank = rank;
    b.shared = l.shared[i % l.shared.size()];
    b.barrier.threads = std::span(l.fibers).subspan(rank * l.threads, l.threads);
    for (unsigned w = 0; w < per_block; ++w) {
      Warp& warp = l.warps[rank * per_block + w];
      warp.lanes = b.barrier.threads.subspan(w * 32, std::min(32u, l.threads - w * 32));
      warp.exchanges.clear();
      warp.ready = present(warp);
      warp.alike = 0;
    }
    for (unsigned t = 0; t < l.threads; ++t) {
      const size_t slot = size_t(fiber_set) * l.fibers.size() + rank * l.threads + t;
      Fiber& f = b.barrier.threads[t] = Fiber{};
      f.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
      f.thread = t;
      f.lane = t % 32;
      f.block = &b;
      f.warp = &l.warps[rank * per_block + t / 32];
      f.stack = stacks[slot];
      if (!tsan_fibers.empty()) f.tsan_fiber = tsan_fibers[slot];
      prepare_stack(f);
    }
  }
}

void reserve_stacks(size_t n) {
  while (stacks.size() < n) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE)) abort();
    stacks.push_back(static_cast<char*>(p));
  }
}

void reserve_shared(size_t n) {
  for (size_t i = 0; i < n; ++i) {
    void* p;
    if (posix_memalign(&p, 128, std::max<size_t>(current->shared_bytes, 1))) abort();
    std::memset(p, 0xff, current->shared_bytes);
    poison(p, current->shared_bytes);
    current->shared.push_back(static_cast<char*>(p));
  }
}

void run_grid() {
  Launch& l = *current;
  const uint64_t n_blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  const uint64_t n_clusters = n_blocks / l.cluster_size;
  const size_t n_fibers = size_t(l.cluster_size) * l.threads;
  // For ThreadSanitizer a fiber's accesses are ordered, whichever cluster they are for: two sets
  // take turns, and blocks share no memory but the kernel's.
  const bool tsan = __tsan_create_fiber != nullptr;
  const unsigned sets = tsan && n_clusters > 1 ? 2 : 1;
  l.blocks.resize(n_blocks);
  l.cluster_barriers.resize(n_clusters);
  l.fibers.resize(n_fibers);
  l.warps.resize(l.cluster_size * ((l.threads + 31) / 32));
  reserve_stacks(sets * n_fibers);
  reserve_shared(tsan ? n_blocks : l.cluster_size);
  if (tsan) {
    main_tsan_fiber = __tsan_get_current_fiber();
    while (tsan_fibers.size() < sets * n_fibers) tsan_fibers.push_back(__tsan_create_fiber(0));
  }
  unsigned turn = 0;
  for (uint64_t c : ordered(n_clusters)) {
    make_cluster(c, turn++ % sets);
    run_cluster();
    if (failed) break;
  }
  acquire(&l.end_tag);
  if (failed) {  // ThreadSanitizer knows the frames that they will never leave
    for (void* fiber : tsan_fibers) __tsan_destroy_fiber(fiber);
    tsan_fibers.clear();
  }
  for (char* p : l.shared) free(p);
}

}  // namespace
}  // namespace cusim
