// What the loss ops share: inputs brought into kernel form, results allocated.
#pragma once

#include <optional>

#include "ops/device.h"

namespace hqod {

enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Which gradients a backward op is asked for, as bits of its `wanted` argument.
enum Wanted : int64_t { kFirst = 1, kSecond = 2, kThird = 4 };

// A call under construction, and the tensors that it points into.
class LossBuilder {
 public:
  // count samples, all on the device of like, whose dtype is the one of boxes and scores.
  LossBuilder(const char* op, const Tensor& like, int64_t count);

  void boxes(const char* name1, const Tensor& boxes1, const char* name2, const Tensor& boxes2);
  void scores(const Tensor& scores);
  void ious(const Tensor& ious);
  void weight(const std::optional<Tensor>& weight);
  void tcorr(bool logits, int64_t variant);

  // The loss, shaped as the first dim sizes of like, or its sum times factor.
  Tensor forward(Loss loss, const Tensor& like, int64_t dim, int64_t reduction,
                 std::optional<double> avg_factor);

  // The reduced loss and, in the same pass, its gradients: what wanted() returned.
  Tensor forward_and_backward(Loss loss, const Tensor& like, int64_t reduction,
                              std::optional<double> avg_factor);

  // Sets the loss' own gradient. The kernel then fills what wanted() returned.
  void upstream(const Tensor& grad, const Tensor& like, int64_t reduction,
                std::optional<double> avg_factor);
  Tensor wanted(bool is_wanted, const Tensor& input, void*& data);
  void backward(Loss loss, const Tensor& like);

  LossCall call;

 private:
  const void* keep(const Tensor& x);

  double factor(int64_t reduction, std::optional<double> avg_factor) const;

  std::optional<Tensor> kept_[6];
  int kept_count_ = 0;
};

}  // namespace hqod
