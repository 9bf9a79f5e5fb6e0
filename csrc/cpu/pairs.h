// The pairs schedule on the CPU, for its own op and for that of the triples, which shares its inputs.
#pragma once
#include "common/embeddings_params.h"
#include "cpu/embeddings.h"
#include "math/relation.h"

namespace fastkd {

// The loss of all pairs; options.N is theirs; weight [N], or null: 1. Into grad [N, D_s], where it is not null, goes
// its gradient.
template <class T>
double pairs_loss(Relation, const RelationOptions&, const Centred<T>& student, const Centred<T>& teacher,
                  const T* weight, T* grad);

extern template double pairs_loss(Relation, const RelationOptions&, const Centred<float>&, const Centred<float>&,
                                  const float*, float*);
extern template double pairs_loss(Relation, const RelationOptions&, const Centred<double>&, const Centred<double>&,
                                  const double*, double*);

}  // namespace fastkd
