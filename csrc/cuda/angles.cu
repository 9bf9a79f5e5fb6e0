// Launches of the angles schedule.
#include <algorithm>

#include "cuda/angles_gradient.cuh"
#include "cuda/launch.cuh"

namespace fastkd::cuda {
namespace {

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How the rows are dealt: blocks of rows, and parts of a block that a tile walks along.
struct AnglesPlan {
  int block, pitch, tiles, part, parts;  // pitch: of the matrices; tiles: of a block's side
  int64_t blocks, spread_slots, loss_slots;
  bool single() const { return blocks == 1; }
};

template <class T>
AnglesPlan angles_plan(const AnglesParams<T>& P, const Device& device) {
  AnglesPlan plan{};
  plan.block = int(std::min<int64_t>(P.N, P.block));
  plan.pitch = int(round_up(plan.block, kAnglesTile));
  plan.tiles = plan.pitch / kAnglesTile;
  plan.blocks = (P.N + plan.block - 1) / plan.block;
  // eight blocks of threads a multiprocessor, for an even load; no part without work for them
  const int64_t tiles = plan.single() ? plan.tiles * (3 * plan.tiles + 1) / 2 : 3 * plan.tiles * plan.tiles;
  const int64_t wanted = std::min<int64_t>({(8 * device.multiprocessors + tiles - 1) / tiles, 16, plan.pitch / kChunk});
  plan.part = int(round_up((plan.pitch + wanted - 1) / wanted, kChunk));
  plan.parts = (plan.pitch + plan.part - 1) / plan.part;
  plan.spread_slots = int64_t(plan.pitch / kDistanceTile) * (plan.pitch / kDistanceTile);
  plan.loss_slots = int64_t(plan.tiles) * plan.tiles * plan.parts;
  return plan;
}

// The workspace, and what is done with it.
template <class T>
class Angles {
 public:
  // workspace null: counts its bytes alone
  Angles(const AnglesParams<T>& P, const Device& device, void* workspace, cudaStream_t stream)
      : P_(P),
        plan_(angles_plan(P, device)),
        next_(static_cast<char*>(workspace)),
        stream_(stream),
        most_shared_(device.shared_memory) {
    const int64_t matrix = int64_t(plan_.pitch) * plan_.pitch;
    for (int n = 0; n < (plan_.single() ? 1 : 3); ++n) {
      for (int side = 0; side < 2; ++side) {
        distances_[n].half[side] = take<T>(matrix);
        distances_[n].inverse[side] = take<T>(matrix);
        if (sizeof(T) == 4) distances_[n].low[side] = take<T>(matrix);
      }
    }
    for (int n = 0; P.grad && n < (plan_.single() ? 1 : 2); ++n) gamma_[n] = take<T>(matrix * plan_.parts);
    edges_ = take<T>(matrix * plan_.parts);
    weights_ = take<T>(P.grad ? matrix : 0);
    spread_ = take<T>(4 * plan_.spread_slots);
    loss_ = take<double>(plan_.loss_slots);
    total_ = take<double>(1);
    careful_ = take<int>(1);
  }
  int64_t bytes() const { return bytes_; }

  cudaError_t operator()() {
    if (sizeof(T) == 4) FASTKD_CUDA_RETURN(find_spread());
    for (int64_t a = 0; a < plan_.blocks; ++a) {
      for (int64_t j = a; j < plan_.blocks; ++j) FASTKD_CUDA_RETURN(pair_of_blocks(a, j));
    }
    return cudaSuccess;
  }

 private:
  template <class X>
  X* take(int64_t count) {
    X* p = reinterpret_cast<X*>(next_ + bytes_);
    bytes_ += round_up(count * int64_t(sizeof(X)), 256);
    return p;
  }
  int64_t first(int64_t block) const { return block * plan_.block; }
  int rows(int64_t block) const { return int(std::min<int64_t>(plan_.block, P_.N - first(block))); }
  int tiles(int64_t block) const { return (rows(block) + kAnglesTile - 1) / kAnglesTile; }

  cudaError_t distances(int64_t i, int64_t j, DistancesMode mode, bool add, const Distances<T>& out) const {
    const int small = kAnglesTile / kDistanceTile, down = tiles(i) * small, across = tiles(j) * small;
    const bool mirror = plan_.single();
    const int slots = mirror ? down * (down + 1) / 2 : int(plan_.spread_slots);
    const DistancesTask<T> task{{P_.student, P_.teacher},
                                first(i),
                                first(j),
                                rows(i),
                                rows(j),
                                plan_.pitch,
                                P_.count,
                                mirror,
                                add,
                                mode,
                                out,
                                spread_,
                                slots,
                                careful_};
    const int64_t count = mirror ? slots : int64_t(down) * across;
    // room for the widest type, which a float's distances may need
    const int64_t shared = 2 * kDepth * kDistancePitch * int64_t(sizeof(double));
    return Launch(2 * count, dim3(kDistanceThreads), shared, stream_)(angles_distances_kernel<T>, task, across);
  }

  // Leaves the distances as well, where all rows are one block.
  cudaError_t find_spread() const {
    for (int64_t a = 0; a < plan_.blocks; ++a) {
      for (int64_t j = a; j < plan_.blocks; ++j) {
        FASTKD_CUDA_RETURN(distances(a, j, DistancesMode::kScan, a + j > 0, distances_[0]));
      }
    }
    return distances(0, 0, DistancesMode::kRefine, false, distances_[0]);
  }

  cudaError_t pair_of_blocks(int64_t a, int64_t j) {
    const auto decided = [&](int64_t i, int64_t k, const Distances<T>& out) {
      return distances(i, k, DistancesMode::kDecided, false, out);
    };
    AnglesTask<T> task{};
    task.aj = distances_[0];
    if (sizeof(T) == 8 || !plan_.single()) FASTKD_CUDA_RETURN(decided(a, j, task.aj));
    for (int64_t l = 0; l < plan_.blocks; ++l) {
      task.al = l == j ? task.aj : distances_[1];
      task.jl = a == j ? task.al : distances_[2];
      if (l != j) FASTKD_CUDA_RETURN(decided(a, l, task.al));
      if (a != j) FASTKD_CUDA_RETURN(decided(j, l, task.jl));
      FASTKD_CUDA_RETURN(triples(a, j, l, task));
    }
    return weights_and_gradient(a, j, task);
  }

  int64_t edge_blocks(int64_t a, int64_t j) const {
    return int64_t(tiles(a)) * (a == j ? tiles(a) + 1 : 2 * tiles(j)) / 2 * plan_.parts;
  }

  cudaError_t triples(int64_t a, int64_t j, int64_t l, AnglesTask<T>& task) const {
    task.tiles_a = tiles(a);
    task.tiles_j = tiles(j);
    task.first_a = first(a);
    task.first_j = first(j);
    task.first_l = first(l);
    task.count = P_.count;
    task.depth = int(round_up(rows(l), kChunk));
    task.part = plan_.part;
    task.parts = plan_.parts;
    task.pitch = plan_.pitch;
    task.diagonal = a == j;
    task.add = l > 0;
    task.gradient = P_.grad != nullptr;
    task.delta = T(P_.delta);
    task.gamma[0] = gamma_[0];
    task.gamma[1] = gamma_[1];
    task.edges = edges_;
    task.loss = loss_;
    task.careful = careful_;
    const int64_t vertex_blocks = P_.grad ? int64_t(task.tiles_a) * task.tiles_j * plan_.parts : 0;
    const int64_t blocks = vertex_blocks * (task.diagonal ? 1 : 2) + edge_blocks(a, j);
    const int64_t shared = angles_chunk_bytes<T>() + int64_t(sizeof(AnglesWork<T>));
    const Launch launch(blocks, dim3(kAnglesThreads), shared, stream_, most_shared_);
    return launch(angles_kernel<T>, task);
  }

  cudaError_t weights_and_gradient(int64_t a, int64_t j, const AnglesTask<T>& task) const {
    const bool last = a == plan_.blocks - 1;
    const WeightsTask<T> sums{task,   P_.N,    P_.weight, int(edge_blocks(a, j)), a + j == 0, last,
                              total_, P_.loss, weights_};
    const int small = kAnglesTile / kWeightsTile, across = tiles(j) * small;
    const int64_t blocks = 1 + (P_.grad ? int64_t(tiles(a)) * small * across : 0);
    const int64_t shared = 2 * kWeightsTile * (kWeightsTile + 1) * int64_t(sizeof(T));
    FASTKD_CUDA_RETURN(Launch(blocks, dim3(kWeightsThreads), shared, stream_)(angles_weights_kernel<T>, sums, across));
    if (!P_.grad) return cudaSuccess;
    FASTKD_CUDA_RETURN(gradient(a, j, false, a + j > 0));
    return a == j ? cudaSuccess : gradient(j, a, true, a > 0);
  }

  cudaError_t gradient(int64_t i, int64_t j, bool transposed, bool add) const {
    const GradientTask<T> task{P_.student, P_.grad,  weights_, plan_.pitch, transposed, add,
                               first(i),   first(j), rows(i),  rows(j),     P_.count};
    const int64_t down = (rows(i) + kGradientRows - 1) / kGradientRows;
    const int64_t across = (P_.student.D + kGradientFeatures - 1) / kGradientFeatures;
    return Launch(down * across, dim3(kGradientThreads), gradient_shared_bytes<T>(), stream_)(angles_gradient_kernel<T>,
                                                                                              task, int(across));
  }

  const AnglesParams<T>& P_;
  const AnglesPlan plan_;
  char* next_;
  int64_t bytes_ = 0;
  cudaStream_t stream_;
  int most_shared_;
  Distances<T> distances_[3]{};  // [A, J], [A, L], [J, L]
  T *gamma_[2]{}, *edges_, *weights_, *spread_;
  double *loss_, *total_;
  int* careful_;
};

}  // namespace

template <class T>
int64_t angles_workspace_bytes(const AnglesParams<T>& P, const Device& device) {
  return Angles<T>(P, device, nullptr, nullptr).bytes();
}
template <class T>
cudaError_t angles_forward(const AnglesParams<T>& P, const Device& device, void* workspace, cudaStream_t stream) {
  return Angles<T>(P, device, workspace, stream)();
}

#define FASTKD_INSTANTIATE(T)                                                        \
  template int64_t angles_workspace_bytes<T>(const AnglesParams<T>&, const Device&); \
  template cudaError_t angles_forward<T>(const AnglesParams<T>&, const Device&, void*, cudaStream_t);
FASTKD_INSTANTIATE(float)
FASTKD_INSTANTIATE(double)

}  // namespace fastkd::cuda
