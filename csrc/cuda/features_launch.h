// The kernels of the features schedule, as the binding sees them: no torch header, no kernel.
#pragma once
#include <cuda_runtime_api.h>

#include "common/features_params.h"
#include "cuda/in_packs.h"
#include "cuda/rows_launch.h"

namespace fastkd::cuda {

inline constexpr int kFeaturesThreads = 256;  // of a block
inline constexpr int kFeaturesLayers = 32;    // of one launch: 11 KB of parameters
inline constexpr int kFeaturesDims = 4;       // separate leading dimensions
inline constexpr int64_t kFeaturesMost = int64_t(1) << 30;
// Elements of student and of teacher that a thread keeps in registers.
template <class T>
inline constexpr int kFeaturesKept = sizeof(T) == 4 ? 16 : 8;
// Of one row: the whole block's.
template <class T>
inline constexpr int64_t kFeaturesFlatRow = kFeaturesThreads * kFeaturesKept<T>;

// What is read and written at a time, a pack: so many features of a row that lie next to each other,
// one feature of so many rows that do, or an element.
enum class FeaturesPack : int32_t { kFeatures, kRows, kElement };
inline constexpr int kFeaturesPack = 8, kRowsPack = 4;

struct FeaturesTensor {
  char* data;                     // null: absent
  int64_t stride[kFeaturesDims];  // in bytes
  int64_t step;                   // bytes from one pack of a row to the next
  DType dtype;
  int32_t element_size;
};

template <class T>
struct FeaturesPart {                     // a layer
  FeaturesTensor student, teacher, grad;  // [N, D]
  int64_t size[kFeaturesDims];            // [dims], leading
  double inverse_size[kFeaturesDims];     // [dims]
  int32_t dims;
  FeaturesPack pack;
  int64_t N, D;
  int64_t all_packs;  // of all rows: the last row of a flat tensor is shorter
  int32_t packs;      // of a row
  int32_t threads;    // of a row, a power of 2
  bool side_by_side;  // neighbouring threads take neighbouring rows; else packs of a row
  int32_t rows;       // that a block takes at a time
  int32_t first_block, blocks;
  const bool* mask;            // [N], or null: every row counts
  const T* weight;             // [N], or null: 1
  double scale, layer_weight;  // scale: of the layer's sum, by its reduction
  int64_t first_row;           // among the rows of all layers
};

// T is the type that is computed in: float, or double where an input is double.
template <class T>
struct FeaturesParams {
  FeaturesPart<T> layers[kFeaturesLayers];  // [count]
  int32_t count;
  int32_t state_rows, room;  // the most of a layer: rows of a block; doubles of one sum
  Feature feature;
  bool of_smooth_l1;  // else of squares
  SmoothL1<T> smooth_l1;
  const double* scales;     // [count], where the host does not know them; or null
  const T* upstream;        // [rows of all layers], or null: 1
  int64_t upstream_stride;  // 0: one upstream for all rows
  T* row_loss;              // [rows of all layers], or null
  double* partials;         // [blocks], the blocks' sums of row losses; or null
};
template <class T>
cudaError_t features(const FeaturesParams<T>&, int64_t blocks, cudaStream_t);

// scales[l] = 1 / (divisor * rows of the layer that count), 0 where none does.
struct FeaturesCounts {
  int32_t count;
  const bool* mask[kFeaturesLayers];  // [N]
  int64_t N[kFeaturesLayers];
  double divisor[kFeaturesLayers];
  double* scales;  // [count], out
};
cudaError_t features_count(const FeaturesCounts&, cudaStream_t);

// The layers' losses from the blocks' sums, and what they add up to.
template <class T>
struct FeaturesLosses {
  int32_t count;
  int32_t first_block[kFeaturesLayers + 1];
  double scale[kFeaturesLayers], layer_weight[kFeaturesLayers];
  const double* scales;    // [count], instead of scale; or null
  const double* partials;  // [blocks]
  double* total;           // [], of the layers so far
  bool first;              // there are none so far
  T* layers;               // [count], out
  T* loss;                 // [], out; or null
};
template <class T>
cudaError_t features_finish(const FeaturesLosses<T>&, cudaStream_t);

}  // namespace fastkd::cuda
