// Which instruction set the CPU kernels run with: chosen once, at the first call.
#pragma once

namespace hqod {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best one that the machine has, or the one that HQOD_CPU_ISA (baseline, avx2, avx512) names.
// Throws std::runtime_error when that is unknown or not to be had.
Isa cpu_isa();

}  // namespace hqod

// A kernel's name carries its instruction set: box_iou_forward_avx2.
#define HQOD_JOIN_(name, isa) name##_##isa
#define HQOD_JOIN(name, isa) HQOD_JOIN_(name, isa)

// Declares a kernel in every instruction set.
#define HQOD_DECLARE_KERNEL(name, ...) \
  namespace hqod {                     \
  void name##_baseline(__VA_ARGS__);   \
  void name##_avx2(__VA_ARGS__);       \
  void name##_avx512(__VA_ARGS__);     \
  }

// Its name where it is defined, compiled with -DHQOD_ISA=...
#define HQOD_KERNEL_NAME(name) HQOD_JOIN(name, HQOD_ISA)

// The one of the chosen instruction set.
#ifdef HQOD_X86
#define HQOD_KERNEL(name)                                      \
  (hqod::cpu_isa() == hqod::Isa::kAvx512 ? hqod::name##_avx512 \
   : hqod::cpu_isa() == hqod::Isa::kAvx2 ? hqod::name##_avx2   \
                                         : hqod::name##_baseline)
#else
#define HQOD_KERNEL(name) hqod::name##_baseline
#endif
