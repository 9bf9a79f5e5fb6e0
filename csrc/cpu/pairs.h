// The pairs schedule on the CPU, for its own op and for that of the triples, which shares its inputs.
#pragma once
#include "cpu/embeddings.h"

namespace fastkd {

struct PairsOptions {
  double delta;
  bool normalize;
};

// The loss of all pairs. Into grad [N, D_s], where it is not null, goes its gradient.
template <class T>
double pairs_loss(const Centred<T>& student, const Centred<T>& teacher, const PairsOptions&, T* grad);

extern template double pairs_loss(const Centred<float>&, const Centred<float>&, const PairsOptions&, float*);
extern template double pairs_loss(const Centred<double>&, const Centred<double>&, const PairsOptions&, double*);

}  // namespace fastkd
