// Memory of the programs for the sanitizers.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace fastkd {

// Begins 16-byte aligned and ends where its last byte does: reading past it is seen. All NaN: so is
// reading what nobody wrote.
struct Memory {
  explicit Memory(int64_t bytes) {
    if (posix_memalign(&data, 16, size_t(bytes))) abort();
    std::memset(data, 0xff, size_t(bytes));
  }
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  void* data;
};

}  // namespace fastkd
