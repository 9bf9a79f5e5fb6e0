// How a layer's rows are dealt to the threads of a block, and layers to blocks. Host code, by
// arithmetic alone.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/features_launch.h"

namespace fastkd::cuda {

// The tensors of a layer as the binding knows them, for a walk over rows [N, D]: those that are
// there, and the layer's leading sizes.
template <class F>
void for_each_tensor(F&& f, FeaturesTensor& student, FeaturesTensor& teacher, FeaturesTensor& grad) {
  f(student);
  if (teacher.data) f(teacher);
  if (grad.data) f(grad);
}

inline int64_t power_of_2_from(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// Whether every row, and along it every step, begins at a multiple of so many elements, or of 16 bytes
// where they have more. step: that of whole packs, in bytes.
template <class T>
bool packs_are_aligned(FeaturesPart<T>& layer, int elements, int first_dim, bool steps) {
  bool aligned = true;
  const auto look = [&](const FeaturesTensor& x) {
    const int64_t bytes = std::min<int64_t>(16, int64_t(elements) * x.element_size);
    aligned = aligned && reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && (!steps || x.step % bytes == 0);
    for (int d = 0; d < first_dim; ++d) aligned = aligned && x.stride[d] % bytes == 0;
  };
  for_each_tensor(look, layer.student, layer.teacher, layer.grad);
  return aligned;
}

// Of a layer whose tensors, sizes, N and D are known, each step that of one feature: packs, and who
// takes them. keep: the features of a row should all stay in registers.
template <class T>
void plan_rows(FeaturesPart<T>& layer, bool keep) {
  const int kept = kFeaturesKept<T>, last = layer.dims - 1;
  bool features = true, rows = layer.dims > 0 && layer.D > 1;
  const auto look = [&](const FeaturesTensor& x) {
    features = features && x.step == x.element_size;
    rows = rows && x.step != x.element_size && x.stride[last] == x.element_size;
  };
  for_each_tensor(look, layer.student, layer.teacher, layer.grad);
  layer.pack = FeaturesPack::kElement;
  layer.packs = int32_t(layer.D);
  layer.side_by_side = rows;
  if (kInPacks<T> && features && layer.D % kFeaturesPack == 0 &&
      packs_are_aligned(layer, kFeaturesPack, layer.dims, false)) {
    layer.pack = FeaturesPack::kFeatures;
    layer.packs = int32_t(layer.D / kFeaturesPack);
    for_each_tensor([](FeaturesTensor& x) { x.step *= kFeaturesPack; }, layer.student, layer.teacher, layer.grad);
  } else if (kInPacks<T> && rows && layer.size[last] % kRowsPack == 0 &&
             packs_are_aligned(layer, kRowsPack, last, true)) {
    layer.pack = FeaturesPack::kRows;
  }
  layer.all_packs = layer.N * layer.packs;
  if (layer.side_by_side) {
    // as many threads as keep a row, so few that their accesses stay wide; at least one of each warp
    const int per_row = layer.pack == FeaturesPack::kRows ? kRowsPack : 1;
    const int64_t per_thread = kept / per_row, most = !keep ? 16 : per_row == 1 ? 64 : 128;
    const int64_t wanted = power_of_2_from((layer.packs + per_thread - 1) / per_thread);
    layer.threads = int(std::clamp<int64_t>(wanted, kFeaturesThreads / 32, most));
    layer.rows = kFeaturesThreads / layer.threads * per_row;
    return;
  }
  // of single elements at first few a thread: so neighbouring threads take neighbours
  const int64_t per_thread = layer.pack == FeaturesPack::kFeatures ? kept / kFeaturesPack
                             : layer.packs <= 256                  ? 8
                                                                   : kept;
  const int64_t wanted = power_of_2_from((layer.packs + per_thread - 1) / per_thread);
  layer.threads = int(std::clamp<int64_t>(wanted, 2, kFeaturesThreads));
  layer.rows = kFeaturesThreads / layer.threads;
}

// The same where rows do not matter and the tensors lie alike, without gaps.
template <class T>
void plan_flat(FeaturesPart<T>& layer, int64_t numel) {
  const auto flatten = [](FeaturesTensor& x) {
    x.stride[0] = kFeaturesFlatRow<T> * x.element_size;
    x.step = x.element_size;
  };
  for_each_tensor(flatten, layer.student, layer.teacher, layer.grad);
  layer.D = kFeaturesFlatRow<T>;
  layer.N = (numel + layer.D - 1) / layer.D;
  layer.dims = 1;
  layer.size[0] = layer.N;
  layer.threads = kFeaturesThreads;
  layer.rows = 1;
  const bool packs = kInPacks<T> && numel % kFeaturesPack == 0 && packs_are_aligned(layer, kFeaturesPack, 1, false);
  const int step = packs ? kFeaturesPack : 1;
  layer.pack = packs ? FeaturesPack::kFeatures : FeaturesPack::kElement;
  layer.packs = int32_t(layer.D / step);
  layer.all_packs = numel / step;
  for_each_tensor([&](FeaturesTensor& x) { x.step *= step; }, layer.student, layer.teacher, layer.grad);
}

// What a launch of some layers needs beside them.
struct FeaturesGrid {
  int64_t blocks = 0;
  int32_t rows = 0, room = 0;  // the most of a layer: rows of a block; doubles of one sum
};

// Deals blocks to the layers of a launch, by what they have to move.
template <class T>
FeaturesGrid plan_blocks(FeaturesPart<T>* layers, int count, const Device& device) {
  constexpr int64_t kWaves = 16;  // blocks a multiprocessor: several at a time, and an even load at the end
  double all = 0;
  for (int l = 0; l < count; ++l) all += double(layers[l].N) * double(layers[l].D);
  FeaturesGrid grid;
  for (int l = 0; l < count; ++l) {
    FeaturesPart<T>& layer = layers[l];
    const int64_t steps = (layer.N + layer.rows - 1) / layer.rows;
    const double share = double(layer.N) * double(layer.D) / (all > 0 ? all : 1);
    layer.first_block = int32_t(grid.blocks);
    layer.blocks = int32_t(std::min<int64_t>(steps, int64_t(share * double(kWaves * device.multiprocessors)) + 1));
    grid.blocks += layer.blocks;
    const int warps = layer.side_by_side ? kFeaturesThreads / 32 : std::max(layer.threads / 32, 1);
    grid.rows = std::max(grid.rows, layer.rows);
    grid.room = std::max(grid.room, layer.rows * warps);
  }
  return grid;
}

}  // namespace fastkd::cuda
