#include <memory>
#include <vector>

#include "kernels/cuda/fake_quant.h"
#include "kernels/cuda/fake_quant_kernel.h"
#include "kernels/cuda/fake_quant_total.h"

HQOD_MATH_BEGIN

inline constexpr int kMaxItems = 96;  // the table stays below the 32,764 bytes of a launch

// Whether every access of a thread is aligned to its size.
inline bool is_vector(const FakeQuantCall& call, const FakeQuantLayout& layout) {
  for (const void* p :
       {call.x, call.dy, static_cast<const void*>(call.y), static_cast<const void*>(call.dx)}) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  const int64_t vector = cuda_vector(call, layout.rows);
  if (layout.rows) return layout.channels == 1 || layout.inner % vector == 0;
  return layout.tile % vector == 0 && layout.stride % vector == 0;
}

// Launches Kernel<n> over the calls, as many at a time as a table holds. blocks_of(item) says how
// many blocks a call takes; those without one are left out.
template <template <int> typename Kernel, int n, typename F>
void launch_tables(const std::vector<const FakeQuantCall*>& calls, Stream stream, F&& blocks_of) {
  const auto kernel = std::make_unique<Kernel<n>>();
  auto& table = kernel->table;
  table.count = 0;
  int64_t blocks = 0;
  for (size_t i = 0; i <= calls.size(); ++i) {
    if (i == calls.size() || table.count == n) {
      if (blocks > 0) launch(*kernel, blocks, stream);
      table.count = 0;
      blocks = 0;
      if (i == calls.size()) return;
    }
    const FakeQuantLayout layout = cuda_layout(*calls[i]);
    FakeQuantItem item{*calls[i], layout, static_cast<uint32_t>(blocks),
                       static_cast<int>(cuda_steps_at_once(layout.inner)),
                       is_vector(*calls[i], layout)};
    const int64_t count = blocks_of(item);
    if (count == 0) continue;
    table.items[table.count++] = item;
    blocks += count;
  }
}

template <typename S, bool clipped>
struct Kernels {
  template <int n>
  using Forward = FakeQuantKernel<S, false, n, clipped>;
  template <int n>
  using Backward = FakeQuantKernel<S, true, n, clipped>;
};

template <typename S, int n, bool clipped>
void run_calls(const std::vector<const FakeQuantCall*>& calls, bool backward, Stream stream) {
  const auto units = [](const FakeQuantItem& item) { return item.layout.units; };
  if (backward) {
    launch_tables<Kernels<S, clipped>::template Backward, n>(calls, stream, units);
  } else {
    launch_tables<Kernels<S, clipped>::template Forward, n>(calls, stream, units);
  }
}

template <int n>
void run_totals(const std::vector<const FakeQuantCall*>& calls, Stream stream) {
  launch_tables<FakeQuantTotalKernel, n>(calls, stream, [](const FakeQuantItem& item) {
    const FakeQuantCall& call = item.call;
    const bool wanted = call.d_scale != nullptr || call.d_zero_point != nullptr;
    if (!wanted || item.layout.blocks == 1) return int64_t{0};
    using Total = FakeQuantTotalKernel<n>;
    const int lanes = Total::lanes_of(item.layout.blocks, call.channels);
    return ceil_div(call.channels, Total::kThreads / lanes);
  });
}

// Those with an activation one by one: fake_quant_foreach has none.
template <typename S>
void run_dtype(const std::vector<const FakeQuantCall*>& calls, bool backward, Stream stream) {
  std::vector<const FakeQuantCall*> plain;
  for (const FakeQuantCall* call : calls) {
    if (call->activation == 0) {
      plain.push_back(call);
    } else {
      run_calls<S, 1, true>({call}, backward, stream);
    }
  }
  if (plain.size() == 1) return run_calls<S, 1, false>(plain, backward, stream);
  if (!plain.empty()) run_calls<S, kMaxItems, false>(plain, backward, stream);
}

HQOD_MATH_END

namespace hqod {

void cuda_fake_quant(FakeQuantCall* const* calls, int64_t count, bool backward, Stream stream) {
  std::vector<const FakeQuantCall*> of_dtype[4], all;
  for (int64_t i = 0; i < count; ++i) {
    of_dtype[static_cast<int>(calls[i]->dtype)].push_back(calls[i]);
    all.push_back(calls[i]);
  }
  run_dtype<float>(of_dtype[static_cast<int>(Dtype::kFloat32)], backward, stream);
  run_dtype<double>(of_dtype[static_cast<int>(Dtype::kFloat64)], backward, stream);
  run_dtype<Bfloat16>(of_dtype[static_cast<int>(Dtype::kBfloat16)], backward, stream);
  run_dtype<Half>(of_dtype[static_cast<int>(Dtype::kHalf)], backward, stream);
  if (!backward) return;
  count == 1 ? run_totals<1>(all, stream) : run_totals<kMaxItems>(all, stream);
}

}  // namespace hqod
