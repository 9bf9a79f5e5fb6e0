// The pairs schedule on the CPU: tiles of the Gram matrices come from the BLAS, become distances and
// weights while they are in cache, and go back to it as W X.
//
// Sweep 1, all tiles with i <= j: measures; their sums, and those of s^2 and s t.
// Sweep 2: measures once more, the loss, W and W X. It needs the sum of the slopes, which sweep 1 predicts exactly
//   unless a pair is clamped; it computes the true sum as well.
// Sweep 3 runs only where the two sums differ enough to matter, and adds the correction.
// With student and teacher of width D: 2 N^2 D flops in sweep 1, 4 in sweep 2, 3 in sweep 3.
// Where all tiles fit into kKept bytes their measures stay, and only W X needs the BLAS again.
//
// Near pairs' parts of W X are sums of differences, which do not cancel.
//
// Memory: both centred copies, W X [N, D], two tiles a thread or kKept bytes. Sums do not depend on the
// number of threads: products are cut the same for any, and computed on one thread each; a tile is summed by itself,
// and where two tiles would add to the same rows of W X they are computed one after the other, as in the rounds of a
// tournament.
#include "cpu/pairs.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "common/embeddings_inputs.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/pairs_kernel.h"
#include "cpu/scratch.h"

namespace fastkd {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kBlock = 256;  // rows: products of smaller tiles are slower, larger tiles leave the cache
constexpr int64_t kWhole = 512;  // up to here one tile holds all pairs, and the threads share it
constexpr int64_t kRows = 16;    // of that tile, dealt to a thread at once
constexpr int64_t kKept = int64_t(16) << 20;

template <class T>
const PairsKernel<T>& kernel(Relation relation, bool weighted) {
  return FASTKD_OF_ISA(pairs_kernel<T>(relation, weighted));
}

template <class T>
class Pairs {
 public:
  Pairs(Relation relation, const RelationOptions& options, const Centred<T>& student, const Centred<T>& teacher,
        const T* weight)
      : student_(student),
        teacher_(teacher),
        k_(kernel<T>(relation, weight != nullptr)),
        options_(options),
        N_(student.N),
        blocks_(N_ <= kWhole ? 1 : (N_ + kBlock - 1) / kBlock),
        block_((N_ + blocks_ - 1) / blocks_),
        tiles_(blocks_ * (blocks_ + 1) / 2),
        keeps_(tiles_ * tile_bytes() <= kKept),
        sums_(whole() ? (N_ + kRows - 1) / kRows : tiles_),
        near_(sums_.size()),
        student_norms_(norms(student)),
        teacher_norms_(norms(teacher)) {
    if (keeps_) kept_ = make_buffer<char>(tiles_ * tile_bytes());
    if (weight) {
      half_weights_ = make_buffer<T>(N_);
      for (int64_t i = 0; i < N_; ++i) half_weights_[i] = weight[i] / 2;
    }
  }

  double run(T* grad) {
    RelationSums known;
    if (keeps_ || k_.needs_measures(options_)) {
      known = sweep([&](const PairsTile<T>&, int64_t, int64_t, bool, RelationSums&) {}, true);
      known.slope = k_.unclamped_slope(options_, known);
    }
    if (!grad || keeps_) {
      const auto f = [&](const PairsTile<T>& tile, int64_t begin, int64_t end, bool, RelationSums& sums) {
        k_.loss(tile, options_, known, begin, end, sums);
      };
      const RelationSums sums = sweep(f, !keeps_);
      if (!grad) return k_.loss_scale(options_) * sums.loss;
      known.slope = sums.slope;
    }
    product_ = make_buffer<T>(N_ * student_.D);
    const RelationSums sums =
        weigh([&](const PairsTile<T>& tile, int64_t begin, int64_t end, bool near, RelationSums& sums, T* row,
                  T* column) { k_.weights(tile, options_, known, begin, end, near, sums, row, column); });
    write(grad, false);
    const double error = sums.slope - known.slope;
    if (!keeps_ && k_.matters(options_, error, sums.loss, sizeof(T) == 8 ? 1e-15 : 2e-6)) {
      weigh([&](const PairsTile<T>& tile, int64_t begin, int64_t end, bool near, RelationSums&, T* row, T* column) {
        k_.slope_weights(tile, options_, known, error, begin, end, near, row, column);
      });
      write(grad, true);
    }
    return k_.loss_scale(options_) * sums.loss;
  }

 private:
  struct Block {
    int64_t begin, n;
  };
  bool whole() const { return blocks_ == 1; }
  int64_t tile_bytes() const { return 2 * block_ * block_ * int64_t(sizeof(T)); }
  Block block(int64_t i) const { return {i * block_, std::min(block_, N_ - i * block_)}; }
  // tiles (i, j), i <= j, column by column of the upper triangle
  static int64_t tile_number(int64_t i, int64_t j) { return j * (j + 1) / 2 + i; }

  Buffer<T> norms(const Centred<T>& x) const {
    Buffer<T> out = make_buffer<T>(N_);
    parallel_for(0, N_, 65536 / x.D + 1,
                 [&](int64_t begin, int64_t end) { k_.norms(x.row(begin), end - begin, x.D, out.get() + begin); });
    return out;
  }

  Matrix<T> rows(const Centred<T>& x, Block b) const { return {x.row(b.begin), b.n, x.D, x.D}; }
  Matrix<T> matrix(const T* data, const PairsTile<T>& tile) const {
    return {data, tile.rows, tile.columns, tile.stride};
  }

  PairsTile<T> tile(int64_t i, int64_t j) const {
    T* memory = reinterpret_cast<T*>(keeps_ ? kept_.get() + tile_number(i, j) * tile_bytes() : scratch(tile_bytes()));
    const Block bi = block(i), bj = block(j);
    auto side = [&](const Centred<T>& x, const Buffer<T>& norms, T* data) {
      return PairsSide<T>{
          data, x.exact_row(bi.begin), x.exact_row(bj.begin), norms.get() + bi.begin, norms.get() + bj.begin,
          x.D,  x.exact_stride};
    };
    return {side(student_, student_norms_, memory),
            side(teacher_, teacher_norms_, memory + block_ * block_),
            half_weights_ ? half_weights_.get() + bi.begin : nullptr,
            half_weights_ ? half_weights_.get() + bj.begin : nullptr,
            bi.n,
            bj.n,
            block_,
            i == j ? 0 : -1};
  }
  void gram(const PairsTile<T>& tile, int64_t i, int64_t j) const {
    multiply(matrix(tile.student.tile, tile), rows(student_, block(i)), rows(student_, block(j)).transposed());
    multiply(matrix(tile.teacher.tile, tile), rows(teacher_, block(i)), rows(teacher_, block(j)).transposed());
  }
  // The one tile that holds all pairs is multiplied by all threads, one of several by the thread that has it.
  void multiply(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b) const {
    if (whole()) {
      gemm_by_rows(out, a, b);
    } else {
      gemm(out, a, b);
    }
  }

  // f(tile, begin, end, any near, sums) over all rows of all tiles; the tiles' measures are computed before
  // where they are not there yet.
  template <class F>
  RelationSums sweep(F&& f, bool compute) {
    if (whole()) {
      const PairsTile<T> all = tile(0, 0);
      if (compute) gram(all, 0, 0);
      parallel_for(0, int64_t(sums_.size()), 1, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; ++part) {
          RelationSums sums;
          const int64_t begin = part * kRows, end = std::min(begin + kRows, N_);
          if (compute) near_[part] = k_.measures(all, begin, end, sums);
          f(all, begin, end, bool(near_[part]), sums);
          sums_[part] = sums;
        }
      });
    } else {
      parallel_for(0, tiles_, 1, [&](int64_t first, int64_t last) {  // three tiles at the least: each on one thread
        int64_t j = int64_t((std::sqrt(8.0 * double(first) + 1) - 1) / 2);
        while (tile_number(0, j + 1) <= first) ++j;
        while (tile_number(0, j) > first) --j;
        for (int64_t number = first, i = first - tile_number(0, j); number < last; ++number, ++i) {
          if (i > j) i = 0, ++j;
          one_tile(f, i, j, compute);
        }
      });
    }
    return total();
  }

  template <class F>
  PairsTile<T> one_tile(F&& f, int64_t i, int64_t j, bool compute) {
    const PairsTile<T> t = tile(i, j);
    RelationSums sums;
    char& near = near_[tile_number(i, j)];
    if (compute) {
      gram(t, i, j);
      near = k_.measures(t, 0, t.rows, sums);
    }
    f(t, 0, t.rows, bool(near), sums);
    RelationSums& to = sums_[tile_number(i, j)];
    to = RelationSums();
    to.add(sums, i == j ? 1 : 2);
    return t;
  }

  RelationSums total() const {
    RelationSums sums;
    for (const RelationSums& s : sums_) sums.add(s, 1);
    return sums;
  }

  // f(tile, begin, end, any near, sums, row_sums, column_sums) turns measures into weights; then
  // product_ = W X and weight_sums_ = W 1.
  template <class F>
  RelationSums weigh(F&& f) {
    weight_sums_.assign(N_, 0.0);
    if (whole()) return weigh_whole(f);
    for_each(blocks_, [&](int64_t i) { add_tile(f, i, i, 0); });
    // Every two blocks meet once in even - 1 rounds: the last one stands still, the others turn.
    const int64_t even = blocks_ + blocks_ % 2, turning = even - 1;
    for (int64_t round = 0; round < turning; ++round) {
      for_each(even / 2, [&](int64_t match) {
        const int64_t a = match ? (round + match) % turning : turning, b = (round + turning - match) % turning;
        if (std::max(a, b) < blocks_) add_tile(f, std::min(a, b), std::max(a, b), 1);
      });
    }
    return total();
  }

  template <class F>
  RelationSums weigh_whole(F&& f) {
    const RelationSums sums = sweep(
        [&](const PairsTile<T>& t, int64_t begin, int64_t end, bool near, RelationSums& sums) {
          T row[kRows] = {};
          f(t, begin, end, near, sums, row - begin, static_cast<T*>(nullptr));
          for (int64_t i = begin; i < end; ++i) weight_sums_[i] = double(row[i - begin]);
        },
        !keeps_);
    const PairsTile<T> all = tile(0, 0);
    multiply(Matrix<T>{product_.get(), N_, student_.D, student_.D}, matrix(all.student.tile, all),
             rows(student_, block(0)));
    parallel_for(0, int64_t(near_.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        if (near_[part]) k_.near(all, part * kRows, std::min((part + 1) * kRows, N_), product_.get(), nullptr);
      }
    });
    return sums;
  }

  template <class F>
  void add_tile(F&& f, int64_t i, int64_t j, double beta) {
    T row[kBlock] = {}, column[kBlock] = {};
    const PairsTile<T> t =
        one_tile([&](const PairsTile<T>& t, int64_t begin, int64_t end, bool near,
                     RelationSums& sums) { f(t, begin, end, near, sums, row, i == j ? nullptr : column); },
                 i, j, !keeps_);
    const Matrix<T> W = matrix(t.student.tile, t);
    add_product(i, W, j, row, beta);
    if (i != j) add_product(j, W.transposed(), i, column, beta);
    if (near_[tile_number(i, j)])
      k_.near(t, 0, t.rows, product_row(block(i)), i == j ? nullptr : product_row(block(j)));
  }
  T* product_row(Block b) const { return product_.get() + b.begin * student_.D; }
  void add_product(int64_t i, const Matrix<T>& W, int64_t j, const T* sums, double beta) {
    const Block to = block(i);
    const Matrix<T> out{product_row(to), to.n, student_.D, student_.D};
    gemm(out, W, rows(student_, block(j)), 1, beta);
    for (int64_t k = 0; k < to.n; ++k) weight_sums_[to.begin + k] += double(sums[k]);
  }

  // grad (+)= diag(W 1) X - W X
  void write(T* grad, bool add) const {
    const int64_t D = student_.D;
    parallel_for(0, N_, 65536 / D + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T sum = T(weight_sums_[i]);
        const T *x = student_.row(i), *product = product_.get() + i * D;
        T* out = grad + i * D;
        for (int64_t k = 0; k < D; ++k) out[k] = (add ? out[k] : T(0)) + (sum * x[k] - product[k]);
      }
    });
  }

  const Centred<T>&student_, &teacher_;
  const PairsKernel<T>& k_;
  const RelationOptions options_;
  const int64_t N_, blocks_, block_, tiles_;
  const bool keeps_;
  std::vector<RelationSums> sums_;  // a tile's, or of a tile that is shared a part's
  std::vector<char> near_;          // whether any two of the student's rows are, in the same order
  const Buffer<T> student_norms_, teacher_norms_;
  Buffer<T> half_weights_;  // or none
  Buffer<char> kept_;
  Buffer<T> product_;
  std::vector<double> weight_sums_;
};

void pairs_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const PairsInputs in{{PairsCall::read(arguments)}};
  check(in);
  Tensor loss = in.new_loss(), grad = in.new_grad(in.save);
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t N = rows_there(in);
    const Centred<T> student = centre<T>(in.student, N), teacher = centre<T>(in.teacher, N);
    const T* weight = in.weight ? static_cast<const T*>(in.weight->const_data_ptr()) : nullptr;
    const bool direct = in.save && grad.scalar_type() == in.compute();
    Tensor wide = in.save && !direct ? torch::stable::new_empty(grad, grad.sizes(), in.compute()) : grad;
    T* to = in.save ? static_cast<T*>(wide.mutable_data_ptr()) : nullptr;
    *static_cast<T*>(loss.mutable_data_ptr()) =
        T(pairs_loss(Relation(in.relation), RelationOptions{in.delta, in.normalize, N}, student, teacher, weight, to));
    if (to) std::fill(to + N * student.D, to + in.N() * student.D, T(0));
    if (in.save && !direct) torch::stable::copy_(grad, wide);
  });
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(grad);
}

}  // namespace

template <class T>
double pairs_loss(Relation relation, const RelationOptions& options, const Centred<T>& student,
                  const Centred<T>& teacher, const T* weight, T* grad) {
  if (student.N < 2) {
    if (grad) std::fill_n(grad, student.N * student.D, T(0));
    return 0;
  }
  return Pairs<T>(relation, options, student, teacher, weight).run(grad);
}
template double pairs_loss(Relation, const RelationOptions&, const Centred<float>&, const Centred<float>&, const float*,
                           float*);
template double pairs_loss(Relation, const RelationOptions&, const Centred<double>&, const Centred<double>&,
                           const double*, double*);

STABLE_TORCH_LIBRARY_IMPL(FASTKD_NAMESPACE, CPU, m) { m.impl("pairs_fwd", &pairs_fwd); }

}  // namespace fastkd
