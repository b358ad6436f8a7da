#include "device/cuda_stream.h"

#include <dlfcn.h>

namespace hqod {
namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

// Looked up in the library that torch has loaded: linking to it would tie this one to a CUDA build
// of torch, which the machine that builds it need not have.
CurrentStream find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
  STD_TORCH_CHECK(torch_cuda != nullptr, "hqod_ops: libtorch_cuda.so is not loaded");
  void* found = dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(found != nullptr, "hqod_ops: this torch does not tell its current CUDA stream");
  return reinterpret_cast<CurrentStream>(found);
}

}  // namespace

OnDevice::OnDevice(const Tensor& like) : guard_(like.get_device_index()) {
  static const CurrentStream current_stream = find_current_stream();
  STD_TORCH_CHECK(current_stream(like.get_device_index(), &stream_) == 0,
                  "hqod_ops: no current CUDA stream");
}

}  // namespace hqod
