// Memory for one call's intermediate results.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "common/check.h"

namespace fastkd {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// n elements, which nobody has written yet.
template <class T>
Buffer<T> make_buffer(int64_t n) {
  const int64_t bytes = (n * int64_t(sizeof(T)) / 4096 + 1) * 4096;
  Buffer<T> memory(static_cast<T*>(std::aligned_alloc(4096, bytes)));
  FASTKD_CHECK(memory, "out of memory: ", bytes, " bytes");
  return memory;
}

// The calling thread's scratch memory. It is kept from call to call: its first touch would cost more
// than a small loss. What it held is lost when more is asked for.
inline void* scratch(int64_t bytes) {
  thread_local Buffer<char> memory;
  thread_local int64_t capacity = 0;
  if (capacity < bytes) {
    memory.reset();
    capacity = 0;
    memory = make_buffer<char>(bytes);
    capacity = bytes;
  }
  return memory.get();
}

}  // namespace fastkd
