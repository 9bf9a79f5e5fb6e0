// The instruction sets that the CPU schedules are compiled for, and the one in use: the best
// that this processor has, or a lower one that FASTKD_CPU_ISA names.
#pragma once
#include <string>

namespace fastkd {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa isa();
const char* isa_name();
// Chooses a level; "" is the default again. Throws where the name or the processor does not fit.
void set_isa(const std::string& name);

}  // namespace fastkd
