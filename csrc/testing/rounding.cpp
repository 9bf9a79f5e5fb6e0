// The BLAS of another processor, as far as a test may tell: preloaded (LD_PRELOAD), it stands in for the products that
// torch asks of its BLAS, and moves every number of a result by one rounding, up or down, or leaves it.
//
// Which of the three depends on the number, where it stands, how large the product is and how many threads share it.
// So the same call gives the same bits again; one that is cut in another way, or dealt to more threads, gives others.
// Zeros stay: they are exact. FASTKD_ROUNDING chooses among the possible processors, a number, 1 by default.
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace {

void* symbol(const char* name) {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = torch ? dlsym(torch, name) : nullptr;
  if (!found) {
    std::fprintf(stderr, "rounding: libtorch_cpu.so has no %s\n", name);
    std::abort();
  }
  return found;
}

template <class F>
F* real(const char* name, F*) {
  return reinterpret_cast<F*>(symbol(name));
}

uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

uint64_t processor() {
  static const char* chosen = std::getenv("FASTKD_ROUNDING");
  return chosen ? std::strtoull(chosen, nullptr, 10) : 1;
}

// How many threads would share a product that is called for now.
uint64_t threads() {
  static const auto max_threads = reinterpret_cast<int (*)()>(symbol("mkl_get_max_threads"));
  static const auto in_parallel = reinterpret_cast<int (*)()>(symbol("omp_in_parallel"));
  return in_parallel() ? 1 : max_threads();
}

uint64_t key(int m, int n, int k) { return mixed(mixed(mixed(processor() + uint64_t(m)) + n) + k) + threads(); }

template <class T>
T moved(T value, uint64_t key, int64_t i, int64_t j) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  if (value == 0 || !std::isfinite(value)) return value;
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits += Bits(mixed(key + bits + mixed(uint64_t(i) << 32 | uint64_t(j))) % 3) - 1;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// c [m, n], column by column
template <class T>
void move(T* c, int m, int n, int64_t stride, uint64_t key) {
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < m; ++i) c[i + j * stride] = moved(c[i + j * stride], key, i, j);
  }
}

}  // namespace

extern "C" {

#define GEMM(name, T)                                                                                             \
  void name(const char* ta, const char* tb, const int* m, const int* n, const int* k, const T* alpha, const T* a, \
            const int* lda, const T* b, const int* ldb, const T* beta, T* c, const int* ldc) {                    \
    static const auto original = real(#name, &name);                                                              \
    original(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);                                               \
    move(c, *m, *n, *ldc, key(*m, *n, *k));                                                                       \
  }
GEMM(sgemm_, float)
GEMM(dgemm_, double)

#define GEMV(name, T)                                                                                              \
  void name(const char* trans, const int* m, const int* n, const T* alpha, const T* a, const int* lda, const T* x, \
            const int* step_x, const T* beta, T* y, const int* step_y) {                                           \
    static const auto original = real(#name, &name);                                                               \
    original(trans, m, n, alpha, a, lda, x, step_x, beta, y, step_y);                                              \
    move(y, 1, *trans == 'n' || *trans == 'N' ? *m : *n, *step_y, key(*m, *n, 1));                                 \
  }
GEMV(sgemv_, float)
GEMV(dgemv_, double)

#define DOT(name, T)                                                                   \
  T name(const int* n, const T* x, const int* step_x, const T* y, const int* step_y) { \
    static const auto original = real(#name, &name);                                   \
    return moved(original(n, x, step_x, y, step_y), key(1, 1, *n), 0, 0);              \
  }
DOT(sdot_, float)
DOT(ddot_, double)

#define GEMM_BATCH(name, T)                                                                                    \
  void name(int order, const int* ta, const int* tb, const int* m, const int* n, const int* k, const T* alpha, \
            const T** a, const int* lda, const T** b, const int* ldb, const T* beta, T** c, const int* ldc,    \
            int groups, const int* sizes) {                                                                    \
    static const auto original = real(#name, &name);                                                           \
    original(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, groups, sizes);                      \
    constexpr int kRowMajor = 101;                                                                             \
    for (int group = 0, i = 0; group < groups; ++group) {                                                      \
      const bool rows = order == kRowMajor;                                                                    \
      const int across = rows ? n[group] : m[group], down = rows ? m[group] : n[group];                        \
      for (int one = 0; one < sizes[group]; ++one, ++i) {                                                      \
        move(c[i], across, down, ldc[group], key(m[group], n[group], k[group]));                               \
      }                                                                                                        \
    }                                                                                                          \
  }
GEMM_BATCH(cblas_sgemm_batch, float)
GEMM_BATCH(cblas_dgemm_batch, double)

}  // extern "C"
