#include "kernels/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace hqod {
namespace {

Isa best_isa() {
#ifdef HQOD_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("HQOD_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  const std::string name(wanted);
  const char* names[] = {"baseline", "avx2", "avx512"};
  for (int i = 0; i < 3; ++i) {
    if (name != names[i]) continue;
    if (i > static_cast<int>(best)) {
      throw std::runtime_error("HQOD_CPU_ISA: this machine has no " + name + ", at best " +
                               names[static_cast<int>(best)]);
    }
    return static_cast<Isa>(i);
  }
  throw std::runtime_error("HQOD_CPU_ISA: expected baseline, avx2 or avx512, got '" + name + "'");
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace hqod
