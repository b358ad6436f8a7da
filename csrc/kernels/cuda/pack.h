// Accesses of up to 16 bytes.
#pragma once

#include "kernels/dtype.h"

HQOD_MATH_BEGIN

// Values that are loaded and stored in one access, of up to 16 bytes.
template <typename S, int n>
struct alignas(sizeof(S) * n < 16 ? sizeof(S) * n : 16) Pack {
  S v[n];
};

HQOD_HD bool is_aligned(const void* p, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

HQOD_MATH_END
