// Keeps memory busy while a row is computed.
#pragma once
#include "cpu/memory.h"
#include "cpu/rows_kernel.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Classes between two prefetches and two stores: few enough to keep memory busy, enough to
// pay for starting the loop (128 was 5 % slower, 512 6 %).
constexpr int64_t kChunk = 256;
static_assert(kRowsBlock % kChunk == 0 && kChunk % kLanes == 0);

// Asks for the next row's bytes, a few lines between two chunks of arithmetic, so that memory
// and arithmetic overlap; left alone the core does one, then the other (2048 x 32000 fp32:
// 49 ms without, 38 ms with).
class Prefetch {
 public:
  Prefetch() = default;  // nothing
  template <class T>
  Prefetch(const RowsParams<T>& P, int64_t row, int64_t end, int passes) {
    if (!P.prefetch || row + 1 >= end) return;
    const int64_t calls = passes * ((P.V + kChunk - 1) / kChunk);
    student_.start(P.student, row + 1, P.V, calls);
    teacher_.start(P.teacher, row + 1, P.V, calls);
  }
  void some() {
    student_.some();
    teacher_.some();
  }

 private:
  struct Stream {
    const char* at = nullptr;
    int64_t bytes = 0, lines = 0;
    void start(const RowsTensor& x, int64_t row, int64_t V, int64_t calls) {
      if (x.stride_v != 1) return;
      at = x.row(row);
      bytes = V * x.element_size;
      lines = (bytes / 64 + calls) / calls;
    }
    void some() {
      for (int64_t i = 0; i < lines && bytes > 0; ++i, at += 64, bytes -= 64) __builtin_prefetch(at, 0, 2);
    }
  };
  Stream student_, teacher_;
};

}  // namespace
}  // namespace fastkd::FASTKD_ISA
