// The device that an op runs on, made current, and torch's stream on it.
#pragma once

#include "checks.h"
#include "kernels/cuda/launch_types.h"

#ifndef HQOD_EMULATE
#include <torch/csrc/stable/accelerator.h>
#endif

namespace hqod {

#ifdef HQOD_EMULATE

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  Stream stream() const { return nullptr; }
};

#else

class OnDevice {
 public:
  explicit OnDevice(const Tensor& like);
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};

#endif

}  // namespace hqod
