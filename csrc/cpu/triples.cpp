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
// Squared distances are rounded once, from double. psi cancels by d_ai / d_ak: where the spread of the
// distances is large, or could leave the range of float, all is computed in double.
//
// Sums do not depend on the number of threads. Blocks and parts of a strip have fixed sizes. In round r
// block i meets block (r - i) mod blocks, so that a block occurs once in a round and its alpha and beta
// have one writer. Products run inside parallel regions, of two tasks at the least, and so on one
// thread each.
#include <torch/csrc/stable/library.h>

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

// Beyond these a float has too few digits, or too small a range.
constexpr double kMostSpread = 1024, kLargest = 1e30;

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
    for (int side = 0; side < 2; ++side) norms_[side] = norms(*sides_[side]);
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
    TriplesSpread spreads[2] = {{INFINITY, 0}, {INFINITY, 0}};
    for (int64_t begin = 0; begin < N_; begin += vertices) {
      strip_ = {memory_.get(), stride_, begin, std::min(vertices, N_ - begin)};
      fill_strip(spreads);
      for (const TriplesSpread& s : spreads) {
        if (sizeof(T) == 4 && (s.largest > kMostSpread * s.least || s.largest > kLargest)) return false;
      }
      for (int64_t round = 0; round < blocks_; ++round) sum += play(round, grad != nullptr);
      if (grad) multiply_strip();
    }
    if (grad) write(grad, 2 * weight / triples);
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

  Buffer<double> norms(const Centred<double>& x) const {
    Buffer<double> out = make_buffer<double>(N_);
    parallel_for(0, N_, 65536 / x.D + 1,
                 [&](int64_t begin, int64_t end) { k_.norms(x.row(begin), end - begin, x.D, out.get() + begin); });
    return out;
  }

  // The squared distances of a tile, in the calling thread's scratch memory.
  TriplesGram distances(int side, Pair p, TriplesSpread* spread = nullptr) const {
    const Centred<double>& x = *sides_[side];
    const double* norms = norms_[side].get();
    const TriplesGram gram{static_cast<double*>(scratch(tile_size() * int64_t(sizeof(double)))),
                           x.row(first(p.i)),
                           x.row(first(p.k)),
                           norms + first(p.i),
                           norms + first(p.k),
                           rows(p.i),
                           rows(p.k),
                           x.D,
                           p.i == p.k};
    gemm(Matrix<double>{gram.tile, gram.rows, gram.columns, gram.columns},
         Matrix<double>{gram.x_i, gram.rows, x.D, x.D}, Matrix<double>{gram.x_k, gram.columns, x.D, x.D}.transposed());
    const TriplesSpread found = k_.distances(gram);
    if (spread) *spread = found;
    return gram;
  }

  // h and q of the strip's vertices with all rows, and zeros for what is summed.
  void fill_strip(TriplesSpread (&spreads)[2]) {
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
    const int64_t tasks = 2 * int64_t(tiles.size());
    std::vector<TriplesSpread> found(tasks);
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) fill_tile(task % 2, tiles[task / 2], found[task]);
    });
    for (int64_t task = 0; task < tasks; ++task) {
      TriplesSpread& all = spreads[task % 2];
      all = {std::min(all.least, found[task].least), std::max(all.largest, found[task].largest)};
    }
  }

  void fill_tile(int side, Pair p, TriplesSpread& spread) {
    const int64_t half = side ? kTeacherHalf : kStudentHalf, inverse = side ? kTeacherInverse : kStudentInverse;
    const int64_t vertex = first(p.i) - strip_.begin, step = kTriplesArrays * stride_;
    k_.halves(distances(side, p, &spread), strip_.row(vertex, half) + first(p.k),
              strip_.row(vertex, inverse) + first(p.k), step);
    if (p.i == p.k || !in_strip(p.k)) return;
    const int64_t mirrored = first(p.k) - strip_.begin;
    for (const int64_t array : {half, inverse}) {
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
    parallel_for(0, 2 * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) fill_halves(task % 2, pairs[task / 2], task / 2);
    });
    std::vector<double> losses(tiles * kParts);
    parallel_for(0, tiles * kParts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        losses[task] = sweep(pairs[task % tiles], task % tiles, task / tiles, grad);
      }
    });
    double sum = 0;
    for (const double x : losses) sum += x;
    if (grad) {
      parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) add_parts(pairs[tile], tile);
      });
      parallel_for(0, 2 * tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) multiply_tile(task % 2, pairs[task / 2], task / 2);
      });
    }
    return sum;
  }

  // h_ik of a tile, padded with 0
  void fill_halves(int side, Pair p, int64_t tile) {
    T* out = tile_array(tile, side);
    if (in_strip(p.i)) {
      const int64_t array = side ? kTeacherHalf : kStudentHalf;
      for (int64_t i = 0; i < rows(p.i); ++i) {
        std::copy_n(strip_.row(first(p.i) - strip_.begin + i, array) + first(p.k), rows(p.k), out + i * block_);
      }
    } else {
      k_.halves(distances(side, p), out, nullptr, block_);
    }
    for (int64_t i = 0; i < rows(p.i); ++i) std::fill(out + i * block_ + rows(p.k), out + (i + 1) * block_, T(0));
    std::fill(out + rows(p.i) * block_, out + padded(rows(p.i)) * block_, T(0));
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
    const T factor = p.i == p.k ? T(0.5) : T(1);
    for (int64_t i = 0; i < rows(p.i); ++i) {
      T* parts = tile_array(tile, 2) + i * block_;
      T* out = in_strip(p.i) ? strip_.row(first(p.i) - strip_.begin + i, kKappa) + first(p.k) : parts;
      for (int64_t k = 0; k < rows(p.k); ++k) {
        T sum = parts[k];
        for (int64_t part = 1; part < kParts; ++part) sum += parts[part * tile_size() + k];
        out[k] = factor * sum;
      }
    }
  }

  // What of K is not in the strip. side 0: product_i -= K X_k; side 1: product_k -= K^T X_i.
  void multiply_tile(int side, Pair p, int64_t tile) {
    if (in_strip(p.i) || (side == 1 && p.i == p.k)) return;
    const double factor = p.i == p.k ? -2 : -1;
    const Matrix<T> kappa{tile_array(tile, 2), rows(p.i), rows(p.k), block_};
    const Matrix<T> K = side ? kappa.transposed() : kappa;
    const int64_t to = first(side ? p.k : p.i), from = first(side ? p.i : p.k);
    gemm(Matrix<T>{product_.get() + to * D_, K.rows, D_, D_}, K, Matrix<T>{x_ + from * D_, K.columns, D_, D_}, factor,
         1);
    for (int64_t i = 0; i < K.rows; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < K.columns; ++k) sum += double(K.data[i * K.row_stride + k * K.column_stride]);
      sums_[to + i] += factor * sum;
    }
  }

  // product_ += (M + M^T) X and sums_ += (M + M^T) 1, where M are the strip's rows.
  void multiply_strip() {
    parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
      k_.weights(strip_, first(begin), first(end - 1) + rows(end - 1), sums_.data());
    });
    const int64_t pieces = std::max<int64_t>(2, (D_ + kFeatures - 1) / kFeatures);
    const int64_t width = padded((D_ + pieces - 1) / pieces);
    parallel_for(0, blocks_ * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / pieces, d = task % pieces * width;
        if (d == 0) add_row_sums(block);
        if (d < D_) multiply_rows(block, d, std::min(width, D_ - d));
      }
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
        const T sum = T(sums_[i] * scale), factor = T(scale);
        const T *x = x_ + i * D_, *product = product_.get() + i * D_;
        T* out = grad + i * D_;
        for (int64_t d = 0; d < D_; ++d) out[d] += sum * x[d] - factor * product[d];
      }
    });
  }

  const TriplesKernel<T>& k_ = kernel<T>();
  const Centred<double>* const sides_[2];  // student, teacher
  const T* const x_;                       // [N, D]
  const T delta_;
  const int64_t N_, D_, block_, blocks_, stride_;
  Buffer<double> norms_[2];  // [N]
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
