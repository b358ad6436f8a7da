// The kernels of every loss: a thread a sample, a block a chunk of as many samples as it has
// threads, gradients recomputed from the inputs. A reduced loss of few samples is one block's,
// which goes over them; one of more needs a second, small kernel for its partial sums.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/cuda/losses.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/reduce.h"
#include "kernels/losses/inputs.h"

HQOD_MATH_BEGIN

template <typename S, typename T>
HQOD_HD Box<T> load_box_of(const void* from, int64_t i) {
  Pack<S, 4> p;
  if (is_aligned(from, alignof(Pack<S, 4>))) {
    p = load_pack<Pack<S, 4>>(from, i);
  } else {
    const S* at = static_cast<const S*>(from) + 4 * i;
    p = {{at[0], at[1], at[2], at[3]}};
  }
  return {static_cast<T>(widen(p.v[0])), static_cast<T>(widen(p.v[1])),
          static_cast<T>(widen(p.v[2])), static_cast<T>(widen(p.v[3]))};
}

template <typename S, typename T>
HQOD_HD void store_box_of(void* to, int64_t i, const Box<T>& box) {
  Pack<S, 4> p;
  narrow(box.x1, p.v[0]);
  narrow(box.y1, p.v[1]);
  narrow(box.x2, p.v[2]);
  narrow(box.y2, p.v[3]);
  store_pack(p, to, i);  // a new tensor, so aligned
}

template <typename T>
HQOD_HD void load_box(Dtype dtype, const void* from, int64_t i, BoxBlock<T, 1>& out) {
  if constexpr (sizeof(T) == 8) {
    out.set(0, load_box_of<double, T>(from, i));
  } else if (dtype == Dtype::kFloat32) {
    out.set(0, load_box_of<float, T>(from, i));
  } else if (dtype == Dtype::kBfloat16) {
    out.set(0, load_box_of<Bfloat16, T>(from, i));
  } else {
    out.set(0, load_box_of<Half, T>(from, i));
  }
}

template <typename T>
HQOD_HD void store_box(Dtype dtype, void* to, int64_t i, const BoxBlock<T, 1>& box) {
  if constexpr (sizeof(T) == 8) {
    store_box_of<double>(to, i, box[0]);
  } else if (dtype == Dtype::kFloat32) {
    store_box_of<float>(to, i, box[0]);
  } else if (dtype == Dtype::kBfloat16) {
    store_box_of<Bfloat16>(to, i, box[0]);
  } else {
    store_box_of<Half>(to, i, box[0]);
  }
}

enum class Pass { kForward, kBackward, kBackwardWithTarget };

template <typename Formula, Pass pass>
struct LossKernel {
  using T = typename Formula::Type;
  using Inputs = typename Formula::template Inputs<1>;
  static constexpr int kThreads = hqod::kThreads, kBlocks = 1, kPhases = 3;
  static_assert(kThreads == kCudaLossChunk);
  struct Shared {
    double values[kThreads], groups[kGroups];
  };
  using Local = Nothing;

  Formula formula;
  LossCall call;
  bool single;  // one block, which writes the total itself

  HQOD_HD T upstream(int64_t i) const {
    if (call.grad == nullptr) return T(1);
    return static_cast<const T*>(call.grad)[call.grad_is_scalar ? 0 : i];
  }

  // The loss of a sample, and its gradients.
  HQOD_HD T sample(int64_t i) const {
    Inputs in;
    if constexpr (Inputs::boxes) {
      load_box(call.dtype, call.pred, i, in.pred);
      load_box(call.dtype, call.target, i, in.target);
    }
    if constexpr (Inputs::scores) in.score[0] = read_one<T>(call.dtype, call.scores, i);
    if constexpr (Inputs::ious) in.iou[0] = read_one<T>(call.dtype, call.ious, i);
    const T weight = call.weight == nullptr ? T(1) : read_one<T>(call.weight_dtype, call.weight, i);
    run_stages<pass != Pass::kForward>(formula, in, 1);
    if constexpr (pass != Pass::kForward) {
      constexpr bool with_target = pass == Pass::kBackwardWithTarget;
      in.template finish<with_target>(0, weight * static_cast<T>(call.factor) * upstream(i));
      if constexpr (Inputs::boxes) {
        if (call.d_pred != nullptr) store_box(call.dtype, call.d_pred, i, in.d_pred);
        if constexpr (with_target) store_box(call.dtype, call.d_target, i, in.d_target);
      }
      if constexpr (Inputs::scores) {
        if (call.d_scores != nullptr) write_one(call.dtype, call.d_scores, i, in.d_score[0]);
      }
      if constexpr (Inputs::ious) {
        if (call.d_ious != nullptr) write_one(call.dtype, call.d_ious, i, in.d_iou[0]);
      }
    }
    return weight * in.loss[0];
  }

  template <int phase>
  HQOD_HD void run(int64_t block, int thread, Shared& shared, Local&) const {
    if constexpr (phase == 0) {
      const int64_t first = block * kThreads, after = single ? call.count : first + kThreads;
      const int64_t end = after < call.count ? after : call.count;
      double sum = 0;
      HQOD_ROLL
      for (int64_t i = first + thread; i < end; i += kThreads) {
        const T loss = sample(i);
        if (call.loss != nullptr) static_cast<T*>(call.loss)[i] = loss;
        sum += loss;
      }
      shared.values[thread] = sum;
    } else if (call.total == nullptr) {
      return;
    } else if constexpr (phase == 1) {
      reduce_groups(shared.values, thread, shared.groups);
    } else if (thread == 0) {
      const double sum = sum_groups(shared.groups);
      if (single) {
        *static_cast<T*>(call.total) = static_cast<T>(sum * call.factor);
      } else {
        call.partial_sums[block] = sum;
      }
    }
  }
};

// The total of a loss from its partial sums: one block.
struct LossTotalKernel {
  static constexpr int kThreads = hqod::kThreads, kBlocks = 1, kPhases = 3;
  struct Shared {
    double values[kThreads], groups[kGroups];
  };
  using Local = Nothing;

  const double* partial_sums;  // [count]
  int64_t count;
  void* total;
  Dtype dtype;
  double factor;

  template <int phase>
  HQOD_HD void run(int64_t, int thread, Shared& shared, Local&) const {
    if constexpr (phase == 0) {
      double sum = 0;
      for (int64_t i = thread; i < count; i += kThreads) sum += partial_sums[i];
      shared.values[thread] = sum;
    } else if constexpr (phase == 1) {
      reduce_groups(shared.values, thread, shared.groups);
    } else if (thread == 0) {
      write_one(dtype, total, 0, sum_groups(shared.groups) * factor);
    }
  }
};

template <typename Formula>
void launch_loss(const Formula& formula, const LossCall& call, bool backward, Stream stream) {
  const int64_t chunks = cuda_loss_chunks(call);
  const bool single = call.total != nullptr && chunks == 1;
  const auto start = [&]<Pass pass>() {
    launch(LossKernel<Formula, pass>{formula, call, single}, chunks, stream);
  };
  if (!backward) return start.template operator()<Pass::kForward>();
  if constexpr (Formula::template Inputs<1>::boxes) {
    if (call.d_target != nullptr) return start.template operator()<Pass::kBackwardWithTarget>();
  }
  start.template operator()<Pass::kBackward>();
}

HQOD_MATH_END

// A loss' entry, from its formula in kernels/losses.
#define HQOD_DEFINE_CUDA_LOSS(name)                                                         \
  namespace hqod {                                                                          \
  void cuda_##name(const LossCall& call, bool backward, Stream stream) {                    \
    with_##name(call, [&](auto formula) { launch_loss(formula, call, backward, stream); }); \
  }                                                                                         \
  }
