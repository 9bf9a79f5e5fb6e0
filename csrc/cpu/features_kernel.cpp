// The features schedule on the CPU: distances between rows of features [N, D] of student and teacher,
// and their gradient, by the formulas of math/feature.h. Compiled once per instruction set.
//
// A row is read from memory once; its statistics, the sums of its differences and its gradient are
// three walks over what is in cache then. Traffic: student + teacher + gradient, once each.
#include "cpu/features_kernel.h"

#include <algorithm>

#include "common/enum.h"
#include "cpu/features_rows.h"
#include "cpu/features_side_by_side.h"
#include "cpu/memory.h"

namespace fastkd::FASTKD_ISA {
namespace {

bool rows_lie_side_by_side(const RowsTensor& x) { return x.stride_v != 1 && x.dims > 0 && x.stride[x.dims - 1] == 1; }

bool lie_side_by_side(const FeaturesLayer& layer) {
  return layer.D > 1 && rows_lie_side_by_side(layer.student) && rows_lie_side_by_side(layer.teacher) &&
         (!layer.grad.data || rows_lie_side_by_side(layer.grad));
}

// How many rows lie next to each other, from this one on.
int64_t run(const RowsTensor& x, int64_t row) { return x.size[x.dims - 1] - row % x.size[x.dims - 1]; }

// Runs in equal parts that fit a tile; several of them where they are short.
template <class T>
int64_t tile_rows(const FeaturesLayer& layer) {
  const int64_t length = std::min(run(layer.student, 0), run(layer.teacher, 0));
  const int64_t fits = kTileBytes / (2 * layer.D * int64_t(sizeof(T))) / kLanes * kLanes;
  const int64_t most = std::clamp(fits, kLanes, kMostRows);
  const int64_t parts = (length + most - 1) / most;
  return (length + parts - 1) / parts;
}

template <class T>
int64_t block_rows(const FeaturesLayer& layer) {
  const int64_t rows = kBlock / layer.D + 1;
  if (!lie_side_by_side(layer)) return rows;
  const int64_t tile = tile_rows<T>(layer);
  return std::max(rows / tile, int64_t(1)) * tile;
}

template <class T>
int64_t scratch_bytes(const FeaturesLayer& layer) {
  const int64_t row = layer.D > kFlatRow ? padded(layer.D) : kFlatRow;
  const int64_t elements = lie_side_by_side(layer) ? 2 * layer.D * padded(tile_rows<T>(layer)) : 3 * row;
  return elements * int64_t(sizeof(T));
}

template <class T, Feature F, class Distance>
double rows(const FeaturesLayer& layer, const FeaturesCall<T>& call, double scale, int64_t begin, int64_t end,
            void* scratch) {
  T* buffer = static_cast<T*>(scratch);
  const Distance distance(call.smooth_l1);
  double loss = 0;
  if (lie_side_by_side(layer)) {
    const int64_t tile = tile_rows<T>(layer);
    for (int64_t row = begin; row < end;) {
      int64_t n = std::min({end - row, tile, run(layer.student, row), run(layer.teacher, row)});
      if (layer.grad.data) n = std::min(n, run(layer.grad, row));
      loss += side_by_side<T, F>(layer, call, distance, scale, row, n, buffer);
      row += n;
    }
  } else {
    for (int64_t row = begin; row < end; ++row) {
      if (!counts(layer, row)) {
        keep(layer, call, row, 0);
        if (layer.grad.data) zero_row(layer.grad, row, layer.D, buffer);
      } else if constexpr (F == Feature::kPlain) {
        loss += plain_row(layer, call, distance, scale, row, buffer);
      } else {
        loss += normalized_row<T, F>(layer, call, distance, scale, row, buffer);
      }
    }
  }
  if (call.stream) stream_fence();
  return loss;
}

template <class T, Feature F, class Distance>
constexpr FeaturesKernel<T> kKernel{rows<T, F, Distance>, block_rows<T>, scratch_bytes<T>};

}  // namespace

template <class T>
const FeaturesKernel<T>& features_kernel(Feature feature, bool smooth_l1) {
  return with_constant(feature, [&](auto k) -> const FeaturesKernel<T>& {
    if constexpr (k.value != Feature::kCosine) {  // which is of squares
      if (smooth_l1) return kKernel<T, k.value, SmoothL1<T>>;
    }
    return kKernel<T, k.value, Squares<T>>;
  });
}
template const FeaturesKernel<float>& features_kernel(Feature, bool);
template const FeaturesKernel<double>& features_kernel(Feature, bool);

}  // namespace fastkd::FASTKD_ISA
