// The dist schedule on the CPU: correlations of p = softmax(student / T) and q = softmax(teacher / T) along rows and
// along columns. Compiled once per instruction set.
//
// A chunk of rows is taken in groups that stay in cache. Of each row of a group first maximum and sum; then block by
// block of classes p, q and p - q of all its rows, of which the sums of the rows and of the block's columns are made,
// these in the first-level cache. The gradient makes p, q and p - q once more: a row's slopes, which stay in cache,
// and their sum; then what is written.
// Traffic: student + teacher forward, student + teacher + gradient backward, once each. Exponentials: 4 a class and
// 2 backward. Nothing of the size of the logits is held.
#include "cpu/dist_kernel.h"

#include <algorithm>

#include "cpu/prefetch.h"
#include "cpu/rows_chunks.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Whose p and q are probabilities, as correlations want them.
template <class T>
using Functor = ForwardKL<T>;

constexpr int64_t kGroupBytes = int64_t(2) << 20;  // of logits, read again from cache

// Adds a block to a running maximum and the sum of e^((z - max) / T).
template <class T>
void add_block(const T* z, int64_t n, T scale, T lowest, double inv_temperature, double& max, double& sum) {
  const double above = double(maximum(z, n));
  if (above > max) {
    if (sum != 0) sum *= rebase(max, above, inv_temperature);
    max = above;
  }
  const T from = finite_max(T(max));
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += exp2_scaled(z[i] - from, scale, lowest);
  sum += double(total);
}

template <class T>
RowsStats statistics(const RowsParams<T>& P, const Row<T>& r, int64_t row, Prefetch& ahead) {
  alignas(64) T student_buffer[kChunk], teacher_buffer[kChunk];
  const char *student = P.student.row(row), *teacher = P.teacher.row(row);
  RowsStats out{-kInf<double>, 0, -kInf<double>, 0, 0, 0, 0};
  for (int64_t first = 0; first < P.V; first += kChunk) {
    const int64_t n = std::min(kChunk, P.V - first), m = padded(n);
    const T* s = load_block(P.student, student, first, n, student_buffer);
    const T* t = load_block(P.teacher, teacher, first, n, teacher_buffer);
    add_block(s, m, r.scale_student, r.lowest_student, r.inv_temperature, out.max_student, out.sum_student);
    add_block(t, m, r.scale_teacher, r.lowest_teacher, r.inv_temperature, out.max_teacher, out.sum_teacher);
    ahead.some();
  }
  out.max_student = finite_max(out.max_student);
  out.max_teacher = finite_max(out.max_teacher);
  return out;
}

// A side without any possible class has probability 0 for all.
template <class T>
Scale<T> scale_of(const Row<T>& r, const RowsStats& stats) {
  Scale<double> k = row_scale<Functor<T>>(r, stats);
  if (stats.sum_teacher == 0) k.q = k.offset = 0;
  return block_scale<Functor<T>>(r, k, stats, stats);
}

// What the passes over a row have of its classes first .. first + n, [padded(n)] each.
template <class T>
struct Exponentials {
  alignas(64) T student[kChunk], teacher[kChunk], difference[kChunk];

  void make(const RowsParams<T>& P, const Row<T>& r, RowsStats stats, const char* s_row, const char* t_row,
            int64_t first, int64_t n) {
    alignas(64) T student_buffer[kChunk], teacher_buffer[kChunk];
    const T* s = load_block(P.student, s_row, first, n, student_buffer);
    const T* t = load_block(P.teacher, t_row, first, n, teacher_buffer);
    first_pass_chunk<Functor<T>>(s, t, padded(n), r, stats, student, teacher, difference);
  }
};

template <class T>
struct Arrays {
  T *p, *D, *q;                                       // of the chunk's first row
  T *sum_p, *sum_D, *sum_q, *pp, *qq, *pq, *pD, *DD;  // of what the others differ by

  Arrays(T* block, int64_t stride)
      : p(block),
        D(p + stride),
        q(D + stride),
        sum_p(q + stride),
        sum_D(sum_p + stride),
        sum_q(sum_D + stride),
        pp(sum_q + stride),
        qq(pp + stride),
        pq(qq + stride),
        pD(pq + stride),
        DD(pD + stride) {}
};

// Adds a row's n classes to its moments and to the sums of columns, [m] each; kFirst: it is the chunk's first.
template <bool kFirst, class T>
void moments_chunk(const Exponentials<T>& e, int n, int m, Scale<T> k, T mean, Arrays<T> c, Moments& row) {
  T aa = 0, bb = 0, ab = 0, aD = 0, DD = 0;
#pragma omp simd reduction(+ : aa, bb, ab, aD, DD)
  for (int i = 0; i < m; ++i) {
    const T p = e.student[i] * k.p, q = e.teacher[i] * k.q;
    const T D = p_minus_q(element<Given::kProbabilities>(e.student[i], e.teacher[i], e.difference[i], k));
    const T less = i < n ? mean : T(0);
    const T a = p - less, b = q - less;
    aa += a * a;
    bb += b * b;
    ab += a * b;
    aD += a * D;
    DD += D * D;
    if constexpr (kFirst) {
      c.p[i] = p;
      c.D[i] = D;
      c.q[i] = q;
      c.sum_p[i] = c.sum_D[i] = c.sum_q[i] = c.pp[i] = c.qq[i] = c.pq[i] = c.pD[i] = c.DD[i] = T(0);
    } else {
      const T x = p - c.p[i], y = D - c.D[i], z = q - c.q[i];
      c.sum_p[i] += x;
      c.sum_D[i] += y;
      c.sum_q[i] += z;
      c.pp[i] += x * x;
      c.qq[i] += z * z;
      c.pq[i] += x * z;
      c.pD[i] += x * y;
      c.DD[i] += y * y;
    }
  }
  row.aa += double(aa);
  row.bb += double(bb);
  row.ab += double(ab);
  row.aD += double(aD);
  row.DD += double(DD);
}

// One row of a group.
template <class T>
struct Member {
  int64_t row;
  RowsStats stats;
  Scale<T> scale;
  Moments moments;
};

template <class T>
void add_row(const DistParams<T>& P, const Row<T>& r, Member<T>& x, int64_t block, bool first, DistChunk<T>& chunk) {
  Exponentials<T> e;
  const int64_t V = P.rows.V, end = std::min(V, (block + 1) * kDistBlock), stride = chunk.stride(V);
  const char *student = P.rows.student.row(x.row), *teacher = P.rows.teacher.row(x.row);
  for (int64_t at = block * kDistBlock; at < end; at += kChunk) {
    const int64_t n = std::min(kChunk, end - at), m = padded(n);
    e.make(P.rows, r, x.stats, student, teacher, at, n);
    const Arrays<T> columns(chunk.block(block) + (at - block * kDistBlock), stride);
    const auto add = first ? moments_chunk<true, T> : moments_chunk<false, T>;
    add(e, int(n), int(m), x.scale, T(1 / double(V)), columns, x.moments);
  }
}

template <class T>
void finish_row(const DistParams<T>& P, const Member<T>& x, DistChunk<T>& chunk) {
  const double V = double(P.rows.V), scale = P.inter_weight * P.temperature * P.temperature * P.rows.grad_scale;
  const bool possible = x.stats.sum_student != 0 && x.stats.sum_teacher != 0;
  const Correlation c = possible ? correlation<T>(x.moments, V, 1 / V, 1 / V, P.eps) : kUncorrelated;
  chunk.losses += c.loss;
  const RowsStats& k = x.stats;
  P.of_rows[x.row] = {k.max_student, k.sum_student, k.max_teacher, k.sum_teacher, scale * c.slope, scale * c.own};
}

template <class T>
void add_chunk(const DistParams<T>& P, int64_t begin, int64_t end, DistChunk<T>& chunk) {
  Member<T> group[kDistChunk];
  const RowsParams<T>& R = P.rows;
  const int64_t most = std::max<int64_t>(kGroupBytes / (R.V * (R.student.element_size + R.teacher.element_size)), 1);
  chunk.count = 0;
  chunk.losses = 0;
  for (int64_t next = begin; next < end;) {
    int64_t size = 0;
    for (; next < end && size < std::min(most, kDistChunk); ++next) {
      if (R.mask && !R.mask[next]) continue;
      const Row<T> r = row_constants(R, next);
      Prefetch ahead(R, next, end, 1);
      const RowsStats stats = statistics(R, r, next, ahead);
      group[size++] = {next, stats, scale_of(r, stats), {}};
    }
    if (size == 0) break;
    const Row<T> r = row_constants(R, begin);  // the same for all
    for (int64_t block = 0; block < dist_blocks(R.V); ++block) {
      for (int64_t i = 0; i < size; ++i) add_row(P, r, group[i], block, chunk.count + i == 0, chunk);
    }
    for (int64_t i = 0; i < size; ++i) finish_row(P, group[i], chunk);
    chunk.count += size;
  }
}

template <class T>
void add_columns(const DistChunk<T>& chunk, int64_t block, ColumnMoments* columns) {
  const int64_t begin = block * kDistBlock, n = std::min(kDistBlock, chunk.V - begin);
  const Arrays<T> c(chunk.block(block), chunk.stride(chunk.V));
  for (int64_t i = 0; i < n; ++i) {
    const ShiftedSums<T> sums{c.sum_p[i], c.sum_D[i], c.sum_q[i], c.pp[i], c.qq[i], c.pq[i], c.pD[i], c.DD[i]};
    columns[begin + i].add(column_moments(chunk.count, c.p[i], c.D[i], c.q[i], sums));
  }
}

// The slopes of a row, of which either that of p - q or that of q is 0.
template <class T>
struct RowSlopes {
  T difference, teacher, own, constant;

  RowSlopes(const DistRow& x, int64_t V)
      : difference(T(x.slope < 0 ? 0 : x.slope)),
        teacher(T(x.slope < 0 ? x.slope : 0)),
        own(T(x.own)),
        constant(T(-((x.slope < 0 ? x.slope : 0) + x.own) / double(V))) {}
};

// p G of a chunk, and p; returns their sum. slope, own, constant: of the columns.
template <class T>
double slopes_chunk(const Exponentials<T>& e, int64_t n, Scale<T> k, RowSlopes<T> row, const T* slope, const T* own,
                    const T* constant, T* p, T* pG) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T x = e.student[i] * k.p, q = e.teacher[i] * k.q;
    const T D = p_minus_q(element<Given::kProbabilities>(e.student[i], e.teacher[i], e.difference[i], k));
    const T G = slope[i] * (slope[i] < T(0) ? q : D) + row.difference * D + row.teacher * q + (own[i] + row.own) * x +
                (constant[i] + row.constant);
    p[i] = x;
    pG[i] = x * G;
    sum += pG[i];
  }
  return double(sum);
}

template <class T>
void zero_row(const RowsParams<T>& P, int64_t row) {
  alignas(64) const T zeros[kChunk] = {};
  for (int64_t first = 0; first < P.V; first += kChunk) {
    store_block(P.grad, P.grad.row(row), first, std::min(kChunk, P.V - first), zeros, P.stream);
  }
}

template <class T>
void gradient_of_row(const DistParams<T>& P, T* memory, int64_t row, Prefetch& ahead) {
  Exponentials<T> e;
  const RowsParams<T>& R = P.rows;
  const int64_t V = R.V, stride = dist_padded(V);
  const DistRow& x = P.of_rows[row];
  const RowsStats stats{x.max_student, x.sum_student, x.max_teacher, x.sum_teacher, 0, 0, 0};
  const Row<T> r = row_constants(R, row);
  const Scale<T> k = scale_of(r, stats);
  const RowSlopes<T> slopes(x, V);
  const char *student = R.student.row(row), *teacher = R.teacher.row(row);
  T *const p = memory, *const pG = memory + stride;
  double sum = 0;
  for (int64_t at = 0; at < V; at += kChunk) {
    const int64_t n = std::min(kChunk, V - at);
    e.make(R, r, stats, student, teacher, at, n);
    const T* columns = P.columns + at;
    sum += slopes_chunk(e, padded(n), k, slopes, columns, columns + stride, columns + 2 * stride, p + at, pG + at);
    ahead.some();
  }
  const T less = T(sum), scale = T(double(*P.upstream) * r.inv_temperature);
  alignas(64) T grad[kChunk];
  for (int64_t at = 0; at < V; at += kChunk) {
    const int64_t n = std::min(kChunk, V - at);
    const T *own = p + at, *of = pG + at;
#pragma omp simd
    for (int64_t i = 0; i < padded(n); ++i) grad[i] = (of[i] - own[i] * less) * scale;
    store_block(R.grad, R.grad.row(row), at, n, grad, R.stream);
    ahead.some();
  }
}

template <class T>
void gradient(const DistParams<T>& P, T* memory, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (P.rows.mask && !P.rows.mask[row]) {
      zero_row(P.rows, row);
      continue;
    }
    Prefetch ahead(P.rows, row, end, 2);
    gradient_of_row(P, memory, row, ahead);
  }
  if (P.rows.stream) stream_fence();
}

template <class T>
constexpr DistKernel<T> kKernel{add_chunk<T>, add_columns<T>, gradient<T>};

}  // namespace

template <class T>
const DistKernel<T>& dist_kernel() {
  return kKernel<T>;
}
template const DistKernel<float>& dist_kernel();
template const DistKernel<double>& dist_kernel();

}  // namespace fastkd::FASTKD_ISA
