// The fibers that are a launch's threads, the state that cusim keeps of them, and switching between them. A part of
// cusim.cpp, which alone includes it.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "context.h"
#include "sanitizer.h"

namespace cusim {
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

// Sets of lanes are bits, as those of a mask are.
struct Warp {
  std::span<Fiber> lanes;
  std::vector<std::unique_ptr<Exchange>> exchanges;
  unsigned ready = 0;  // lanes whose state is that
  unsigned alike = 0;  // lanes that wait at one collective, with one mask; other lanes may, too
  const Fiber* first_alike = nullptr;
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

// Of lanes that do as they should the texts are one, and need not be read.
bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }

bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }

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

void set_state(Fiber& f, State state) {
  const unsigned bit = 1u << f.lane;
  f.state = state;
  f.warp->ready = (f.warp->ready & ~bit) | (state == State::kReady ? bit : 0);
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
  set_state(*f, State::kReturned);
  end_thread(*f->block);
  yield(true);
  __builtin_trap();
}

void prepare_stack(Fiber& f) {
  unpoison(f.stack + kGuard, kStack - kGuard);
  f.sp = new_context(f.stack, kStack, fiber_main);
}

}  // namespace
}  // namespace cusim
