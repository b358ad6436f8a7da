// How a kernel runs on a device, and how the same kernel runs without one.
//
// A kernel is a struct, copied to the device as it is. It has kThreads, the size of a block;
// kBlocks, how many of them a multiprocessor should hold; kPhases; Shared, what a block shares;
// Local, what a thread keeps from phase to phase; and
//
//   template <int phase> HQOD_HD void run(int64_t block, int thread, Shared&, Local&) const;
//
// All threads of a block finish a phase before any starts the next: a barrier on the device, the
// end of a loop over the threads in the emulation (HQOD_EMULATE), which plain C++ compilers build
// and which runs on the CPU's memory. Nothing may be exchanged within a phase. The emulation runs
// threads and blocks in an order that changes from phase to phase and fills fresh memory with NaN,
// so that a forgotten barrier or an unset value shows.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/cuda/launch_types.h"
#include "math/config.h"

#ifdef HQOD_EMULATE
#include <cstring>
#include <memory>
#else
#include <cuda_runtime.h>
#endif

namespace hqod {

struct Nothing {};  // for Shared and Local

#ifdef HQOD_EMULATE

template <typename Kernel, int phase>
void emulate_phase(const Kernel& kernel, int64_t block, typename Kernel::Shared& shared,
                   typename Kernel::Local* local) {
  const bool reversed = (block + phase) % 2 == 1;
  for (int i = 0; i < Kernel::kThreads; ++i) {
    const int thread = reversed ? Kernel::kThreads - 1 - i : i;
    kernel.template run<phase>(block, thread, shared, local[thread]);
  }
}

template <typename Kernel>
void launch(const Kernel& kernel, int64_t blocks, Stream) {
  using Shared = typename Kernel::Shared;
  using Local = typename Kernel::Local;
  const auto shared = std::make_unique<Shared>();
  const auto local = std::make_unique<Local[]>(Kernel::kThreads);
  for (int64_t i = 0; i < blocks; ++i) {
    std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(Shared));
    std::memset(static_cast<void*>(local.get()), 0xff, sizeof(Local) * Kernel::kThreads);
    const int64_t block = blocks - 1 - i;
    [&]<int... phases>(std::integer_sequence<int, phases...>) {
      (emulate_phase<Kernel, phases>(kernel, block, *shared, local.get()), ...);
    }(std::make_integer_sequence<int, Kernel::kPhases>{});
  }
}

#else

template <typename Kernel, int phase>
__device__ __forceinline__ void run_phases(const Kernel& kernel, typename Kernel::Shared& shared,
                                           typename Kernel::Local& local) {
  kernel.template run<phase>(blockIdx.x, threadIdx.x, shared, local);
  if constexpr (phase + 1 < Kernel::kPhases) {
    __syncthreads();
    run_phases<Kernel, phase + 1>(kernel, shared, local);
  }
}

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    run_kernel(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  typename Kernel::Local local;
  run_phases<Kernel, 0>(kernel, shared, local);
}

template <typename Kernel>
void launch(const Kernel& kernel, int64_t blocks, Stream stream) {
  if (blocks == 0) return;
  run_kernel<Kernel>
      <<<static_cast<unsigned>(blocks), Kernel::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          kernel);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("hqod_ops: a CUDA kernel did not start: ") +
                             cudaGetErrorString(error));
  }
}

#endif

}  // namespace hqod
