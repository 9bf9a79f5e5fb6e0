// The rows schedule on the CPU, for other ops of C++ that make logits.
#pragma once
#include "calls.h"

namespace fastkd {

// The op rows_fwd, with its checks.
void rows_forward(const RowsCall&, const RowsForward&);

}  // namespace fastkd
