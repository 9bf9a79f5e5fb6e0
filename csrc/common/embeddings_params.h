// What the pairs and the angles schedules are told of their tensors. No torch header reaches a kernel.
#pragma once
#include "common/params.h"

namespace fastkd {

// Relations between two samples, each as its functor is named: of math/relation.h, and of what else a build
// has. The numbers are those of fastkd/ops/relations.py.
#ifndef FASTKD_MORE_RELATIONS
#define FASTKD_MORE_RELATIONS(X)
#endif
#define FASTKD_FOR_EACH_RELATION(X) X(RkdDistance) FASTKD_MORE_RELATIONS(X)
#define FASTKD_RELATION_ENUMERATOR(name) k##name,
enum class Relation : int64_t { FASTKD_FOR_EACH_RELATION(FASTKD_RELATION_ENUMERATOR) kCount };
#undef FASTKD_RELATION_ENUMERATOR

// How many of `rows` rows from `first` on are there. count: of all rows, or null: every row is.
FASTKD_HD int64_t rows_there(const int64_t* count, int64_t first, int64_t rows) {
  if (!count) return rows;
  const int64_t there = *count - first;
  return there < 0 ? 0 : there < rows ? there : rows;
}

// Embeddings [N, D], strides in elements.
struct Embeddings {
  const char* data;
  DType dtype;
  int32_t element_size;
  int64_t D;
  int64_t stride_n, stride_d;

  FASTKD_HD const char* at(int64_t n, int64_t d) const { return data + (n * stride_n + d * stride_d) * element_size; }
};

}  // namespace fastkd
