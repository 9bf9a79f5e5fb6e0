// All triplets of one sample on the CPU. Compiled once per instruction set.
//
//   a_j = margin + d_ij of the P positives, sorted; of a negative k the rank r_k = #{j: a_j <= d_ik}
//   loss_i = f sum_k (sum_{j >= r_k} a_j - (P - r_k) d_ik), f = weight_i / |neg(i)|
//   dL/dd_ik = -f (P - r_k), dL/dd_ij = f #{k: r_k <= j}, both over d are the weights of x_i - x_j
//
// Ranks by the part of the thresholds' range that a distance is in, and binary search there; sums of thresholds and
// counts by prefix sums: O(N log P + P log P) at the most, where the triplets are N P.
#include "cpu/triplet_kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/distances.h"

namespace fastkd::FASTKD_ISA {
namespace {

template <class T>
struct Positive {
  T threshold, distance;
  int64_t j;
};

template <class T>
void distances(const TripletStrip<T>& P, int64_t i, T* d) {
  const int64_t self = P.row + i;
  squared_distances(d, P.norms[self], P.norms, P.N, self, P.x + self * P.D, P.x, P.D, P.D);
#pragma omp simd
  for (int64_t j = 0; j < P.N; ++j) {
    const T squared = d[j];
    d[j] = std::sqrt(squared < kMinSquaredDistance<T> ? kMinSquaredDistance<T> : squared);
  }
}

// Takes the positives out of the row; they, and what is no negative either, are infinitely far then. Returns whether
// every threshold is a number.
template <class T>
bool take_positives(const TripletStrip<T>& P, int64_t self, T* d, std::vector<Positive<T>>& found) {
  constexpr T kFar = std::numeric_limits<T>::infinity();
  found.clear();
  bool numbers = true;
  d[self] = kFar;
  for (int64_t p = P.first[self]; p < P.last[self]; ++p) {
    const int64_t j = P.positives[p];
    if (j == self || !P.valid[j]) continue;
    found.push_back({P.margin + d[j], d[j], j});
    numbers &= !std::isnan(d[j]);
    d[j] = kFar;
  }
  if (P.count < P.N) {
    for (int64_t j = 0; j < P.N; ++j) d[j] = P.valid[j] ? d[j] : kFar;
  }
  return numbers;
}

// Equal parts of the range of the thresholds, each with how many lie before it. What is rounded is monotone: a
// distance is above all thresholds of the parts before its own, and below all of those behind.
template <class T>
class Parts {
 public:
  // thresholds: sorted, and behind them as many again that nothing is above
  void make(const T* a, int32_t count) {
    int32_t parts = 1;
    while (parts < 4 * count) parts *= 2;
    first_ = a[0];
    const T range = a[count - 1] - a[0];
    last_ = T(parts - 1);
    by_ = range > 0 && last_ / range < std::numeric_limits<T>::max() ? last_ / range : T(0);
    before_.assign(parts + 1, 0);
    for (int32_t p = 0; p < count; ++p) ++before_[of(a[p]) + 1];
    const int32_t most = *std::max_element(before_.begin(), before_.end());
    for (int32_t part = 0; part < parts; ++part) before_[part + 1] += before_[part];
    half_ = 1;
    while (2 * half_ <= most) half_ *= 2;
  }

  // ranks[k]: how many thresholds are at most d[k]. A NaN's is 0.
  void rank(const T* a, const T* d, int64_t N, int32_t* ranks) const {
    const int32_t* before = before_.data();
    const T first = first_, by = by_, last = last_;
#pragma omp simd
    for (int64_t k = 0; k < N; ++k) {
      const T above = (d[k] - first) * by, at = above > 0 ? above : T(0);  // in this order a NaN's is 0
      ranks[k] = before[int32_t(at < last ? at : last)];
    }
    for (int32_t half = half_; half > 0; half /= 2) {
#pragma omp simd
      for (int64_t k = 0; k < N; ++k) {
        const int32_t r = ranks[k];
        ranks[k] = r + (a[r + half - 1] <= d[k] ? half : 0);
      }
    }
  }

 private:
  int32_t of(T x) const {
    const T at = (x - first_) * by_;
    return int32_t(at < last_ ? at : last_);
  }
  T first_, by_, last_;
  int32_t half_;  // of the largest part, as a power of 2
  std::vector<int32_t> before_;
};

// What a thread keeps from row to row.
template <class T>
struct Room {
  std::vector<Positive<T>> positives;
  std::vector<T> thresholds;  // and behind them what is above all
  std::vector<double> sums;   // of the thresholds from each on
  std::vector<int32_t> ranks, of_rank;
  Parts<T> parts;
};

template <class T>
void row(const TripletStrip<T>& P, int64_t i, TripletSums& sums, std::vector<NearPair<T>>& near) {
  thread_local Room<T> room;
  const int64_t self = P.row + i, N = P.N;
  T* d = P.strip + i * N;
  if (!P.valid[self]) {
    std::fill_n(d, N, T(0));
    return;
  }
  distances(P, i, d);
  auto& positives = room.positives;
  const bool numbers = take_positives(P, self, d, positives);
  const int32_t count = int32_t(positives.size());
  const int64_t negatives = P.count - 1 - count;
  if (count == 0 || negatives == 0) {
    std::fill_n(d, N, T(0));
    return;
  }
  sums.triplets = double(count) * double(negatives);
  const T factor = P.weight[self] / T(negatives);
  if (!numbers || std::isnan(factor)) {
    sums.loss = std::numeric_limits<double>::quiet_NaN();
    std::fill_n(d, N, std::numeric_limits<T>::quiet_NaN());
    return;
  }

  std::sort(positives.begin(), positives.end(), [](const Positive<T>& a, const Positive<T>& b) {
    return a.threshold < b.threshold || (a.threshold == b.threshold && a.j < b.j);
  });
  room.thresholds.assign(3 * count + 2, std::numeric_limits<T>::quiet_NaN());  // at most nothing
  room.sums.assign(count + 1, 0.0);
  for (int32_t p = count - 1; p >= 0; --p) {
    room.thresholds[p] = positives[p].threshold;
    room.sums[p] = room.sums[p + 1] + double(positives[p].threshold);
  }
  room.ranks.resize(N);
  int32_t* ranks = room.ranks.data();
  room.parts.make(room.thresholds.data(), count);
  room.parts.rank(room.thresholds.data(), d, N, ranks);

  const double* threshold_sums = room.sums.data();
  const T norm = P.norms[self];
  const auto is_near = [norm, &P](T distance, int64_t j) {
    return distance * distance < kNear<T> * (norm + P.norms[j]);
  };
  double loss = 0, active = 0;
  int any_near = 0;
#pragma omp simd reduction(+ : loss, active, any_near)
  for (int64_t k = 0; k < N; ++k) {
    const int32_t above = count - ranks[k];
    const double part = threshold_sums[ranks[k]] - double(above) * double(d[k]);
    loss += above ? part : 0.0;  // not 0 times the distance of what is infinitely far
    active += double(above);
    any_near += is_near(d[k], k);
  }
  sums.loss = double(factor) * loss;
  sums.active = active;
  if (!P.save) return;

  room.of_rank.assign(count + 1, 0);
  for (int64_t k = 0; k < N; ++k) ++room.of_rank[ranks[k]];
  for (int64_t k = 0; k < N && any_near; ++k) {
    if (!is_near(d[k], k) || ranks[k] == count) continue;
    if (d[k] > kMinDistance<T>) near.push_back({self, k, -factor * T(count - ranks[k]) / d[k]});
    ranks[k] = count;  // its weight in the strip is 0
  }
#pragma omp simd
  for (int64_t k = 0; k < N; ++k) {
    const T w = -factor * T(count - ranks[k]) / d[k];
    d[k] = d[k] <= kMinDistance<T> ? T(0) : w;
  }
  int32_t farther = 0;  // negatives that are nearer than the threshold
  for (int32_t p = 0; p < count; ++p) {
    farther += room.of_rank[p];
    const Positive<T>& positive = positives[p];
    if (farther == 0 || positive.distance <= kMinDistance<T>) {
      d[positive.j] = 0;
      continue;
    }
    const T w = factor * T(farther) / positive.distance;
    const bool apart = is_near(positive.distance, positive.j);
    if (apart) near.push_back({self, positive.j, w});
    d[positive.j] = apart ? T(0) : w;
  }
}

template <class T>
const TripletKernel<T> kernel = {row<T>};

}  // namespace

template <class T>
const TripletKernel<T>& triplet_kernel() {
  return kernel<T>;
}
template const TripletKernel<float>& triplet_kernel<float>();
template const TripletKernel<double>& triplet_kernel<double>();

}  // namespace fastkd::FASTKD_ISA
