// The features schedule on the GPU: distances between rows of features [N, D] of student and teacher,
// and their gradient, by the formulas of math/feature.h, of many layers in one launch.
//
// Blocks are dealt to layers, and walk over the rows of theirs. A block takes some rows at a time:
// each row is shared by some lanes of a warp, by the block, or, where neighbouring rows lie next to
// each other ([B, C, H, W] with features C), by threads that step through the features while their
// neighbours do so for the neighbouring rows. Rows stay in registers from the first sum to the
// gradient; those that are too long are read again for each of them. What is done once for a row,
// in double, one thread does, in shared memory. Tensors whose rows do not matter and that lie alike are
// rows of kFeaturesFlatRow elements.
//
// Traffic: student + teacher + gradient, once each (too long rows: all but the gradient up to four
// times, from the caches where they hold them). Saved for backward: the gradient, or nothing.
// A thread's sums over a row are in T, in double where it is read in parts; the block's are in double,
// in the order of threads, as is what adds up blocks and layers: the same bits, run after run.
#pragma once
#include "cuda/features_rows.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace fastkd::cuda {

enum Side { kStudent, kTeacher };

// What all threads know of a row.
template <class T>
struct RowState {
  FeatureScale student;
  T first[2][2];             // values of both sides, of the rows at hand and of those before
  double mean[2];            // beyond the first value
  T offset[2], factor[2];    // the mean and the scale
  T k, slope_mean, slope_p;  // of the gradient: k (u - slope_mean - x slope_p)
  bool again[2];             // the squares leave the range of T
};

// One layer, for the blocks that it has been dealt.
template <class T, class K, class Distance>
class FeaturesWalk : BlockRows<T, K> {
  using Rows = BlockRows<T, K>;
  using Rows::by, Rows::counts, Rows::give, Rows::layer, Rows::part, Rows::take;
  using typename Rows::Place;
  static constexpr int kRows = K::kRows, kPacks = K::template kKept<T>, kKept = kFeaturesKept<T>;

 public:
  __device__ __forceinline__ FeaturesWalk(const FeaturesParams<T>& P, int l)
      : Rows(P.layers[l], reinterpret_cast<double*>(states_of_block() + P.state_rows)),
        P(P),
        l(l),
        states(states_of_block()) {}

  // Returns what this thread adds to the sum of the rows' losses.
  template <Feature F>
  __device__ __forceinline__ double run() const {
    double loss = 0;
    int turn = 0;
    for (int64_t first = (blockIdx.x - layer.first_block) * int64_t(layer.rows); first < layer.N;
         first += int64_t(layer.blocks) * layer.rows) {
      if constexpr (F == Feature::kPlain) {
        plain(first, loss);
      } else {
        normalized<F == Feature::kStandardized>(first, turn, loss);
        turn = 1 - turn;
      }
    }
    return loss;
  }

 private:
  const FeaturesParams<T>& P;
  const int l;
  RowState<T>* states;

  // Not kept: its numbers are constants of the launch.
  __device__ __forceinline__ Distance distance() const { return Distance(P.smooth_l1); }
  static __device__ __forceinline__ RowState<T>* states_of_block() {
    return reinterpret_cast<RowState<T>*>(ptx::dynamic_shared());
  }
  __device__ __forceinline__ double weight(int64_t row) const { return layer.weight ? double(layer.weight[row]) : 1.0; }
  __device__ __forceinline__ double gradient_scale(int64_t row, double weight) const {
    const double scale = P.scales ? P.scales[l] : layer.scale;
    return scale * layer.layer_weight * weight *
           (P.upstream ? double(P.upstream[(layer.first_row + row) * P.upstream_stride]) : 1.0);
  }
  __device__ __forceinline__ void keep(int64_t row, double loss) const {
    if (P.row_loss && row < layer.N) P.row_loss[layer.first_row + row] = T(loss * layer.layer_weight);
  }

  // Of rows that do not count, zeros, unless one of its pack does.
  __device__ __forceinline__ void load(const Place& place, int begin, RawPacks<T, K>& s, RawPacks<T, K>& t) const {
    const int end = place.any ? place.end(begin, part()) : 0;
    s.load(layer.student, place.at.student, begin, end, by);
    t.load(layer.teacher, place.at.teacher, begin, end, by);
  }
  // Of rows that do not count, zeros.
  __device__ __forceinline__ void load(const Place& place, int begin, T* s, T* t) const {
    RawPacks<T, K> raw_s, raw_t;
    load(place, begin, raw_s, raw_t);
    raw_s.unpack(layer.student.dtype, s);
    raw_t.unpack(layer.teacher.dtype, t);
    if constexpr (kRows > 1) {
      if (!layer.mask) return;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (!place.here[i % kRows]) s[i] = t[i] = 0;
      }
    }
  }

  __device__ __forceinline__ void plain(int64_t first, double& loss) const {
    const Place place(*this, first);
    T k[kRows];
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      k[q] = place.here[q] ? T(2 * gradient_scale(place.row + q, weight(place.row + q))) : T(0);
    }
    for (int begin = 0; begin < layer.packs; begin += part()) {
      RawPacks<T, K> s, t;
      load(place, begin, s, t);
      const int64_t step = by.threads * layer.grad.step;
      char* at = place.at.grad + int64_t(begin + by.rank) * layer.grad.step;
      int left = place.end(begin, part()) - by.rank;
      T sum[kRows] = {};
#pragma unroll
      for (int j = 0; j < kPacks; ++j, left -= by.threads, at += step) {
        T a[K::kElements], b[K::kElements];
        s.unpack(layer.student.dtype, j, a);
        t.unpack(layer.teacher.dtype, j, b);
#pragma unroll
        for (int i = 0; i < K::kElements; ++i) {
          const int q = i % kRows;
          const T e = kRows == 1 || place.here[q] ? a[i] - b[i] : T(0), u = distance().half_slope(e);
          sum[q] += distance().value(e, u);
          a[i] = k[q] * u;
        }
        if (layer.grad.data) store_packs<K::kElements, 1>(layer.grad.dtype, at, step, left, by.threads, a);
      }
      if (P.row_loss) {
        give(0, sum, begin == 0);
        continue;
      }
#pragma unroll
      for (int q = 0; q < kRows; ++q) loss += place.here[q] ? double(sum[q]) * weight(place.row + q) : 0;
    }
    if (!P.row_loss) return;
    __syncthreads();
    for (int r = threadIdx.x; r < by.rows; r += kFeaturesThreads) {
      const double of_row = counts(first + r) ? take(0, r) * weight(first + r) : 0;
      loss += of_row;
      keep(first + r, of_row);
    }
    __syncthreads();
  }

  // ---- rows that are normalised: sum after sum over what a thread keeps, then the gradient

  enum Step { kMean, kSquares, kMeanAgain, kSquaresAgain, kLoss, kGradient, kDone };

  // Whoever has the first values of a row tells the others. They may still be at the rows before.
  __device__ __forceinline__ void give_first(const T* s, const T* t, int turn) const {
#pragma unroll
    for (int q = 0; by.rank == 0 && q < kRows; ++q) {
      states[by.row + q].first[turn][kStudent] = s[q];
      states[by.row + q].first[turn][kTeacher] = t[q];
    }
    __syncthreads();
  }

  // In S: T, or double where the range of T is too small for squares.
  template <class S, bool kCentred>
  __device__ __forceinline__ void give_statistics(Side side, bool mean, const T* values, int end, int turn,
                                                  bool first_part) const {
    S first[kRows], offset[kRows], found[kRows] = {};
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      const RowState<T>& state = states[by.row + q];
      first[q] = S(state.first[turn][side]);
      offset[q] = mean ? S(0) : sizeof(S) == sizeof(T) ? S(state.offset[side]) : S(state.mean[side]);
    }
#pragma unroll
    for (int i = 0, left = end - by.rank; i < kKept; ++i) {
      const int q = i % kRows;
      S d = S(values[i]);
      if (kCentred) d = left > 0 ? (d - first[q]) - offset[q] : S(0);
      found[q] += mean ? d : d * d;
      if ((i + 1) % K::kElements == 0) left -= by.threads;
    }
    give(side, found, first_part);
  }

  // What is taken from the values of this thread's rows, and what they are multiplied by.
  struct Scales {
    T first[kRows], offset[kRows], factor[kRows];
    __device__ __forceinline__ Scales(const FeaturesWalk& walk, int turn, Side side) {
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        const RowState<T>& state = walk.states[walk.by.row + q];
        first[q] = state.first[turn][side];
        offset[q] = state.offset[side];
        factor[q] = state.factor[side];
      }
    }
    template <bool kCentred>
    __device__ __forceinline__ T of(T value, int q) const {
      return product(kCentred ? (value - first[q]) - offset[q] : value, factor[q]);
    }
  };

  template <bool kCentred>
  __device__ __forceinline__ void add_loss(const T* s, const T* t, int end, const Scales& a, const Scales& b,
                                           T (&found)[3][kRows]) const {
#pragma unroll
    for (int i = 0, left = end - by.rank; i < kKept; ++i) {
      const int q = i % kRows;
      T x = a.template of<kCentred>(s[i], q), e = x - b.template of<kCentred>(t[i], q);
      if (kCentred && left <= 0) x = e = 0;
      if ((i + 1) % K::kElements == 0) left -= by.threads;
      const T u = distance().half_slope(e);
      found[0][q] += distance().value(e, u);
      found[1][q] += x * u;
      if (kCentred) found[2][q] += u;
    }
  }

  template <bool kCentred>
  __device__ __forceinline__ void write_gradient(const Place& place, int begin, T* s, const T* t, const Scales& a,
                                                 const Scales& b) const {
    T k[kRows], mean[kRows], p[kRows];
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      const RowState<T>& state = states[by.row + q];
      k[q] = state.k;
      mean[q] = state.slope_mean;
      p[q] = state.slope_p;
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int q = i % kRows;
      const T x = a.template of<kCentred>(s[i], q), u = distance().half_slope(x - b.template of<kCentred>(t[i], q));
      s[i] = k[q] * ((kCentred ? u - mean[q] : u) - x * p[q]);
    }
    store_packs<K::kElements, kPacks>(layer.grad.dtype, place.at.grad + int64_t(begin + by.rank) * layer.grad.step,
                                      by.threads * layer.grad.step, place.end(begin, part()) - by.rank, by.threads, s);
  }

  // What one thread does for a row once its sums are there. Returns whether they are wanted again.
  __device__ __forceinline__ bool finish(int step, int64_t first, double& loss) const {
    bool again = false;
    const int tasks = step == kLoss ? by.rows : 2 * by.rows;
    for (int i = threadIdx.x; i < tasks; i += kFeaturesThreads) {
      const int r = i % by.rows, side = i / by.rows;
      RowState<T>& state = states[r];
      if (step == kLoss) {
        loss += finish_loss(state, r, first + r);
      } else if (step == kMean || (step == kMeanAgain && state.again[side])) {
        state.mean[side] = take(side, r) / double(layer.D);
        state.offset[side] = T(state.mean[side]);
      } else if (step == kSquares || (step == kSquaresAgain && state.again[side])) {
        const double squares = take(side, r);
        const FeatureScale found = feature_scale(P.feature, 0, squares, layer.D);
        const bool out_of_range = sizeof(T) == 4 && !in_float_range(squares);
        state.again[side] = step == kSquares && out_of_range && counts(first + r);
        again |= state.again[side];
        state.factor[side] = T(found.factor);
        if (side == kStudent) state.student = found;
      }
    }
    return again;
  }
  __device__ __forceinline__ double finish_loss(RowState<T>& state, int r, int64_t row) const {
    const bool here = counts(row);
    const double w = here ? weight(row) : 0, loss = here ? take(0, r) * loss_share(P.feature) * w : 0;
    keep(row, loss);
    if (!layer.grad.data) return loss;
    FeatureSlope slope{0, 0, 0};
    if (here) {
      const double sum_u = centred(P.feature) ? take(2, r) : 0;
      slope = feature_slope(P.feature, state.student, sum_u, take(1, r), layer.D, gradient_scale(row, w));
    }
    state.k = T(slope.k);
    state.slope_mean = T(slope.mean);
    state.slope_p = T(slope.p);
    return loss;
  }

  template <bool kCentred>
  __device__ __forceinline__ int step_after(int step, bool again) const {
    switch (step) {
      case kMean:
        return kSquares;
      case kSquares:
        return !again ? kLoss : kCentred ? kMeanAgain : kSquaresAgain;
      case kMeanAgain:
        return kSquaresAgain;
      case kSquaresAgain:
        return kLoss;
      default:
        return layer.grad.data ? kGradient : kDone;
    }
  }

  template <bool kCentred>
  __device__ __forceinline__ void normalized(int64_t first, int turn, double& loss) const {
    const Place place(*this, first);
    T s[kKept], t[kKept];
    const bool whole = layer.packs <= part();
    bool loaded = false;
#pragma unroll 1
    for (int step = kCentred ? kMean : kSquares; step != kDone;) {
      const bool careful = step == kMeanAgain || step == kSquaresAgain;
      const bool mean = kCentred && (step == kMean || step == kMeanAgain);
#pragma unroll 1
      for (int begin = 0; begin < layer.packs; begin += part()) {
        const int end = place.end(begin, part());
        if (!whole || !loaded) load(place, begin, s, t);
        if (kCentred && !loaded) give_first(s, t, turn);
        loaded = true;
        if (step == kGradient) {
          write_gradient<kCentred>(place, begin, s, t, {*this, turn, kStudent}, {*this, turn, kTeacher});
        } else if (step == kLoss) {
          T found[3][kRows] = {};
          add_loss<kCentred>(s, t, end, {*this, turn, kStudent}, {*this, turn, kTeacher}, found);
#pragma unroll
          for (int i = 0; i < (kCentred ? 3 : 2); ++i) give(i, found[i], begin == 0);
        } else if (careful) {
          give_statistics<double, kCentred>(kStudent, mean, s, end, turn, begin == 0);
          give_statistics<double, kCentred>(kTeacher, mean, t, end, turn, begin == 0);
        } else {
          give_statistics<T, kCentred>(kStudent, mean, s, end, turn, begin == 0);
          give_statistics<T, kCentred>(kTeacher, mean, t, end, turn, begin == 0);
        }
      }
      if (step == kGradient) return;
      __syncthreads();
      const bool again = __syncthreads_or(finish(step, first, loss));
      step = step_after<kCentred>(step, again);
    }
  }
};

// The layer of a block.
template <class T>
__device__ int layer_of(const FeaturesParams<T>& P, int block) {
  int layer = 0, end = P.count;
  while (end - layer > 1) {
    const int middle = (layer + end) / 2;
    if (P.layers[middle].first_block <= block) {
      layer = middle;
    } else {
      end = middle;
    }
  }
  return layer;
}

template <Feature F, class Distance, class K, class T>
__device__ __forceinline__ void walk(const FeaturesParams<T>& P, int l) {
  double loss = FeaturesWalk<T, K, Distance>(P, l).template run<F>();
  if (!P.partials) return;
  __syncthreads();  // others may still read the rows' states
  loss = block_sum<kFeaturesThreads / 32>(loss, reinterpret_cast<double*>(ptx::dynamic_shared()));
  if (threadIdx.x == 0) P.partials[blockIdx.x] = loss;
}

// Blocks that share a multiprocessor where nothing is normalized. Of smooth L1 the compiler wants a register more than
// three of them leave, on GPUs of before clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class Distance>
inline constexpr int kPlainBlocks = Distance::kSquares ? 3 : 2;
#else
template <class Distance>
inline constexpr int kPlainBlocks = 3;
#endif

// grid: the layers' blocks, one layer after the other.
template <class T, Feature F, class Distance>
__global__ void __launch_bounds__(kFeaturesThreads, sizeof(T) == 8         ? 1
                                                    : F == Feature::kPlain ? kPlainBlocks<Distance>
                                                                           : 2)
    features_kernel(const __grid_constant__ FeaturesParams<T> P) {
  const int l = layer_of(P, blockIdx.x);
  with_pack(P.layers[l], [&](auto pack) { walk<F, Distance, decltype(pack)>(P, l); });
}

}  // namespace fastkd::cuda
