// Every loss op, from a description of it:
//
//   struct FooOp {
//     static constexpr const char* name = "foo_loss";
//     static constexpr Loss loss = Loss::foo;
//     static constexpr LossInput inputs[] = {pred_input("pred"), target_input("target")};
//     using Form = Reduced;
//     static FooOptions options(double eps) { return {eps}; }
//   };
//   HQOD_LIBRARY_IMPL(m) { register_loss<FooOp>(m); }
//
// The three ops of a schema row (library.cpp) come from it: inputs, what its form adds (a weight),
// the arguments of options(), and what its form adds (how to reduce).
#pragma once

#include <cstddef>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "device/device.h"

namespace hqod {

// An input of a loss, where its kernel finds it and where it leaves the gradient.
struct LossInput {
  const char* name;
  bool is_box;  // [..., 4], else one value a sample: [...]
  const void* LossCall::* data;
  void* LossCall::* gradient;
};

constexpr LossInput pred_input(const char* name) {
  return {name, true, &LossCall::pred, &LossCall::d_pred};
}
constexpr LossInput target_input(const char* name) {
  return {name, true, &LossCall::target, &LossCall::d_target};
}
constexpr LossInput scores_input(const char* name) {
  return {name, false, &LossCall::scores, &LossCall::d_scores};
}
constexpr LossInput ious_input(const char* name) {
  return {name, false, &LossCall::ious, &LossCall::d_ious};
}

struct NoOptions {};

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// How a loss is reduced, as the last arguments of its op say.
struct Reducing {
  int64_t reduction = kNone;
  std::optional<double> avg_factor = {};  // what a mean divides by, if not the number of samples
};

template <typename... Ts>
struct Types {};

// What an op takes beside its inputs and options.
struct PerSample {
  using Weight = Types<>;
  using Tail = Types<>;
};
struct Reduced {
  using Weight = Types<const std::optional<Tensor>&>;  // [...]
  using Tail = Types<int64_t>;
};
struct Averaged : Reduced {
  using Tail = Types<int64_t, std::optional<double>>;
};

// A call under construction, and the tensors that it points into.
class LossBuilder {
 public:
  // The inputs are checked against the first one; boxes come before values a sample.
  LossBuilder(Loss loss, const LossInput* inputs, std::initializer_list<const Tensor*> tensors,
              const void* options, const Reducing& how);
  void weight(const std::optional<Tensor>& weight);
  void weight() {}

  // The loss, or its sum times a factor.
  Tensor forward();

  // Sets the loss' own gradient. The kernel then fills what gradient() returned.
  void upstream(const Tensor& grad);
  Tensor gradient(size_t input, int64_t wanted);
  void backward();

  // The reduced loss and, in the same pass, what gradient() returned.
  Tensor forward_and_backward();

 private:
  const void* keep(const Tensor& x);
  bool is_one_a_sample(const Tensor& x) const { return starts_alike(x, *tensors_[0], dim_); }

  static constexpr size_t kMost = 4;  // inputs of a loss

  Loss loss_;
  const LossInput* inputs_;
  const Tensor* tensors_[kMost];
  int64_t dim_;  // of a value a sample
  int64_t reduction_;
  LossCall call_;
  std::optional<Tensor> kept_[kMost + 2];
  size_t kept_count_ = 0;
};

template <size_t>
using TensorArgument = const Tensor&;
template <size_t>
using TensorResult = Tensor;

template <typename Op, typename Inputs, typename Options, typename Weight, typename Tail>
struct LossFunctions;

template <typename Op, size_t... i, typename Options, typename... Args, typename... Weight,
          typename... Tail>
struct LossFunctions<Op, std::index_sequence<i...>, Options (*)(Args...), Types<Weight...>,
                     Types<Tail...>> {
  using Gradients = std::tuple<TensorResult<i>...>;

  static Tensor forward(TensorArgument<i>... inputs, Weight... weight, Args... args, Tail... tail) {
    const Options options = Op::options(args...);
    LossBuilder b(Op::loss, Op::inputs, {&inputs...}, &options, Reducing{tail...});
    b.weight(weight...);
    return b.forward();
  }

  static Gradients backward(const Tensor& grad, TensorArgument<i>... inputs, Weight... weight,
                            Args... args, Tail... tail, int64_t wanted) {
    const Options options = Op::options(args...);
    LossBuilder b(Op::loss, Op::inputs, {&inputs...}, &options, Reducing{tail...});
    b.weight(weight...);
    b.upstream(grad);
    Gradients gradients{b.gradient(i, wanted)...};
    b.backward();
    return gradients;
  }

  static std::tuple<Tensor, TensorResult<i>...> forward_and_backward(TensorArgument<i>... inputs,
                                                                     Weight... weight, Args... args,
                                                                     Tail... tail, int64_t wanted) {
    const Options options = Op::options(args...);
    LossBuilder b(Op::loss, Op::inputs, {&inputs...}, &options, Reducing{tail...});
    b.weight(weight...);
    Gradients gradients{b.gradient(i, wanted)...};
    return std::tuple_cat(std::tuple{b.forward_and_backward()}, std::move(gradients));
  }
};

// Registers the ops of a loss for this library's device.
template <typename Op, typename Library>
void register_loss(Library& m) {
  using Inputs = std::make_index_sequence<std::extent_v<decltype(Op::inputs)>>;
  using Functions = LossFunctions<Op, Inputs, decltype(&Op::options), typename Op::Form::Weight,
                                  typename Op::Form::Tail>;
  const std::string name = Op::name;
  m.impl(name.c_str(), TORCH_BOX(&Functions::forward));
  m.impl(("_" + name + "_backward").c_str(), TORCH_BOX(&Functions::backward));
  if constexpr (!std::is_same_v<typename Op::Form, PerSample>) {
    m.impl(("_" + name + "_and_grad").c_str(), TORCH_BOX(&Functions::forward_and_backward));
  }
}

}  // namespace hqod
