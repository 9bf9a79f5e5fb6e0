#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>

#include "common/check.h"

namespace fastkd {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

bool supported(Isa level) {
#if FASTKD_X86
  switch (level) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return level == Isa::kBaseline;
#endif
}

Isa choose(const std::string& name) {
  if (name.empty()) {
    return supported(Isa::kAvx512) ? Isa::kAvx512 : supported(Isa::kAvx2) ? Isa::kAvx2 : Isa::kBaseline;
  }
  for (const Isa level : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (name != kNames[int(level)]) continue;
    FASTKD_CHECK(supported(level), "FASTKD_CPU_ISA: this processor has no ", name);
    return level;
  }
  FASTKD_CHECK(false, "FASTKD_CPU_ISA: baseline, avx2 or avx512 wanted, got '", name, "'");
  return Isa::kBaseline;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> level = [] {
    const char* name = std::getenv("FASTKD_CPU_ISA");
    return choose(name ? name : "");
  }();
  return level;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }
const char* isa_name() { return kNames[int(isa())]; }
void set_isa(const std::string& name) { current().store(choose(name)); }

}  // namespace fastkd
