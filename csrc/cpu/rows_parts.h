// What is told of rows besides their loss, compiled for one instruction set, as the binding sees it.
#pragma once
#include "common/rows_params.h"

namespace fastkd {

// Entropies and agreement of rows begin .. end, in P.parts. Before their gradient is written, perhaps over the student.
// last: the end of the rows that the thread comes to; the next of them is asked for ahead.
template <class T>
using RowsDescribe = void (*)(const RowsParams<T>& P, int64_t begin, int64_t end, int64_t last);

// One for each level of isa.h.
namespace baseline {
template <class T>
RowsDescribe<T> rows_describe();
}
namespace avx2 {
template <class T>
RowsDescribe<T> rows_describe();
}
namespace avx512 {
template <class T>
RowsDescribe<T> rows_describe();
}

}  // namespace fastkd
