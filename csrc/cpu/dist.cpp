// The dist ops on the CPU: deals chunks of rows, blocks of columns and rows to threads. Chunks are the same and are
// added in the same order whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/dist_op.h"
#include "common/layout.h"
#include "cpu/dist_kernel.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/scratch.h"

namespace fastkd {
namespace {

using torch::stable::parallel_for;

template <class T>
const DistKernel<T>& kernel() {
  return FASTKD_OF_ISA(dist_kernel<T>());
}

constexpr int64_t kChunks = 16, kLeastRows = 16;     // of few rows: chunks there should be, and rows of each
constexpr int64_t kWorth = 65536;                    // elements that are worth a thread
constexpr int64_t kStreamBytes = int64_t(16) << 20;  // a larger gradient goes past the caches

int64_t chunk_rows(int64_t N) { return std::clamp((N + kChunks - 1) / kChunks, kLeastRows, kDistChunk); }

template <class T>
class Columns {
 public:
  explicit Columns(const DistParams<T>& P) : P_(P), blocks_(dist_blocks(P.rows.V)), columns_(P.rows.V) {}

  // Returns the sum of the rows' losses.
  double add_rows() {
    const int64_t N = P_.rows.N, V = P_.rows.V, rows = chunk_rows(N), chunks = (N + rows - 1) / rows;
    const int64_t each = std::clamp<int64_t>(kWorth / (rows * V), 1, 64);  // chunks of a thread
    const int64_t at_once = std::min(chunks, each * int64_t(torch::stable::get_num_threads()));
    const int64_t size = DistChunk<T>::size(V);
    const Buffer<T> memory = make_buffer<T>(at_once * size);
    std::vector<DistChunk<T>> found(at_once);
    double losses = 0;
    for (int64_t first = 0; first < chunks; first += at_once) {
      const int64_t count = std::min(at_once, chunks - first);
      parallel_for(0, count, each, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          found[i] = {memory.get() + i * size, V};
          const int64_t row = (first + i) * rows;
          kernel<T>().chunk(P_, row, std::min(row + rows, N), found[i]);
        }
      });
      parallel_for(0, blocks_, std::max<int64_t>(kWorth / 16 / (count * kDistBlock), 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t b = begin; b < end; ++b) {
                       for (int64_t i = 0; i < count; ++i) {
                         if (found[i].count > 0) kernel<T>().add(found[i], b, columns_.data());
                       }
                     }
                   });
      for (int64_t i = 0; i < count; ++i) losses += found[i].losses;
    }
    return losses;
  }

  // The slopes of all columns; returns the sum of their losses.
  double finish() const {
    const int64_t V = P_.rows.V, stride = dist_padded(V);
    const double scale = P_.intra_weight * P_.temperature * P_.temperature / double(V);
    std::vector<double> losses(blocks_);
    std::fill(P_.columns, P_.columns + 3 * stride, T(0));
    parallel_for(0, blocks_, kWorth / 16 / kDistBlock, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin * kDistBlock; v < std::min(end * kDistBlock, V); ++v) {
        const ColumnMoments& x = columns_[v];
        const Correlation c = correlation<T>(x.sums, x.n, x.mean, x.teacher_mean, P_.eps);
        losses[v / kDistBlock] += c.loss;
        P_.columns[v] = T(scale * c.slope);
        P_.columns[stride + v] = T(scale * c.own);
        P_.columns[2 * stride + v] = T(scale * x.constant(c));
      }
    });
    double sum = 0;
    for (const double x : losses) sum += x;
    return sum;
  }

 private:
  const DistParams<T>& P_;
  const int64_t blocks_;
  std::vector<ColumnMoments> columns_;
};

struct Cpu {
  explicit Cpu(const Tensor&) {}
  static constexpr const char* kName = "on the CPU";
  static constexpr bool kValuesAtHand = true;
  static bool lies_with(const Tensor& x, const Tensor&) { return x.is_cpu(); }

  template <class T>
  void dist_forward(DistParams<T>& P, T* loss) const {
    prepare(P);
    Columns<T> columns(P);
    const double inter = columns.add_rows() * P.rows.grad_scale, intra = columns.finish() / double(P.rows.V);
    const double all = P.inter_weight * inter + P.intra_weight * intra;
    const bool some = P.rows.N > 0 && P.rows.grad_scale != 0;
    *loss = some ? T(P.temperature * P.temperature * all) : T(0);
  }

  template <class T>
  void dist_backward(DistParams<T>& P, const Tensor& grad) const {
    prepare(P);
    RowsParams<T>& R = P.rows;
    const int64_t bytes = R.N * R.V * R.grad.element_size;
    if (R.grad.data != R.student.data && bytes > kStreamBytes) {
      R.stream = R.grad.stride_v == 1;
      if (same_dense_layout(grad, grad)) {
        prepare_pages(R.grad.data, bytes, [](int64_t pages, auto&& f) { parallel_for(0, pages, 1, f); });
      }
    }
    parallel_for(0, R.N, (kWorth / 4 + R.V - 1) / R.V, [&](int64_t begin, int64_t end) {
      T* memory = static_cast<T*>(scratch(2 * dist_padded(R.V) * int64_t(sizeof(T))));
      kernel<T>().gradient(P, memory, begin, end);
    });
  }

 private:
  // What a call on the CPU is told besides: the scale as a number, and whether the next row is asked for.
  template <class T>
  static void prepare(DistParams<T>& P) {
    if (P.rows.scale) P.rows.grad_scale = *P.rows.scale;
    P.rows.prefetch = P.rows.V * (P.rows.student.element_size + P.rows.teacher.element_size) <= kRowBytes;
  }
  static constexpr int64_t kRowBytes = int64_t(512) << 10;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("dist_fwd", &DistOps<Cpu>::forward);
  m.impl("dist_bwd", &DistOps<Cpu>::backward);
}

}  // namespace fastkd
