// fake_quant and fake_quant_foreach on the CPU.
#include "kernels/cpu/fake_quant.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "kernels/cpu/convert.h"
#include "math/fake_quant_layout.h"
#include "ops/allocate.h"
#include "ops/layout.h"
#include "ops/loss.h"

namespace hqod {
namespace {

constexpr int64_t kGrain = 32768;  // elements below which a second thread costs more than it brings

Tensor like_dense(const Tensor& x) {
  if (!is_dense(x)) return torch::stable::empty_like(x);
  const auto sizes = x.sizes(), strides = x.strides();
  return empty_strided(sizes.data(), strides.data(), x.dim(), x.scalar_type(), x);
}

// x itself when its memory is in the order of like, which is dense; else a copy in that order.
Tensor in_layout_of(const Tensor& x, const Tensor& like) {
  if (same_layout(x, like)) return x;
  Tensor copy = torch::stable::empty_like(like);
  return torch::stable::copy_(copy, x);
}

// A scale or zero point in the compute type, converted where it is not already there.
template <typename T>
const void* param_data(const Tensor& param, std::vector<T>& storage) {
  const bool direct = sizeof(T) == 8 || param.scalar_type() == ScalarType::Float;
  const Tensor p = param.is_contiguous() ? param : torch::stable::contiguous(param);
  if (direct && param.is_contiguous()) return p.const_data_ptr();
  storage.resize(std::max<int64_t>(p.numel(), 1));
  const void* from = p.const_data_ptr();
  if (direct) {
    std::copy_n(static_cast<const T*>(from), p.numel(), storage.data());
  } else if constexpr (sizeof(T) == 4) {
    p.scalar_type() == ScalarType::Half
        ? load(static_cast<const Half*>(from), storage.data(), p.numel())
        : load(static_cast<const Bfloat16*>(from), storage.data(), p.numel());
  }
  return storage.data();
}

struct Options {
  std::optional<int64_t> ch_axis;
  double grad_scale;
  bool lsq_grad_scale;
};

// One tensor's call and what it points into.
struct Job {
  FakeQuantCall call;
  FakeQuantLayout layout;
  double factor;  // of the gradients to scale and zero point
  Tensor x, scale;
  std::optional<Tensor> zero_point;
  std::vector<float> floats[2];
  std::vector<double> doubles[2];
  std::unique_ptr<double[]> sums[2];

  Job(const Tensor& x_in, const Tensor& scale_in, const std::optional<Tensor>& zero_point_in,
      int64_t quant_min, int64_t quant_max, const Options& options)
      : x(x_in), scale(scale_in), zero_point(zero_point_in) {
    STD_TORCH_CHECK(quant_min < quant_max, "quant_min: expected less than quant_max");
    call.dtype = dtype_of("x", x);
    call.quant_min = static_cast<double>(quant_min);
    call.quant_max = static_cast<double>(quant_max);
    if (!is_dense(x)) x = in_layout_of(x_in, torch::stable::empty_like(x_in));

    int64_t channels = 1;
    call.channels = 1;
    call.inner = x.numel();
    if (options.ch_axis.has_value()) {
      int64_t axis = *options.ch_axis;
      STD_TORCH_CHECK(axis >= -x.dim() && axis < x.dim(), "ch_axis: out of range");
      if (axis < 0) axis += x.dim();
      channels = x.size(axis);
      if (channels > 1) {
        call.channels = channels;
        call.inner = x.stride(axis);
      }
    }
    if (x.numel() == 0) call.inner = 0;
    call.outer = call.inner == 0 ? 0 : x.numel() / (call.channels * call.inner);
    layout = fake_quant_layout(call.outer, call.channels, call.inner);

    check_param("scale", scale, channels);
    check_float_beside("scale", scale, x);
    if (zero_point.has_value()) {
      check_param("zero_point", *zero_point, channels);
      check_alike("zero_point", *zero_point, "scale", scale);
    }
    const double per_scale = static_cast<double>(x.numel()) / std::max<int64_t>(channels, 1);
    const double lsq =
        std::max(per_scale, 1.0) * static_cast<double>(std::max<int64_t>(quant_max, 1));
    factor = options.lsq_grad_scale ? 1.0 / std::sqrt(lsq) : options.grad_scale;

    call.x = x.const_data_ptr();
    call.scale = params(scale, 0);
    if (zero_point.has_value()) call.zero_point = params(*zero_point, 1);
  }

  void check_param(const char* name, const Tensor& param, int64_t channels) const {
    STD_TORCH_CHECK(param.numel() == channels, name, ": expected C = ", channels, " values, got ",
                    param.numel());
    STD_TORCH_CHECK(param.device() == x.device(), name, ": expected the device of x");
  }

  const void* params(const Tensor& param, int which) {
    return call.dtype == Dtype::kFloat64 ? param_data(param, doubles[which])
                                         : param_data(param, floats[which]);
  }

  double* new_sums(int which) {
    const int64_t count = std::max<int64_t>(layout.blocks * call.channels, 1);
    sums[which] = std::make_unique_for_overwrite<double[]>(count);
    return sums[which].get();
  }

  // The gradient of a parameter: its partial sums added up in order.
  Tensor gradient(const Tensor& param, int which) const {
    Tensor result = empty_contiguous(param, param.dim(), param.scalar_type());
    void* data = result.mutable_data_ptr();
    const int64_t channels = x.numel() == 0 ? param.numel() : call.channels;
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t b = 0; b < layout.blocks; ++b) total += sums[which][b * call.channels + c];
      write(data, param.scalar_type(), c, total * factor);
    }
    return result;
  }

  static void write(void* data, ScalarType type, int64_t at, double value) {
    switch (type) {
      case ScalarType::Double:
        static_cast<double*>(data)[at] = value;
        break;
      case ScalarType::Float:
        static_cast<float*>(data)[at] = static_cast<float>(value);
        break;
      case ScalarType::Half:
        narrow(static_cast<float>(value), static_cast<Half*>(data)[at]);
        break;
      default:
        narrow(static_cast<float>(value), static_cast<Bfloat16*>(data)[at]);
    }
  }
};

using FakeQuantKernel = void (*)(const FakeQuantCall&, int64_t, int64_t);

// Runs every unit of every job, spread over the threads.
void run(FakeQuantKernel kernel, const std::unique_ptr<Job>* jobs, int64_t count) {
  int64_t units = 0, elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    units += jobs[i]->layout.units;
    elements += jobs[i]->x.numel();
  }
  const auto run_range = [&](int64_t begin, int64_t end) {
    for (int64_t i = 0, first = 0; i < count && first < end; first += jobs[i++]->layout.units) {
      const int64_t from = std::max(begin - first, int64_t{0});
      const int64_t to = std::min(end - first, jobs[i]->layout.units);
      if (from < to) kernel(jobs[i]->call, from, to);
    }
  };
  if (elements <= kGrain) return run_range(0, units);
  const int64_t grain = std::max<int64_t>(1, units * kGrain / elements);
  torch::stable::parallel_for(0, units, grain, run_range);
}

Tensor fake_quant(const Tensor& x,                          // [*]
                  const Tensor& scale,                      // [1] or [C]
                  const std::optional<Tensor>& zero_point,  // [1] or [C]
                  int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
                  double grad_scale, bool lsq_grad_scale) {
  const Options options{ch_axis, grad_scale, lsq_grad_scale};
  const auto job = std::make_unique<Job>(x, scale, zero_point, quant_min, quant_max, options);
  Tensor y = like_dense(x);
  job->call.y = y.mutable_data_ptr();
  run(HQOD_KERNEL(fake_quant_forward), &job, 1);
  return y;
}

// Points a job at its upstream gradient and at new results for the wanted inputs.
Tensor prepare_backward(Job& job, const Tensor& grad, int64_t wanted, Tensor& dy) {
  STD_TORCH_CHECK(same_shape(grad, job.x), "grad: expected the shape of x");
  check_alike("grad", grad, "x", job.x);
  dy = in_layout_of(grad, job.x);
  job.call.dy = dy.const_data_ptr();
  Tensor dx = wanted & kFirst ? like_dense(job.x) : no_gradient(job.x);
  if (wanted & kFirst) job.call.dx = dx.mutable_data_ptr();
  if (wanted & kSecond) job.call.scale_sums = job.new_sums(0);
  if (wanted & kThird) job.call.zero_point_sums = job.new_sums(1);
  return dx;
}

Tensor param_gradient(const Job& job, bool is_wanted, const Tensor& param, int which) {
  return is_wanted ? job.gradient(param, which) : no_gradient(param);
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_backward(
    const Tensor& grad,                       // [*]
    const Tensor& x,                          // [*]
    const Tensor& scale,                      // [1] or [C]
    const std::optional<Tensor>& zero_point,  // [1] or [C]
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis, double grad_scale,
    bool lsq_grad_scale, int64_t wanted) {
  const Options options{ch_axis, grad_scale, lsq_grad_scale};
  const auto job = std::make_unique<Job>(x, scale, zero_point, quant_min, quant_max, options);
  Tensor dy;
  Tensor dx = prepare_backward(*job, grad, wanted, dy);
  run(HQOD_KERNEL(fake_quant_backward), &job, 1);
  return {dx, param_gradient(*job, wanted & kSecond, scale, 0),
          param_gradient(*job, wanted & kThird, zero_point.value_or(scale), 1)};
}

std::vector<std::unique_ptr<Job>> make_jobs(const std::vector<Tensor>& xs,
                                            const std::vector<Tensor>& scales,
                                            const std::vector<Tensor>& zero_points,
                                            const std::vector<int64_t>& quant_min,
                                            const std::vector<int64_t>& quant_max,
                                            const Options& options) {
  const size_t n = xs.size();
  STD_TORCH_CHECK(scales.size() == n && quant_min.size() == n && quant_max.size() == n &&
                      (zero_points.empty() || zero_points.size() == n),
                  "fake_quant_foreach: expected lists of one length");
  std::vector<std::unique_ptr<Job>> jobs;
  jobs.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    std::optional<Tensor> zero_point;
    if (!zero_points.empty()) zero_point = zero_points[i];
    jobs.push_back(
        std::make_unique<Job>(xs[i], scales[i], zero_point, quant_min[i], quant_max[i], options));
  }
  return jobs;
}

std::vector<Tensor> fake_quant_foreach(std::vector<Tensor> xs, std::vector<Tensor> scales,
                                       std::vector<Tensor> zero_points,
                                       std::vector<int64_t> quant_min,
                                       std::vector<int64_t> quant_max,
                                       std::optional<int64_t> ch_axis, double grad_scale,
                                       bool lsq_grad_scale) {
  const auto jobs = make_jobs(xs, scales, zero_points, quant_min, quant_max,
                              Options{ch_axis, grad_scale, lsq_grad_scale});
  std::vector<Tensor> ys;
  ys.reserve(jobs.size());
  for (size_t i = 0; i < jobs.size(); ++i) {
    ys.push_back(like_dense(xs[i]));
    jobs[i]->call.y = ys[i].mutable_data_ptr();
  }
  run(HQOD_KERNEL(fake_quant_forward), jobs.data(), static_cast<int64_t>(jobs.size()));
  return ys;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>
fake_quant_foreach_backward(std::vector<Tensor> grads, std::vector<Tensor> xs,
                            std::vector<Tensor> scales, std::vector<Tensor> zero_points,
                            std::vector<int64_t> quant_min, std::vector<int64_t> quant_max,
                            std::optional<int64_t> ch_axis, double grad_scale, bool lsq_grad_scale,
                            int64_t wanted) {
  const auto jobs = make_jobs(xs, scales, zero_points, quant_min, quant_max,
                              Options{ch_axis, grad_scale, lsq_grad_scale});
  STD_TORCH_CHECK(grads.size() == xs.size(), "grads: expected one for each of xs");
  std::vector<Tensor> dys(jobs.size()), dxs, dss, dzs;
  for (size_t i = 0; i < jobs.size(); ++i) {
    dxs.push_back(prepare_backward(*jobs[i], grads[i], wanted, dys[i]));
  }
  run(HQOD_KERNEL(fake_quant_backward), jobs.data(), static_cast<int64_t>(jobs.size()));
  for (size_t i = 0; i < jobs.size(); ++i) {
    dss.push_back(param_gradient(*jobs[i], wanted & kSecond, scales[i], 0));
    const Tensor& zero_point = zero_points.empty() ? scales[i] : zero_points[i];
    dzs.push_back(param_gradient(*jobs[i], wanted & kThird, zero_point, 1));
  }
  return {dxs, dss, dzs};
}

STABLE_TORCH_LIBRARY_IMPL(hqod, CPU, m) {
  m.impl("fake_quant", TORCH_BOX(&fake_quant));
  m.impl("_fake_quant_backward", TORCH_BOX(&fake_quant_backward));
  m.impl("fake_quant_foreach", TORCH_BOX(&fake_quant_foreach));
  m.impl("_fake_quant_foreach_backward", TORCH_BOX(&fake_quant_foreach_backward));
}

}  // namespace
}  // namespace hqod
