// Accesses of up to 16 bytes.
#pragma once

#ifdef HQOD_EMULATE
#include <cstdio>
#include <cstdlib>
#endif

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

// A wide access traps on a GPU where it is not aligned, which a CPU would not notice.
template <typename P>
HQOD_HD void check_aligned(const void* at) {
#ifdef HQOD_EMULATE
  if (!is_aligned(at, alignof(P))) {
    std::fprintf(stderr, "hqod_ops: a misaligned access of %zu bytes\n", sizeof(P));
    std::abort();
  }
#else
  (void)at;
#endif
}

// Pack number i of an array.
template <typename P>
HQOD_HD P load_pack(const void* from, int64_t i) {
  const P* at = static_cast<const P*>(from) + i;
  check_aligned<P>(at);
  return *at;
}

template <typename P>
HQOD_HD void store_pack(const P& p, void* to, int64_t i) {
  P* at = static_cast<P*>(to) + i;
  check_aligned<P>(at);
  *at = p;
}

HQOD_MATH_END
