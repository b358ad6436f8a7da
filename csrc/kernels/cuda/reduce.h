// Sums over the threads of a block, in an order that the number of threads alone fixes.
#pragma once

#include "math/config.h"

HQOD_MATH_BEGIN

inline constexpr int kThreads = 256;
inline constexpr int kGroups = 32;  // first as many sums of every 32nd value, then the sum of those

// Call it after a barrier that follows the writing of values, by all threads; a barrier after it.
HQOD_HD void reduce_groups(const double (&values)[kThreads], int thread,
                           double (&groups)[kGroups]) {
  if (thread >= kGroups) return;
  double sum = 0;
  for (int i = thread; i < kThreads; i += kGroups) sum += values[i];
  groups[thread] = sum;
}

HQOD_HD double sum_groups(const double (&groups)[kGroups]) {
  double sum = 0;
  for (int i = 0; i < kGroups; ++i) sum += groups[i];
  return sum;
}

HQOD_MATH_END
