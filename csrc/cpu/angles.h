// The angles schedule on the CPU: RKD's angles.
//
//   loss = 1 / N^3 sum_aik Huber(psi_student - psi_teacher)
//   M = q alpha - q^2 beta - K / 2, W = 2 (M + M^T), grad = 1 / N^3 (diag(W 1) X - W X)
//
// with what angles_kernel.cpp says. O(N^2 D) by the BLAS and N^3 / 2 triples, in one sweep that gives
// loss and gradient. Strips of vertices a: q, h, alpha, beta of a strip with all rows, [kStrip, N]. For
// every strip all tiles (i, k) of blocks of kBlock rows with block i <= block k; h_ik is read from the
// strip, or computed once more where row i is not in it. K_ik is summed over the strip's vertices in
// cache; it is kept in the strip, or multiplied with X at once. Memory: both embeddings, centred, in
// double, W X, the strip, and K of kBatch tiles in kParts; O(N).
//
// Distances, and what those of student and teacher differ by, are rounded once, from double. psi cancels
// by d_ai / d_ak, psi_student - psi_teacher by what a distance grew: where either is large, all is
// computed in double.
//
// A thread takes parts of a strip's vertices, whose alpha and beta are its own. Sums do not depend on
// the number of threads: parts, tiles and products are cut the same for any, and computed on one thread
// each.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/angles_kernel.h"
#include "cpu/embeddings.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace fastkd::angles {

using torch::stable::parallel_for;

inline constexpr int64_t kBlock = 128;             // rows: kPadding rows of a tile stay in L1
inline constexpr int64_t kStrip = 512;             // vertices at the most
inline constexpr int64_t kParts = 16, kPart = 16;  // of a strip, at the most; vertices of a part, at the least
inline constexpr int64_t kBatch = 16;              // tiles between two meetings of the threads
inline constexpr int64_t kFeatures = 128;          // columns of W X that are computed at once
inline constexpr int64_t kPadding = 16;            // rows and columns of tiles are padded to it

// Of squared distances, in all pairs and from teacher to student; beyond, a float has too few digits.
inline constexpr double kMostSpread = 1024, kMostGrowth = 64;

template <class T>
const AnglesKernel<T>& kernel() {
  return FASTKD_OF_ISA(angles_kernel<T>());
}

inline int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }
// Of a strip's arrays: such that the rows of a tile lie in different sets of the L1 cache.
inline int64_t stride_of(int64_t N) { return (N + 127) / 128 * 128 + kPadding; }

// RKD's angles, computed in T.
template <class T>
class Angles {
 public:
  Angles(const Centred<double>& student, const Centred<double>& teacher, double delta)
      : sides_{&student, &teacher},
        delta_(T(delta)),
        N_(student.N),
        D_(student.D),
        block_(std::min(kBlock, padded(N_))),
        blocks_((N_ + block_ - 1) / block_),
        strips_((N_ + kStrip - 1) / kStrip),
        vertices_((blocks_ + strips_ - 1) / strips_ * block_),
        parts_(std::clamp<int64_t>(vertices_ / kPart, 1, kParts)) {
    measure();
  }

  // False where T does not suffice, and nothing is done. grad [N, D], where it is not null:
  // += weight * the gradient.
  bool run(double weight, T* grad, double& loss) {
    const double triples = double(N_) * double(N_) * double(N_);
    double sum = 0;
    std::vector<Pair> pairs;
    for (int64_t i = 0; i < blocks_; ++i) {
      for (int64_t k = i; k < blocks_; ++k) pairs.push_back({i, k});
    }
    const int64_t tiles = int64_t(pairs.size());
    allocate(std::min(tiles, kBatch), grad != nullptr);
    AnglesRange range{INFINITY, 0, INFINITY, 0, 0};
    for (int64_t begin = 0; begin < N_; begin += vertices_) {
      strip_ = {memory_.get(), stride_of(N_), begin, std::min(vertices_, N_ - begin)};
      fill_strip(range);
      if (sizeof(T) == 4 && !suffices(range)) return false;
      for (int64_t tile = 0; tile < tiles; tile += kBatch) {
        sum += sweep(pairs.data() + tile, std::min(kBatch, tiles - tile), grad != nullptr);
      }
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

  int64_t tile_size() const { return block_ * block_; }
  T* halves(int64_t tile) const { return halves_.get() + tile * 2 * tile_size(); }
  T* kappa(int64_t tile, int64_t part) const { return kappa_.get() + (tile * parts_ + part) * tile_size(); }
  int64_t first(int64_t block) const { return block * block_; }
  int64_t rows(int64_t block) const { return std::min(block_, N_ - first(block)); }
  int64_t vertex(int64_t block) const { return first(block) - strip_.begin; }
  bool in_strip(int64_t block) const { return vertex(block) >= 0 && vertex(block) < strip_.vertices; }

  void allocate(int64_t tiles, bool grad) {
    memory_ = make_buffer<T>(std::min(vertices_, padded(N_)) * kAnglesArrays * stride_of(N_));
    if (strips_ > 1) halves_ = make_buffer<T>(tiles * 2 * tile_size());
    if (!grad) return;
    kappa_ = make_buffer<T>(tiles * parts_ * tile_size());
    product_ = make_buffer<T>(N_ * D_);
    std::fill_n(product_.get(), N_ * D_, T(0));
    sums_.assign(N_, 0.0);
  }

  static bool suffices(const AnglesRange& r) {
    return !(r.largest_student > kMostSpread * r.least_student || r.largest_teacher > kMostSpread * r.least_teacher ||
             r.largest_ratio > kMostGrowth);
  }

  // Norms, and the scales that make squared distances 2 in the mean; the student in T.
  void measure() {
    for (Buffer<double>& norms : norms_) norms = make_buffer<double>(N_);
    x_ = make_buffer<T>(N_ * D_);
    const int64_t tasks = (N_ + kBlock - 1) / kBlock;
    parallel_for(0, 2 * tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const Centred<double>& x = *sides_[task % 2];
        const int64_t row = task / 2 * kBlock;
        const int64_t n = std::min(kBlock, N_ - row);
        k_.norms(x.row(row), n, x.D, norms_[task % 2].get() + row);
        if (task % 2 == 0) std::copy_n(x.row(row), n * D_, x_.get() + row * D_);
      }
    });
    for (int side = 0; side < 2; ++side) {
      const double sum = std::accumulate(norms_[side].get(), norms_[side].get() + N_, 0.0);
      scale_[side] = sum > 0 ? double(N_) / sum : 1;
    }
  }

  // The squared distances of a tile, in the calling thread's scratch memory.
  AnglesSides distances(Pair p) const {
    double* memory = static_cast<double*>(scratch(2 * tile_size() * int64_t(sizeof(double))));
    for (int side = 0; side < 2; ++side) {
      const Centred<double>& x = *sides_[side];
      const double* norms = norms_[side].get();
      const AnglesGram gram{memory + side * tile_size(),
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
  void fill_strip(AnglesRange& range) {
    std::vector<Pair> tiles;  // of two that lie in the strip one is the other's transpose
    for (int64_t i = strip_.begin / block_; i < blocks_ && in_strip(i); ++i) {
      for (int64_t k = 0; k < blocks_; ++k) {
        if (k >= i || !in_strip(k)) tiles.push_back({i, k});
      }
    }
    std::vector<AnglesRange> found(tiles.size());
    for_each(int64_t(tiles.size()), [&](int64_t tile) { fill_tile(tiles[tile], found[tile]); });
    for (const AnglesRange& r : found) {
      range = {std::min(range.least_student, r.least_student), std::max(range.largest_student, r.largest_student),
               std::min(range.least_teacher, r.least_teacher), std::max(range.largest_teacher, r.largest_teacher),
               std::max(range.largest_ratio, r.largest_ratio)};
    }
  }

  void fill_tile(Pair p, AnglesRange& range) {
    range = k_.fill(distances(p), strip_, vertex(p.i), first(p.k));
    if (p.i == p.k) return clear(p.i);
    if (!in_strip(p.k)) return;
    const int64_t step = kAnglesArrays * strip_.stride;
    for (int64_t array = 0; array < kAlpha; ++array) {
      const T* from = strip_.row(vertex(p.i), array) + first(p.k);
      T* to = strip_.row(vertex(p.k), array) + first(p.i);
      for (int64_t k = 0; k < rows(p.k); ++k) {
        for (int64_t i = 0; i < rows(p.i); ++i) to[k * step + i] = from[i * step + k];
      }
    }
  }
  // What is summed, and what pads tiles.
  void clear(int64_t block) {
    for (int64_t a = vertex(block); a < vertex(block) + rows(block); ++a) {
      for (int64_t array = 0; array < kAlpha; ++array) {
        std::fill(strip_.row(a, array) + N_, strip_.row(a, array + 1), T(0));
      }
      std::fill(strip_.row(a, kAlpha), strip_.row(a + 1, 0), T(0));
    }
    std::fill(strip_.row(vertex(block) + rows(block), 0), strip_.row(vertex(block) + padded(rows(block)), 0), T(0));
  }

  // A batch of tiles; returns the sum of their losses.
  double sweep(const Pair* pairs, int64_t tiles, bool grad) {
    bool outside = false;
    for (int64_t tile = 0; tile < tiles; ++tile) outside |= !in_strip(pairs[tile].i);
    if (outside) {
      for_each(tiles, [&](int64_t tile) { fill_halves(pairs[tile], tile); });
    }
    std::vector<double> losses(parts_);
    for_each(parts_, [&](int64_t part) {
      for (int64_t tile = 0; tile < tiles; ++tile) losses[part] += sweep_tile(pairs[tile], tile, part, grad);
    });
    if (grad) {
      for_each(tiles, [&](int64_t tile) { add_parts(pairs[tile], tile); });
    }
    if (grad && outside) {
      for_each((D_ + kFeatures - 1) / kFeatures,
               [&](int64_t piece) { multiply_tiles(pairs, tiles, piece * kFeatures); });
    }
    return std::accumulate(losses.begin(), losses.end(), 0.0);
  }

  // Of a tile outside the strip, padded with 0.
  void fill_halves(Pair p, int64_t tile) {
    if (in_strip(p.i)) return;
    k_.halves(distances(p), halves(tile), halves(tile) + tile_size(), block_);
    for (T* out : {halves(tile), halves(tile) + tile_size()}) {
      for (int64_t i = 0; i < rows(p.i); ++i) std::fill(out + i * block_ + rows(p.k), out + (i + 1) * block_, T(0));
      std::fill(out + rows(p.i) * block_, out + padded(rows(p.i)) * block_, T(0));
    }
  }

  double sweep_tile(Pair p, int64_t tile, int64_t part, bool grad) const {
    const bool inside = in_strip(p.i);
    const T* half = inside ? strip_.row(vertex(p.i), kHalf) + first(p.k) : halves(tile);
    const T* difference = inside ? strip_.row(vertex(p.i), kHalfDifference) + first(p.k) : half + tile_size();
    T* sums = grad ? kappa(tile, part) : nullptr;
    if (grad) std::fill_n(sums, tile_size(), T(0));
    return k_.sweep(strip_,
                    AnglesTile<T>{half, difference, inside ? kAnglesArrays * strip_.stride : block_, sums, block_,
                                  first(p.i), padded(rows(p.i)), first(p.k), padded(rows(p.k)), delta_},
                    strip_.vertices * part / parts_, strip_.vertices * (part + 1) / parts_);
  }

  // K of the strip's vertices: into the strip, or into the tile's first part.
  void add_parts(Pair p, int64_t tile) {
    for (int64_t i = 0; i < rows(p.i); ++i) {
      T* sums = kappa(tile, 0) + i * block_;
      T* out = in_strip(p.i) ? strip_.row(vertex(p.i) + i, kKappa) + first(p.k) : sums;
      for (int64_t part = 1; part < parts_; ++part) {
        const T* more = kappa(tile, part) + i * block_;
        for (int64_t k = 0; k < rows(p.k); ++k) sums[k] += more[k];
      }
      if (out != sums) std::copy_n(sums, rows(p.k), out);
    }
  }

  // Of tiles outside the strip: product_i -= K X_k and product_k -= K^T X_i, features from d on.
  void multiply_tiles(const Pair* pairs, int64_t tiles, int64_t d) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Pair p = pairs[tile];
      if (in_strip(p.i)) continue;
      const Matrix<T> sums{kappa(tile, 0), rows(p.i), rows(p.k), block_};
      subtract_product(p.i, sums, p.k, d);
      subtract_product(p.k, sums.transposed(), p.i, d);
    }
  }
  void subtract_product(int64_t to, const Matrix<T>& sums, int64_t from, int64_t d) {
    const int64_t n = std::min(kFeatures, D_ - d);
    gemm(Matrix<T>{product_.get() + first(to) * D_ + d, sums.rows, n, D_}, sums,
         Matrix<T>{x_.get() + first(from) * D_ + d, sums.columns, n, D_}, -1, 1);
    if (d > 0) return;
    for (int64_t i = 0; i < sums.rows; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < sums.columns; ++k) sum += double(sums.data[i * sums.row_stride + k * sums.column_stride]);
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
    const int64_t step = kAnglesArrays * strip_.stride;
    const Matrix<T> out{product_.get() + first(block) * D_ + d, rows(block), n, D_};
    const Matrix<T> columns{strip_.row(0, kAlpha) + first(block), strip_.vertices, rows(block), step};
    gemm(out, columns.transposed(), Matrix<T>{x_.get() + strip_.begin * D_ + d, strip_.vertices, n, D_}, 1, 1);
    if (!in_strip(block)) return;
    const Matrix<T> own{strip_.row(first(block) - strip_.begin, kAlpha), rows(block), N_, step};
    gemm(out, own, Matrix<T>{x_.get() + d, N_, n, D_}, 1, 1);
  }

  // grad += scale (diag(W 1) X - W X)
  void write(T* grad, double scale) const {
    parallel_for(0, N_, 65536 / D_ + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double sum = sums_[i];
        const T *x = x_.get() + i * D_, *product = product_.get() + i * D_;
        T* out = grad + i * D_;
        for (int64_t d = 0; d < D_; ++d) out[d] += T(scale * (sum * double(x[d]) - double(product[d])));
      }
    });
  }

  const AnglesKernel<T>& k_ = kernel<T>();
  const Centred<double>* const sides_[2];  // student, teacher
  const T delta_;
  const int64_t N_, D_, block_, blocks_, strips_, vertices_, parts_;
  Buffer<double> norms_[2];  // [N]
  Buffer<T> x_;              // [N, D], the student
  double scale_[2];
  Buffer<T> memory_;
  AnglesStrip<T> strip_;
  Buffer<T> halves_;          // of a batch of tiles outside the strip, h and its difference
  Buffer<T> kappa_;           // of a batch of tiles, K of every part
  Buffer<T> product_;         // W X [N, D]
  std::vector<double> sums_;  // W 1 [N]
};

}  // namespace fastkd::angles
