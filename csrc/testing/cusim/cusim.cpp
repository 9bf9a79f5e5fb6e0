// The runtime of cusim: fibers, their scheduler, barriers and collectives.
//
// To be compiled without -fsanitize: it tells whichever sanitizer the process has, through weak
// symbols, about the fibers and about which of their accesses a barrier orders.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "sanitizer.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cusim {
unsigned lane;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kGuard = 64 << 10;  // at least a page, on every processor
constexpr unsigned kMaxCluster = 8;  // the largest portable size

enum class State { kReady, kInWarp, kInBlock, kInCluster, kReturned };

struct Fiber;
struct Block;

struct Exchange {  // the values of one warp collective, until the last lane has read them
  int readers = 0;
  WarpSlots slots;
};

struct Warp {
  std::span<Fiber> lanes;
  std::vector<std::unique_ptr<Exchange>> exchanges;
};

// Two tags, by generation: a fast thread may release the next before a slow one acquires this one.
struct SyncTag {
  uint64_t tags[2];  // only their addresses are used, by ThreadSanitizer
  unsigned generation = 0;
  unsigned arrived = 0;
};

struct Barrier {  // of a block or of a cluster
  std::span<Fiber> threads;
  Site site{};  // of those that wait
  int count = 0;
  int last_count = 0;
  SyncTag sync;
};

struct Block {
  uint3 index;
  unsigned rank;  // in its cluster
  char* shared;
  unsigned started = 0;
  unsigned returned = 0;
  Barrier barrier;
  uint64_t start_tag, end_tag;
};

struct Fiber {
  uint3 index;
  unsigned thread;  // in its block
  unsigned lane;
  Block* block;
  Warp* warp;
  State state = State::kReady;
  void* sp;
  char* stack;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
  // what it waits at
  const char* at = "";
  Site site{};
  unsigned mask;
  uint64_t words[kMaxWords];
  Exchange* exchange = nullptr;
  SyncTag warp_sync;  // of the mask that has this as its lowest lane
  // cp.async
  std::vector<AsyncCopy> copies;
  size_t copies_done = 0;
  int groups = 0;
};

struct Launch {
  void (*thunk)(void*);
  void* arguments;
  unsigned threads;       // of a block
  unsigned cluster_size;  // blocks
  size_t shared_bytes;
  std::vector<Block> blocks;              // of the grid
  std::vector<Barrier> cluster_barriers;  // of the grid
  std::vector<char*> shared;
  // of the cluster that runs
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::span<Block> cluster;
  Barrier* cluster_barrier;
  uint64_t start_tag, end_tag;
};

Launch* current;
Fiber* self;
void* main_sp;
void* main_asan_stack;
const void* main_stack;
size_t main_stack_size;
void* main_tsan_fiber;
// Kept from launch to launch, which are in order: to make them takes longer than to run a small kernel.
std::vector<char*> stacks;
std::vector<void*> tsan_fibers;  // [stacks], or none

enum Order { kForward, kReverse, kRandom };
int order_mode = kForward;
unsigned order_seed;
std::mt19937 rng;
bool races_in_cluster_only;

bool failed;  // the last launch
std::string error_text;
cudaError_t last_error = cudaSuccess;
std::map<const void*, int> max_shared;  // by kernel, where it was set
std::map<int, int> device_attributes;   // where they were set

// ---- messages

std::string site_text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

bool same(Site a, Site b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

std::string thread_text(const Fiber& f) {
  const uint3 b = f.block->index;
  return "block (" + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) + ") thread " +
         std::to_string(f.thread) + " (warp " + std::to_string(f.thread / 32) + " lane " + std::to_string(f.lane) + ")";
}

std::string describe(const Fiber& f) {
  if (f.state == State::kReturned) return thread_text(f) + " has returned";
  std::string text = thread_text(f) + " is at " + f.at + ", " + site_text(f.site);
  if (f.state != State::kInWarp) return text;
  char mask[16];
  std::snprintf(mask, sizeof mask, "0x%08x", f.mask);
  return text + ", mask " + mask;
}

void set_error(const std::string& text) {
  failed = true;
  error_text = "cusim: " + text;
}

// ---- switching between fibers

void yield(bool dying = false) {
  Fiber* f = self;
  release(&current->end_tag);  // what it did so far is the host's, should it never be resumed
  start_switch(dying ? nullptr : &f->asan_stack, main_stack, main_stack_size, main_tsan_fiber);
  cusim_swap(&f->sp, main_sp);
  finish_switch(f->asan_stack);
}

// After set_error. The fiber's frames are never unwound: they must own nothing.
[[noreturn]] void abandon() {
  yield(true);
  __builtin_trap();
}

void resume(Fiber& f) {
  self = &f;
  threadIdx = f.index;
  blockIdx = f.block->index;
  lane = f.lane;
  start_switch(&main_asan_stack, f.stack, kStack, f.tsan_fiber);
  cusim_swap(&main_sp, f.sp);
  finish_switch(main_asan_stack);
}

// A block's shared memory is its own from its first thread's start to its last one's return. At
// both ends a thread of the block overwrites it: an access from another block that no barrier
// keeps inside is a wrong number, an ASan report and a race.
void fill_shared(Block& b) {
  unpoison(b.shared, current->shared_bytes);
  std::memset(b.shared, 0xff, current->shared_bytes);
}

void start_thread(Block& b) {
  acquire(&current->start_tag);
  if (b.started++ == 0) {
    fill_shared(b);
    release(&b.start_tag);
  } else {
    acquire(&b.start_tag);
  }
}

void end_thread(Block& b) {
  release(&b.end_tag);
  if (++b.returned == current->threads) {
    acquire(&b.end_tag);
    fill_shared(b);
    poison(b.shared, current->shared_bytes);
  }
}

void leave_exchange(Fiber* f) {
  if (f->exchange) --f->exchange->readers;
  f->exchange = nullptr;
}

void fiber_main() {
  Fiber* f = self;
  finish_switch(nullptr, &main_stack, &main_stack_size);
  start_thread(*f->block);
  current->thunk(current->arguments);
  leave_exchange(f);
  f->state = State::kReturned;
  end_thread(*f->block);
  yield(true);
  __builtin_trap();
}

void prepare_stack(Fiber& f) {
  unpoison(f.stack + kGuard, kStack - kGuard);
  f.sp = new_context(f.stack, kStack, fiber_main);
}

// ---- waiting

// Returns the tag to acquire after the wait.
void* arrive(Barrier& b, State state, const char* name, int predicate, Site site) {
  const Unseen unseen;
  Fiber* f = self;
  leave_exchange(f);
  f->state = state;
  f->at = name;
  f->site = site;
  if (!b.sync.arrived) b.site = site;
  if (!same(b.site, site)) {
    set_error("threads wait at different barriers: " + describe(*f) + "; others are at " + site_text(b.site));
    return nullptr;
  }
  void* tag = &b.sync.tags[b.sync.generation & 1];
  release(tag);
  b.count += predicate != 0;
  if (++b.sync.arrived == b.threads.size()) {
    for (Fiber& t : b.threads) t.state = State::kReady;
    b.last_count = b.count;
    b.count = 0;
    b.sync.arrived = 0;
    ++b.sync.generation;
  }
  return tag;
}

int wait_at(Barrier& b, State state, const char* name, int predicate, Site site) {
  void* tag = arrive(b, state, name, predicate, site);
  if (failed) abandon();
  yield();
  acquire(tag);
  return b.last_count;
}

unsigned present(const Warp& warp) { return ~0u >> (32 - warp.lanes.size()); }

// What is wrong with the collective that f waits at; empty: nothing yet.
std::string mismatch(const Fiber& f) {
  if (!(f.mask >> f.lane & 1)) return "the mask leaves out its own lane: " + describe(f);
  // All 32 lanes is what a kernel names that does not know of a last, partial warp.
  if (f.mask & ~present(*f.warp) && f.mask != ~0u) {
    return "the mask names lanes that the block does not have: " + describe(f);
  }
  for (const Fiber& other : f.warp->lanes) {
    if (!(f.mask >> other.lane & 1) || other.state == State::kReady) continue;
    if (other.state != State::kInWarp) {
      return "a lane that the mask names cannot come: " + describe(f) + "; " + describe(other);
    }
    if (other.mask != f.mask || std::strcmp(other.at, f.at) || !same(other.site, f.site)) {
      return "lanes that the mask names are elsewhere: " + describe(f) + "; " + describe(other);
    }
  }
  return "";
}

// The last lane to arrive hands every one the words of all.
void complete_exchange(Warp& warp, unsigned mask, int n) {
  auto& all = warp.exchanges;
  auto free = std::find_if(all.begin(), all.end(), [](const auto& e) { return e->readers == 0; });
  if (free == all.end()) free = all.insert(all.end(), std::make_unique<Exchange>());
  Exchange& e = **free;
  for (Fiber& f : warp.lanes) {
    if (!(mask >> f.lane & 1)) continue;
    std::copy_n(f.words, n, e.slots[f.lane]);
    ++e.readers;
    f.exchange = &e;
    f.state = State::kReady;
  }
}

void enter_exchange(const char* name, unsigned mask, const uint64_t* words, int n, Site site) {
  const Unseen unseen;
  Fiber* f = self;
  leave_exchange(f);
  f->state = State::kInWarp;
  f->at = name;
  f->site = site;
  f->mask = mask;
  std::copy_n(words, n, f->words);
  const std::string wrong = mismatch(*f);
  if (!wrong.empty()) return set_error(wrong);
  const auto missing = [&](const Fiber& other) { return (mask >> other.lane & 1) && other.state == State::kReady; };
  if (std::none_of(f->warp->lanes.begin(), f->warp->lanes.end(), missing)) complete_exchange(*f->warp, mask, n);
}

// Whether `f`, which waits, waits for `other`.
bool waits_for(const Fiber& f, const Fiber& other) {
  switch (f.state) {
    case State::kInWarp:
      return other.warp == f.warp && (f.mask >> other.lane & 1) && other.state != State::kInWarp;
    case State::kInBlock:
      return other.block == f.block && other.state != State::kInBlock;
    case State::kInCluster:
      return other.state != State::kInCluster;
    default:
      return false;
  }
}

std::string deadlock_text() {
  std::string text;
  for (const Fiber& f : current->fibers) {
    for (const Fiber& other : current->fibers) {
      if (!waits_for(f, other)) continue;
      // The end of a chain of waiting is one that has returned.
      if (text.empty() || other.state == State::kReturned) {
        text = "deadlock: " + describe(f) + "; it waits for: " + describe(other);
      }
      if (other.state == State::kReturned) return text;
    }
  }
  return text;
}

// ---- the scheduler

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

// ---- the host's side

int device_attribute(int attribute) {
  const auto set = device_attributes.find(attribute);
  if (set != device_attributes.end()) return set->second;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return 4;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return 227 << 10;
    case cudaDevAttrL2CacheSize:
      return 1 << 20;
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    default:
      return -1;
  }
}

cudaError_t cluster_of(const cudaLaunchConfig_t& config, unsigned* size) {
  *size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& d = config.attrs[i].val.clusterDim;
    if (d.x == 0 || d.x > kMaxCluster || d.y != 1 || d.z != 1) return cudaErrorInvalidValue;
    *size = d.x;
  }
  if (*size > 1 && device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return cudaErrorNotSupported;
  return config.gridDim.x % *size ? cudaErrorInvalidConfiguration : cudaSuccess;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, unsigned* cluster_size) {
  const dim3 g = config.gridDim, b = config.blockDim;
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  if (!b.x || !b.y || !b.z || b.x > 1024 || b.y > 1024 || b.z > 64) return cudaErrorInvalidConfiguration;
  if (b.x * b.y * b.z > 1024) return cudaErrorInvalidConfiguration;
  const auto allowed = max_shared.find(kernel);
  if (config.dynamicSmemBytes > size_t(allowed == max_shared.end() ? 48 << 10 : allowed->second)) {
    return cudaErrorInvalidValue;
  }
  return cluster_of(config, cluster_size);
}

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

void fail(const char* what, Site site) {
  {
    const Unseen unseen;
    set_error(std::string(what) + ": " + thread_text(*self) + ", " + site_text(site));
  }
  abandon();
}

void* dynamic_shared() { return self->block->shared; }

void block_barrier(Site site) { block_barrier_count(0, site); }

int block_barrier_count(int predicate, Site site) {
  return wait_at(self->block->barrier, State::kInBlock, "__syncthreads", predicate, site);
}

unsigned cluster_rank() { return self->block->rank; }

unsigned cluster_size() { return current->cluster_size; }

void cluster_barrier(Site site) {
  wait_at(*current->cluster_barrier, State::kInCluster, "the cluster's barrier", 0, site);
}

void* map_shared(const void* p, unsigned rank, Site site) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(self->block->shared);
  if (offset >= current->shared_bytes) fail("map_shared: the address is not in this block's shared memory", site);
  if (rank >= current->cluster_size) fail("map_shared: no block of this rank in the cluster", site);
  const Block& b = current->cluster[rank];
  if (b.returned == current->threads) fail("map_shared: the block of this rank has left the cluster", site);
  return b.shared + offset;
}

const WarpSlots& warp_exchange(const char* name, unsigned mask, const uint64_t* words, int n, Site site) {
  enter_exchange(name, mask, words, n, site);
  if (failed) abandon();
  // The last to arrive may go on at once: that it does so in one order only shows what relies on it.
  if (self->state != State::kReady || order_mode != kForward) yield();
  return self->exchange->slots;
}

void warp_barrier(unsigned mask, Site site) {
  // A shuffle or a vote orders no memory accesses; this does.
  Warp& warp = *self->warp;
  void* tag = nullptr;
  if (const unsigned lanes = mask & present(warp)) {
    SyncTag& sync = warp.lanes[__builtin_ctz(lanes)].warp_sync;
    tag = &sync.tags[sync.generation & 1];
    release(tag);
    if (++sync.arrived == unsigned(__builtin_popcount(lanes))) {
      sync.arrived = 0;
      ++sync.generation;
    }
  }
  warp_exchange("__syncwarp", mask, nullptr, 0, site);
  acquire(tag);
}

bool async_eager() { return order_mode == kRandom ? rng() & 1 : order_mode == kReverse; }

void async_issue(AsyncCopy copy) {
  const Unseen unseen;
  copy.group = self->groups;
  self->copies.push_back(copy);
}

void async_commit() { ++self->groups; }

bool async_take(int pending, AsyncCopy* out) {
  const Unseen unseen;
  Fiber* f = self;
  if (f->copies_done == f->copies.size()) {
    f->copies.clear();
    f->copies_done = 0;
    return false;
  }
  *out = f->copies[f->copies_done];
  if (out->group >= f->groups - pending) return false;
  ++f->copies_done;
  return true;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thunk)(void*), void* arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const Unseen unseen;
  Launch l{};
  const cudaError_t refused = check(config, kernel, &l.cluster_size);
  if (refused != cudaSuccess) return note(refused);
  l.thunk = thunk;
  l.arguments = arguments;
  l.threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  l.shared_bytes = config.dynamicSmemBytes;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  rng.seed(order_seed);
  failed = false;
  current = &l;
  run_grid();
  current = nullptr;
  self = nullptr;
  return note(failed ? cudaErrorLaunchFailure : cudaSuccess);
}

cudaError_t func_set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) {
    return note(cudaErrorInvalidValue);
  }
  max_shared[kernel] = value;
  return cudaSuccess;
}

cudaError_t get_device(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t device_get_attribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return note(cudaErrorInvalidDevice);
  const int found = device_attribute(attribute);
  if (found < 0) return note(cudaErrorInvalidValue);
  *value = found;
  return cudaSuccess;
}

cudaError_t get_last_error() { return std::exchange(last_error, cudaSuccess); }

cudaError_t peek_at_last_error() { return last_error; }

const char* get_error_string(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorLaunchFailure:
      return error_text.c_str();
    default:
      return "unrecognized error code";
  }
}

}  // namespace cusim

const char* cusim_error() { return cusim::failed ? cusim::error_text.c_str() : nullptr; }

void cusim_order(int mode, unsigned seed) {
  cusim::order_mode = mode;
  cusim::order_seed = seed;
}

void cusim_device(int attribute, int value) {
  if (value < 0) {
    cusim::device_attributes.erase(attribute);
  } else {
    cusim::device_attributes[attribute] = value;
  }
}

void cusim_races_in_cluster_only(int yes) { cusim::races_in_cluster_only = yes; }
