// The element types that the kernels know.
#pragma once

namespace hqod {

enum class Dtype { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kHalf = 3 };

}  // namespace hqod
