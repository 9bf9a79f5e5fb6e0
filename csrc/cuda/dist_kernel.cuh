// The dist schedule on the GPU: correlations of p = softmax(student / T) and q = softmax(teacher / T) along rows and
// along columns, and their gradient.
//
// Forward: a team of threads has a row, which it reads for maxima and sums and once more, from the L2, for its moments.
// Then threads have classes, and go down a chunk of rows; a thread a class adds up what chunks have found. Backward: a
// team has a row again, for the sum of its slopes and, from the L2, for what is written.
// Traffic: student + teacher twice forward, student + teacher + gradient backward.
// Where rows lie side by side a team is one thread, and threads that share a class have neighbouring rows.
#pragma once
#include "cuda/dist_launch.h"
#include "cuda/rows_math.cuh"

namespace fastkd::cuda {

inline constexpr int kDistThreads = 256;
// Blocks that share a multiprocessor, going along rows.
template <class T>
inline constexpr int kDistBlocks = sizeof(T) == 8 ? 1 : 3;
inline constexpr int kDistClasses = 2;   // of a thread, going down rows
inline constexpr int kDistSegment = 64;  // rows whose sums are in T
inline constexpr int kDistSumThreads = 1024;
// Classes of a thread that are on their way together: fewer where their types are looked at one by one.
template <class S>
inline constexpr int kDistAtOnce = std::is_same_v<S, AnyType> ? 2 : 4;

// A row's logits.
template <class S, class T>
struct DistReader {
  const char *student, *teacher;
  int64_t step_student, step_teacher;  // bytes from class to class
  DType type_student, type_teacher;

  __device__ __forceinline__ DistReader(const RowsParams<T>& P, int64_t row)
      : student(row_of(P.student, row)),
        teacher(row_of(P.teacher, row)),
        step_student(P.student.stride_v * element_size<S>(P.student)),
        step_teacher(P.teacher.stride_v * element_size<S>(P.teacher)),
        type_student(P.student.dtype),
        type_teacher(P.teacher.dtype) {}

  // Class v, or -inf.
  __device__ __forceinline__ void read(int64_t v, int64_t V, T& s, T& t) const {
    s = v < V ? load_one<S, T>(student + v * step_student, type_student) : -kInf<T>;
    t = v < V ? load_one<S, T>(teacher + v * step_teacher, type_teacher) : -kInf<T>;
  }

  // f(v, s, t) with the classes v, v + team, ... of a thread.
  template <int kTeam, class F>
  __device__ __forceinline__ void each(int64_t V, F&& f) const {
#pragma unroll 1
    for (int64_t v = threadIdx.x % kTeam; v < V; v += kDistAtOnce<S> * kTeam) {
      T s[kDistAtOnce<S>], t[kDistAtOnce<S>];
#pragma unroll
      for (int i = 0; i < kDistAtOnce<S>; ++i) read(v + i * kTeam, V, s[i], t[i]);
      f(v, s, t);
    }
  }
};

// From logits to p, q and w. Without logarithms: where all logits are the same p is 1 / V, and nothing else.
template <class T>
struct DistSoftmax {
  T max_student, max_teacher, inverse_student, inverse_teacher, scale, a, centre_student, centre_teacher, offset;

  __device__ DistSoftmax(const DistRow& x, double temperature)
      : max_student(T(x.max_student)), max_teacher(T(x.max_teacher)) {
    const T sum_student = T(x.sum_student), sum_teacher = T(x.sum_teacher);
    const bool possible = sum_student != T(0) && sum_teacher != T(0);
    inverse_student = sum_student == T(0) ? T(0) : T(1) / sum_student;
    inverse_teacher = sum_teacher == T(0) ? T(0) : T(1) / sum_teacher;
    a = T(1) / T(temperature);
    scale = kLog2e<T> * a;
    const T shift = max_student - max_teacher;
    const bool centred = shift > T(4) || shift < T(-4);
    centre_student = centred ? max_student : T(0);
    centre_teacher = centred ? max_teacher : T(0);
    offset = possible ? (centred ? T(0) : shift * a) + log_of(sum_student / sum_teacher) : T(0);
  }
  __device__ __forceinline__ Element<T> operator()(T s, T t) const {
    Element<T> e;
    e.p = exp2_of((s - max_student) * scale) * inverse_student;
    e.q = exp2_of((t - max_teacher) * scale) * inverse_teacher;
    e.w = ((s - centre_student) - (t - centre_teacher)) * a - offset;
    return e;
  }
};

struct SharedMoments {
  Moments sums;
  static __device__ SharedMoments empty() { return {}; }
  static __device__ SharedMoments combine(SharedMoments x) {
    return {{warp_sum(x.sums.aa), warp_sum(x.sums.bb), warp_sum(x.sums.ab), warp_sum(x.sums.aD), warp_sum(x.sums.DD)}};
  }
};
struct SharedSum {
  double sum;
  static __device__ SharedSum empty() { return {0}; }
  static __device__ SharedSum combine(SharedSum x) { return {warp_sum(x.sum)}; }
};

inline constexpr int kDistRooms = kDistThreads / 32 + 1;
template <class T>
struct DistRoom {
  SharedSums<T, false> sums[kDistRooms];
  SharedMoments moments[kDistRooms];
  SharedSum slopes[kDistRooms];
};

// Over the threads of a row.
template <int kTeam, class X>
__device__ __forceinline__ X over_team(X x, X* room) {
  if constexpr (kTeam == 1) {
    return x;
  } else {
    constexpr int kWarps = kTeam / 32;
    return combine_over_row(x, room, int(threadIdx.x) / kTeam * kWarps, kWarps, kDistThreads / 32);
  }
}

template <int kTeam>
__device__ __forceinline__ int64_t row_of_team() {
  return int64_t(blockIdx.x) * (kDistThreads / kTeam) + int(threadIdx.x) / kTeam;
}

// grid: rows / (kDistThreads / kTeam)
template <class T, class S, int kTeam>
__global__ void __launch_bounds__(kDistThreads, kDistBlocks<T>)
    dist_rows_kernel(const __grid_constant__ DistParams<T> P, double* losses) {
  DistRoom<T>* room = reinterpret_cast<DistRoom<T>*>(ptx::dynamic_shared());
  const RowsParams<T>& R = P.rows;
  const int64_t row = row_of_team<kTeam>(), V = R.V;
  const bool first = threadIdx.x % kTeam == 0;
  if (row >= R.N) return;
  if (R.mask && !R.mask[row]) {
    if (first) losses[row] = 0;
    return;
  }
  const DistReader<S, T> reader(R, row);
  const RowConstants<T> r = row_constants(R, row);
  SharedSums<T, false> own{Sums<T>::empty(), r.exp2_student, r.exp2_teacher};
  reader.template each<kTeam>(V, [&](int64_t, const T(&s)[kDistAtOnce<S>], const T(&t)[kDistAtOnce<S>]) {
    add<T, kDistAtOnce<S>, false>(own.sums, s, t, r);
  });
  const Sums<T> k = over_team<kTeam>(own, room->sums).sums;
  DistRow x{double(k.max_student), double(k.sum_student), double(k.max_teacher), double(k.sum_teacher), 0, 0};
  const DistSoftmax<T> softmax(x, P.temperature);
  const T mean = T(1) / T(V);
  SharedMoments all{};
  T aa = 0, bb = 0, ab = 0, aD = 0, DD = 0;
  int steps = 0;
  const auto flush = [&] {
    all.sums.aa += double(aa);
    all.sums.bb += double(bb);
    all.sums.ab += double(ab);
    all.sums.aD += double(aD);
    all.sums.DD += double(DD);
    aa = bb = ab = aD = DD = T(0);
  };
  reader.template each<kTeam>(V, [&](int64_t v, const T(&s)[kDistAtOnce<S>], const T(&t)[kDistAtOnce<S>]) {
#pragma unroll
    for (int i = 0; i < kDistAtOnce<S>; ++i) {
      const Element<T> e = softmax(s[i], t[i]);
      const T less = v + i * kTeam < V ? mean : T(0), D = p_minus_q(e), a = e.p - less, b = e.q - less;
      aa += a * a;
      bb += b * b;
      ab += a * b;
      aD += a * D;
      DD += D * D;
    }
    if (++steps % 16 == 0) flush();
  });
  flush();
  all = over_team<kTeam>(all, room->moments);
  if (!first) return;
  const bool possible = k.sum_student != T(0) && k.sum_teacher != T(0);
  const Correlation c =
      possible ? correlation<T>(all.sums, double(V), 1 / double(V), 1 / double(V), P.eps) : kUncorrelated;
  const double scale = P.inter_weight * P.temperature * P.temperature * (R.scale ? *R.scale : R.grad_scale);
  x.slope = scale * c.slope;
  x.own = scale * c.own;
  P.of_rows[row] = x;
  losses[row] = c.loss;
}

// What a thread has of one class.
template <class T>
struct DistColumn {
  T p, D, q;  // of a segment's first row
  ShiftedSums<T> sums;
  ColumnMoments all;

  __device__ __forceinline__ void begin(Element<T> e, T difference) {
    p = e.p;
    D = difference;
    q = e.q;
    sums = {};
  }
  __device__ __forceinline__ void add(Element<T> e, T difference) {
    const T x = e.p - p, y = difference - D, z = e.q - q;
    sums.p += x;
    sums.D += y;
    sums.q += z;
    sums.pp += x * x;
    sums.qq += z * z;
    sums.pq += x * z;
    sums.pD += x * y;
    sums.DD += y * y;
  }
  __device__ __forceinline__ void end(int64_t count) { all.add(column_moments(count, p, D, q, sums)); }
};

// grid: chunks * ceil(V / (kDistClasses * kAcross)); kAcross threads have neighbouring classes, the others share rows.
template <class T, class S, int kAcross>
__global__ void __launch_bounds__(kDistThreads, 1)
    dist_columns_kernel(const __grid_constant__ DistParams<T> P, ColumnMoments* parts, int64_t chunks) {
  constexpr int kDown = kDistThreads / kAcross, kClasses = kDistClasses * kAcross;
  const RowsParams<T>& R = P.rows;
  const int64_t V = R.V, blocks = (V + kClasses - 1) / kClasses, chunk = int64_t(blockIdx.x) / blocks;
  const int across = int(threadIdx.x) % kAcross, down = int(threadIdx.x) / kAcross;
  const int64_t v = int64_t(blockIdx.x) % blocks * kClasses + across, each = (R.N + chunks - 1) / chunks;
  const int64_t end = (chunk + 1) * each < R.N ? (chunk + 1) * each : R.N;
  DistColumn<T> columns[kDistClasses] = {};
  int64_t count = 0;
#pragma unroll 1
  for (int64_t row = chunk * each + down; row < end; row += kDown) {
    if (R.mask && !R.mask[row]) continue;
    const DistReader<S, T> reader(R, row);
    T s[kDistClasses], t[kDistClasses];
#pragma unroll
    for (int i = 0; i < kDistClasses; ++i) reader.read(v + i * kAcross, V, s[i], t[i]);
    const DistSoftmax<T> softmax(P.of_rows[row], P.temperature);
#pragma unroll
    for (int i = 0; i < kDistClasses; ++i) {
      const Element<T> e = softmax(s[i], t[i]);
      count == 0 ? columns[i].begin(e, p_minus_q(e)) : columns[i].add(e, p_minus_q(e));
    }
    if (++count == kDistSegment) {
#pragma unroll
      for (int i = 0; i < kDistClasses; ++i) columns[i].end(count);
      count = 0;
    }
  }
  ColumnMoments* room = reinterpret_cast<ColumnMoments*>(ptx::dynamic_shared());
#pragma unroll
  for (int i = 0; i < kDistClasses; ++i) {
    columns[i].end(count);
    room[threadIdx.x] = columns[i].all;
    __syncthreads();
#pragma unroll 1
    for (int half = kDown / 2; half > 0; half /= 2) {
      if (down < half) room[threadIdx.x].add(room[threadIdx.x + half * kAcross]);
      __syncthreads();
    }
    if (down == 0 && v + i * kAcross < V) parts[chunk * V + v + i * kAcross] = room[threadIdx.x];
    __syncthreads();
  }
}

// A thread a class. grid: padded V / kDistThreads
template <class T>
__global__ void __launch_bounds__(kDistThreads)
    dist_slopes_kernel(const __grid_constant__ DistParams<T> P, const ColumnMoments* parts, int64_t chunks,
                       double* losses) {
  const int64_t v = int64_t(blockIdx.x) * kDistThreads + threadIdx.x, V = P.rows.V, stride = dist_padded(V);
  if (v >= stride) return;
  ColumnMoments x{};
  for (int64_t chunk = 0; v < V && chunk < chunks; ++chunk) x.add(parts[chunk * V + v]);
  const Correlation c = correlation<T>(x.sums, x.n, x.mean, x.teacher_mean, P.eps);
  const double scale = P.intra_weight * P.temperature * P.temperature / double(V);
  P.columns[v] = T(scale * c.slope);
  P.columns[stride + v] = T(scale * c.own);
  P.columns[2 * stride + v] = T(scale * x.constant(c));
  if (v < V) losses[v] = c.loss;
}

// One block.
template <class T>
__global__ void __launch_bounds__(kDistSumThreads)
    dist_sum_kernel(const __grid_constant__ DistParams<T> P, const double* row_losses, const double* column_losses,
                    T* loss) {
  double* room = reinterpret_cast<double*>(ptx::dynamic_shared());
  double inter = 0, intra = 0;
  for (int64_t n = threadIdx.x; n < P.rows.N; n += kDistSumThreads) inter += row_losses[n];
  for (int64_t v = threadIdx.x; v < P.rows.V; v += kDistSumThreads) intra += column_losses[v];
  inter = block_sum<kDistSumThreads / 32>(inter, room);
  intra = block_sum<kDistSumThreads / 32>(intra, room + kDistSumThreads / 32);
  if (threadIdx.x) return;
  const double scale = P.rows.scale ? *P.rows.scale : P.rows.grad_scale;
  const double all = P.inter_weight * inter * scale + P.intra_weight * intra / double(P.rows.V);
  *loss = scale == 0 || P.rows.N == 0 ? T(0) : T(P.temperature * P.temperature * all);
}

// grid: as that of the rows
template <class T, class S, int kTeam>
__global__ void __launch_bounds__(kDistThreads, kDistBlocks<T>)
    dist_gradient_kernel(const __grid_constant__ DistParams<T> P) {
  DistRoom<T>* room = reinterpret_cast<DistRoom<T>*>(ptx::dynamic_shared());
  const RowsParams<T>& R = P.rows;
  const int64_t row = row_of_team<kTeam>(), V = R.V, stride = dist_padded(V);
  if (row >= R.N) return;
  char* grad = row_of(R.grad, row);
  const int64_t step = R.grad.stride_v * element_size<S>(R.grad);
  if (R.mask && !R.mask[row]) {
    for (int64_t v = threadIdx.x % kTeam; v < V; v += kTeam) store_one<S>(grad + v * step, R.grad.dtype, T(0));
    return;
  }
  const DistReader<S, T> reader(R, row);
  const DistRow x = P.of_rows[row];
  const DistSoftmax<T> softmax(x, P.temperature);
  const T of_row = T(x.slope), own = T(x.own), constant = T(-((x.slope < 0 ? x.slope : 0) + x.own) / double(V));
  const auto slope = [&](const Element<T>& e, int64_t v) {
    if (v >= V) return T(0);
    const T D = p_minus_q(e), of_column = P.columns[v];
    return e.p * (of_column * (of_column < T(0) ? e.q : D) + of_row * (of_row < T(0) ? e.q : D) +
                  (P.columns[stride + v] + own) * e.p + (P.columns[2 * stride + v] + constant));
  };
  double sum = 0;
  reader.template each<kTeam>(V, [&](int64_t v, const T(&s)[kDistAtOnce<S>], const T(&t)[kDistAtOnce<S>]) {
    T some = 0;
#pragma unroll
    for (int i = 0; i < kDistAtOnce<S>; ++i) some += slope(softmax(s[i], t[i]), v + i * kTeam);
    sum += double(some);
  });
  const T less = T(over_team<kTeam>(SharedSum{sum}, room->slopes).sum);
  const T scale = *P.upstream * (T(1) / T(P.temperature));
  reader.template each<kTeam>(V, [&](int64_t v, const T(&s)[kDistAtOnce<S>], const T(&t)[kDistAtOnce<S>]) {
#pragma unroll
    for (int i = 0; i < kDistAtOnce<S>; ++i) {
      const Element<T> e = softmax(s[i], t[i]);
      const int64_t at = v + i * kTeam;
      if (at < V) store_one<S>(grad + at * step, R.grad.dtype, (slope(e, at) - e.p * less) * scale);
    }
  });
}

}  // namespace fastkd::cuda
