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

// FASTKD_OF_ISA(f<T>(x)): the f of the namespace of the instruction set in use.
#if FASTKD_X86
#define FASTKD_OF_ISA(...) \
  (isa() == Isa::kAvx512 ? avx512::__VA_ARGS__ : isa() == Isa::kAvx2 ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#else
#define FASTKD_OF_ISA(...) (baseline::__VA_ARGS__)
#endif
