// The triples schedule on the CPU: RKD's angles, and on request its distances by the pairs schedule.
//
//   loss = angle_weight / N^3 sum_aik Huber(psi_student - psi_teacher) + distance_weight * pairs_loss
//   M = q alpha - q^2 beta - K / 2, W = 2 (M + M^T), grad = angle_weight / N^3 (diag(W 1) X - W X)
//
// with what triples_kernel.cpp says. O(N^2 D) by the BLAS and N^3 / 2 triples, in one sweep that gives
// loss and gradient. Strips of vertices a: q, h, alpha, beta of a strip with all rows [kStrip, N]. For
// every strip all tiles (i, k) of blocks of kBlock rows with block i <= block k; h_ik comes from the
// strip, or from another Gram tile where row i is not in it. K_ik is summed over the strip's vertices
// in cache; it is kept in the strip, or multiplied with X at once. Memory: both embeddings, centred, in
// double, W X and the strip; O(N).
//
// Distances, and what those of student and teacher differ by, are rounded once, from double. psi cancels
// by d_ai / d_ak, psi_student - psi_teacher by what a distance grew: where either is large, all is
// computed in double.
//
// Sums do not depend on the number of threads. Blocks and parts of a strip have fixed sizes. In round r
// block i meets block (r - i) mod blocks, so that a block occurs once in a round and its alpha and beta
// have one writer. Products run on one thread each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/relations_inputs.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/pairs.h"
#include "cpu/scratch.h"
#include "cpu/triples_kernel.h"

namespace fastkd {
namespace {

using torch::stable::parallel_for;

#ifndef FASTKD_TRIPLES_STRIP
#define FASTKD_TRIPLES_STRIP 512
#endif
constexpr int64_t kBlock = 128;                   // rows: a row of a tile's strips stays in L1
constexpr int64_t kStrip = FASTKD_TRIPLES_STRIP;  // vertices at the most
constexpr int64_t kParts = 8;                     // of a strip's vertices, dealt to threads
constexpr int64_t kFeatures = 256;                // columns of W X that are computed at once
constexpr int64_t kPadding = 16;                  // rows and columns of tiles are padded to it

// Of squared distances, in all pairs and from teacher to student; beyond, a float has too few digits.
constexpr double kMostSpread = 1024, kMostGrowth = 64;

template <class T>
const TriplesKernel<T>& kernel() {
#if FASTKD_X86
  switch (isa()) {
    case Isa::kBaseline:
      break;
    case Isa::kAvx2:
      return avx2::triples_kernel<T>();
    case Isa::kAvx512:
      return avx512::triples_kernel<T>();
  }
#endif
  return baseline::triples_kernel<T>();
}

// f(0) .. f(tasks - 1), each on one thread, also where it multiplies matrices: a parallel region has two
// tasks at the least.
template <class F>
void for_each(int64_t tasks, F&& f) {
  parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < std::min(end, tasks); ++task) f(task);
  });
}

int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// RKD's angles, computed in T.
template <class T>
class Angles {
 public:
  // x [N, D]: the student's centred embeddings in T
  Angles(const Centred<double>& student, const Centred<double>& teacher, const T* x, double delta)
      : sides_{&student, &teacher},
        x_(x),
        delta_(T(delta)),
        N_(student.N),
        D_(student.D),
        block_(std::min(kBlock, padded(N_))),
        blocks_((N_ + block_ - 1) / block_),
        stride_(padded(N_) + kPadding) {
    for (int side = 0; side < 2; ++side) measure(side);
  }

  // False where T does not suffice, and nothing is done. grad [N, D], where it is not null:
  // += weight * the gradient.
  bool run(double weight, T* grad, double& loss) {
    const int64_t strips = (N_ + kStrip - 1) / kStrip, vertices = (blocks_ + strips - 1) / strips * block_;
    const double triples = double(N_) * double(N_) * double(N_);
    double sum = 0;
    memory_ = make_buffer<T>(std::min(vertices, N_) * kTriplesArrays * stride_);
    tiles_ = make_buffer<T>((blocks_ / 2 + 1) * tile_size() * kTileArrays);
    if (grad) {
      product_ = make_buffer<T>(N_ * D_);
      std::fill_n(product_.get(), N_ * D_, T(0));
      sums_.assign(blocks_ * block_, 0.0);
    }
    TriplesRange range{INFINITY, 0, INFINITY, 0, 0};
    for (int64_t begin = 0; begin < N_; begin += vertices) {
      strip_ = {memory_.get(), stride_, begin, std::min(vertices, N_ - begin)};
      fill_strip(range);
      if (sizeof(T) == 4 && !suffices(range)) return false;
      for (int64_t round = 0; round < blocks_; ++round) sum += play(round, grad != nullptr);
      if (grad) multiply_strip();
    }
    if (grad) write(grad, 2 * weight / triples * scale_[0]);
    loss = weight * sum / triples;
    return true;
  }

 private:
  struct Pair {
    int64_t i, k;  // blocks, i <= k
  };
  // Of a tile: h of both sides, and K of every part.
  static constexpr int64_t kTileArrays = 2 + kParts;

  int64_t tile_size() const { return block_ * block_; }
  T* tile_array(int64_t tile, int64_t array) const { return tiles_.get() + (tile * kTileArrays + array) * tile_size(); }
  int64_t first(int64_t block) const { return block * block_; }
  int64_t rows(int64_t block) const { return std::min(block_, N_ - first(block)); }
  bool in_strip(int64_t block) const {
    return first(block) >= strip_.begin && first(block) < strip_.begin + strip_.vertices;
  }

  static bool suffices(const TriplesRange& r) {
    return !(r.largest_student > kMostSpread * r.least_student || r.largest_teacher > kMostSpread * r.least_teacher ||
             r.largest_ratio > kMostGrowth);
  }

  // Norms, and the scale that makes squared distances 2 in the mean.
  void measure(int side) {
    const Centred<double>& x = *sides_[side];
    norms_[side] = make_buffer<double>(N_);
    double* norms = norms_[side].get();
    parallel_for(0, N_, 65536 / x.D + 1,
                 [&](int64_t begin, int64_t end) { k_.norms(x.row(begin), end - begin, x.D, norms + begin); });
    double sum = 0;
    for (int64_t i = 0; i < N_; ++i) sum += norms[i];
    scale_[side] = sum > 0 ? double(N_) / sum : 1;
  }

  // The squared distances of a tile, in the calling thread's scratch memory.
  TriplesSides distances(Pair p) const {
    double* memory = static_cast<double*>(scratch(2 * tile_size() * int64_t(sizeof(double))));
    for (int side = 0; side < 2; ++side) {
      const Centred<double>& x = *sides_[side];
      const double* norms = norms_[side].get();
      const TriplesGram gram{memory + side * tile_size(),
                             x.row(first(p.i)),
                             x.row(first(p.k)),
                             norms + first(p.i),
                             norms + first(p.k),
                             rows(p.i),
                             rows(p.k),
                             x.D,
                             p.i == p.k};
      gemm(Matrix<double>{gram.tile, gram.rows, gram.columns, gram.columns},
           Matrix<double>{gram.x_i, gram.rows, x.D, x.D},
           Matrix<double>{gram.x_k, gram.columns, x.D, x.D}.transposed());
      k_.distances(gram);
    }
    return {memory, memory + tile_size(), scale_[0], scale_[1], rows(p.i), rows(p.k)};
  }

  // The strip's vertices with all rows, and zeros for what is summed.
  void fill_strip(TriplesRange& range) {
    parallel_for(0, strip_.vertices, 65536 / stride_ + 1, [&](int64_t begin, int64_t end) {
      for (int64_t a = begin; a < end; ++a) {
        for (int64_t array = 0; array < kAlpha; ++array)
          std::fill(strip_.row(a, array) + N_, strip_.row(a, array + 1), T(0));
        std::fill(strip_.row(a, kAlpha), strip_.row(a + 1, 0), T(0));
      }
    });
    std::vector<Pair> tiles;  // of two that lie in the strip one is the other's transpose
    for (int64_t i = strip_.begin / block_; i < blocks_ && in_strip(i); ++i) {
      for (int64_t k = 0; k < blocks_; ++k) {
        if (k >= i || !in_strip(k)) tiles.push_back({i, k});
      }
    }
    std::vector<TriplesRange> found(tiles.size());
    for_each(int64_t(tiles.size()), [&](int64_t tile) { fill_tile(tiles[tile], found[tile]); });
    for (const TriplesRange& r : found) {
      range = {std::min(range.least_student, r.least_student), std::max(range.largest_student, r.largest_student),
               std::min(range.least_teacher, r.least_teacher), std::max(range.largest_teacher, r.largest_teacher),
               std::max(range.largest_ratio, r.largest_ratio)};
    }
  }

  void fill_tile(Pair p, TriplesRange& range) {
    const int64_t vertex = first(p.i) - strip_.begin, mirrored = first(p.k) - strip_.begin;
    range = k_.fill(distances(p), strip_, vertex, first(p.k));
    if (p.i == p.k || !in_strip(p.k)) return;
    const int64_t step = kTriplesArrays * stride_;
    for (int64_t array = 0; array < kAlpha; ++array) {
      const T* from = strip_.row(vertex, array) + first(p.k);
      T* to = strip_.row(mirrored, array) + first(p.i);
      for (int64_t k = 0; k < rows(p.k); ++k) {
        for (int64_t i = 0; i < rows(p.i); ++i) to[k * step + i] = from[i * step + k];
      }
    }
  }

  // All tiles of a round; returns the sum of their losses.
  double play(int64_t round, bool grad) {
    std::vector<Pair> pairs;
    for (int64_t i = 0; i < blocks_; ++i) {
      const int64_t k = (round + blocks_ - i) % blocks_;
      if (i <= k) pairs.push_back({i, k});
    }
    const int64_t tiles = int64_t(pairs.size());
    for_each(tiles, [&](int64_t tile) { fill_halves(pairs[tile], tile); });
    std::vector<double> losses(tiles * kParts);
    for_each(tiles * kParts,
             [&](int64_t task) { losses[task] = sweep(pairs[task % tiles], task % tiles, task / tiles, grad); });
    double sum = 0;
    for (const double x : losses) sum += x;
    if (grad) {
      for_each(tiles, [&](int64_t tile) {
        add_parts(pairs[tile], tile);
        if (!in_strip(pairs[tile].i)) multiply_tile(pairs[tile], tile);
      });
    }
    return sum;
  }

  // h_ik of a tile, padded with 0
  void fill_halves(Pair p, int64_t tile) {
    const int64_t n = rows(p.k);
    T *half = tile_array(tile, 0), *difference = tile_array(tile, 1);
    if (in_strip(p.i)) {
      for (int64_t i = 0; i < rows(p.i); ++i) {
        const int64_t vertex = first(p.i) - strip_.begin + i;
        std::copy_n(strip_.row(vertex, kHalf) + first(p.k), n, half + i * block_);
        std::copy_n(strip_.row(vertex, kHalfDifference) + first(p.k), n, difference + i * block_);
      }
    } else {
      k_.halves(distances(p), half, difference, block_);
    }
    for (T* out : {half, difference}) {
      for (int64_t i = 0; i < rows(p.i); ++i) std::fill(out + i * block_ + n, out + (i + 1) * block_, T(0));
      std::fill(out + rows(p.i) * block_, out + padded(rows(p.i)) * block_, T(0));
    }
  }

  double sweep(Pair p, int64_t tile, int64_t part, bool grad) const {
    const int64_t begin = strip_.vertices * part / kParts, end = strip_.vertices * (part + 1) / kParts;
    T* kappa = grad ? tile_array(tile, 2 + part) : nullptr;
    if (grad) std::fill_n(kappa, tile_size(), T(0));
    return k_.sweep(strip_,
                    TriplesTile<T>{tile_array(tile, 0), tile_array(tile, 1), kappa, block_, first(p.i),
                                   padded(rows(p.i)), first(p.k), padded(rows(p.k)), delta_},
                    begin, end);
  }

  // K of the strip's vertices: into the strip, or into the tile's first part.
  void add_parts(Pair p, int64_t tile) {
    for (int64_t i = 0; i < rows(p.i); ++i) {
      T* parts = tile_array(tile, 2) + i * block_;
      T* out = in_strip(p.i) ? strip_.row(first(p.i) - strip_.begin + i, kKappa) + first(p.k) : parts;
      for (int64_t k = 0; k < rows(p.k); ++k) {
        T sum = parts[k];
        for (int64_t part = 1; part < kParts; ++part) sum += parts[part * tile_size() + k];
        out[k] = sum;
      }
    }
  }

  // product_i -= K X_k and product_k -= K^T X_i
  void multiply_tile(Pair p, int64_t tile) {
    const Matrix<T> kappa{tile_array(tile, 2), rows(p.i), rows(p.k), block_};
    subtract_product(p.i, kappa, p.k);
    subtract_product(p.k, kappa.transposed(), p.i);
  }
  void subtract_product(int64_t to, const Matrix<T>& kappa, int64_t from) {
    const Matrix<T> out{product_.get() + first(to) * D_, kappa.rows, D_, D_};
    gemm(out, kappa, Matrix<T>{x_ + first(from) * D_, kappa.columns, D_, D_}, -1, 1);
    for (int64_t i = 0; i < kappa.rows; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < kappa.columns; ++k) {
        sum += double(kappa.data[i * kappa.row_stride + k * kappa.column_stride]);
      }
      sums_[first(to) + i] -= sum;
    }
  }

  // product_ += (M + M^T) X and sums_ += (M + M^T) 1, where M are the strip's rows.
  void multiply_strip() {
    for_each(blocks_,
             [&](int64_t block) { k_.weights(strip_, first(block), first(block) + rows(block), sums_.data()); });
    const int64_t pieces = (D_ + kFeatures - 1) / kFeatures;
    for_each(blocks_ * pieces, [&](int64_t task) {
      const int64_t block = task / pieces, d = task % pieces * kFeatures;
      if (d == 0) add_row_sums(block);
      multiply_rows(block, d, std::min(kFeatures, D_ - d));
    });
  }
  void add_row_sums(int64_t block) {
    if (!in_strip(block)) return;
    for (int64_t i = first(block); i < first(block) + rows(block); ++i) {
      sums_[i] += k_.sum(strip_.row(i - strip_.begin, kAlpha), N_);
    }
  }
  // Features d .. d + n of a block of rows.
  void multiply_rows(int64_t block, int64_t d, int64_t n) {
    const int64_t step = kTriplesArrays * stride_;
    const Matrix<T> out{product_.get() + first(block) * D_ + d, rows(block), n, D_};
    const Matrix<T> columns{strip_.row(0, kAlpha) + first(block), strip_.vertices, rows(block), step};
    gemm(out, columns.transposed(), Matrix<T>{x_ + strip_.begin * D_ + d, strip_.vertices, n, D_}, 1, 1);
    if (!in_strip(block)) return;
    const Matrix<T> own{strip_.row(first(block) - strip_.begin, kAlpha), rows(block), N_, step};
    gemm(out, own, Matrix<T>{x_ + d, N_, n, D_}, 1, 1);
  }

  // grad += scale (diag(W 1) X - W X)
  void write(T* grad, double scale) const {
    parallel_for(0, N_, 65536 / D_ + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double sum = sums_[i];
        const T *x = x_ + i * D_, *product = product_.get() + i * D_;
        T* out = grad + i * D_;
        for (int64_t d = 0; d < D_; ++d) out[d] += T(scale * (sum * double(x[d]) - double(product[d])));
      }
    });
  }

  const TriplesKernel<T>& k_ = kernel<T>();
  const Centred<double>* const sides_[2];  // student, teacher
  const T* const x_;                       // [N, D]
  const T delta_;
  const int64_t N_, D_, block_, blocks_, stride_;
  Buffer<double> norms_[2];  // [N]
  double scale_[2];
  Buffer<T> memory_;
  TriplesStrip<T> strip_;
  Buffer<T> tiles_;           // of one round
  Buffer<T> product_;         // W X [N, D]
  std::vector<double> sums_;  // W 1 [N]
};

// The weighted loss of the angles, computed in T or in more. grad [N, D_s], where it is not null:
// += its gradient.
template <class T>
double add_angles(const TriplesInputs& in, const Centred<T>& student, T* grad) {
  double loss = 0;
  if constexpr (sizeof(T) == 8) {
    Angles<double>(student, centre<double>(in.teacher), student.x, in.angle_delta).run(in.angle_weight, grad, loss);
  } else {
    const Centred<double> s = centre<double>(in.student), t = centre<double>(in.teacher);
    if (Angles<T>(s, t, student.x, in.angle_delta).run(in.angle_weight, grad, loss)) return loss;
    const int64_t n = grad ? s.N * s.D : 0;
    std::vector<double> wide(n);
    Angles<double>(s, t, s.x, in.angle_delta).run(in.angle_weight, grad ? wide.data() : nullptr, loss);
    for (int64_t i = 0; i < n; ++i) grad[i] += T(wide[i]);
  }
  return loss;
}

// grad [N, D_s], where it is not null: the gradient.
template <class T>
double triples_loss(const TriplesInputs& in, T* grad) {
  const Centred<T> student = centre<T>(in.student);
  const int64_t n = grad ? student.N * student.D : 0;
  double loss = 0;
  std::fill_n(grad, n, T(0));
  if (student.N < 2) return 0;
  if (in.distance_weight != 0) {
    const Centred<T> teacher = centre<T>(in.teacher);
    loss = in.distance_weight * pairs_loss(student, teacher, PairsOptions{in.distance_delta, true}, grad);
    for (int64_t i = 0; i < n; ++i) grad[i] *= T(in.distance_weight);
  }
  if (in.angle_weight != 0) loss += add_angles(in, student, grad);
  return loss;
}

void triples_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TriplesInputs in(arguments);
  check(in);
  Tensor loss = in.new_loss(), grad = in.new_grad(in.save);
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    const bool direct = grad.scalar_type() == in.compute();
    Tensor wide = in.save && !direct ? torch::stable::new_empty(grad, grad.sizes(), in.compute()) : grad;
    *static_cast<T*>(loss.mutable_data_ptr()) =
        T(triples_loss<T>(in, in.save ? static_cast<T*>(wide.mutable_data_ptr()) : nullptr));
    if (in.save && !direct) torch::stable::copy_(grad, wide);
  });
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("triples_fwd", &triples_fwd); }

}  // namespace fastkd
