// fake_quant and fake_quant_foreach.
#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "device/allocate.h"
#include "device/device.h"
#include "ops/layout.h"

namespace hqod {
namespace {

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

struct Options {
  std::optional<int64_t> ch_axis;
  double grad_scale;
  bool lsq_grad_scale;
  int64_t activation = 0;
};

// One tensor's call and what it points into.
struct Job {
  FakeQuantCall call;
  Tensor x, scale;
  std::optional<Tensor> zero_point;

  Job(const Tensor& x_in, const Tensor& scale_in, const std::optional<Tensor>& zero_point_in,
      int64_t quant_min, int64_t quant_max, const Options& options)
      : x(x_in), scale(scale_in), zero_point(zero_point_in) {
    STD_TORCH_CHECK(quant_min < quant_max, "quant_min: expected less than quant_max");
    call.dtype = dtype_of("x", x);
    call.activation = code_of("activation", options.activation, 3);
    call.quant_min = static_cast<double>(quant_min);
    call.quant_max = static_cast<double>(quant_max);
    if (!is_dense(x)) x = in_layout_of(x_in, torch::stable::empty_like(x_in));

    int64_t channels = 1;
    call.inner = x.numel();
    if (options.ch_axis.has_value()) {
      int64_t axis = *options.ch_axis;
      STD_TORCH_CHECK(axis >= -x.dim() && axis < x.dim(), "ch_axis: out of range");
      if (axis < 0) axis += x.dim();
      channels = x.size(axis);
      if (channels > 1) call.inner = x.stride(axis);
    }
    call.channels = channels;
    if (x.numel() == 0) call.inner = 0;
    call.outer = call.inner == 0 ? 0 : x.numel() / (channels * call.inner);

    check_param("scale", scale, channels);
    check_float_beside("scale", scale, x);
    if (zero_point.has_value()) {
      check_param("zero_point", *zero_point, channels);
      check_alike("zero_point", *zero_point, "scale", scale);
    }
    call.param_dtype = dtype_of("scale", scale);
    const double per_scale = static_cast<double>(x.numel()) / std::max<int64_t>(channels, 1);
    const double lsq =
        std::max(per_scale, 1.0) * static_cast<double>(std::max<int64_t>(quant_max, 1));
    call.factor = options.lsq_grad_scale ? 1.0 / std::sqrt(lsq) : options.grad_scale;

    call.x = x.const_data_ptr();
    call.scale = params(scale);
    if (zero_point.has_value()) call.zero_point = params(*zero_point);
  }

  void check_param(const char* name, const Tensor& param, int64_t channels) const {
    STD_TORCH_CHECK(param.numel() == channels, name, ": expected C = ", channels, " values, got ",
                    param.numel());
    STD_TORCH_CHECK(param.device() == x.device(), name, ": expected the device of x");
  }

  static const void* params(Tensor& param) {
    if (!param.is_contiguous()) param = torch::stable::contiguous(param);
    return param.const_data_ptr();
  }
};

Tensor fake_quant(const Tensor& x,                          // [*]
                  const Tensor& scale,                      // [1] or [C]
                  const std::optional<Tensor>& zero_point,  // [1] or [C]
                  int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
                  double grad_scale, bool lsq_grad_scale, int64_t activation) {
  const Options options{ch_axis, grad_scale, lsq_grad_scale, activation};
  Job job(x, scale, zero_point, quant_min, quant_max, options);
  Tensor y = like_dense(x);
  job.call.y = y.mutable_data_ptr();
  FakeQuantCall* const call = &job.call;
  run_fake_quant_forward(&call, 1, x);
  return y;
}

struct Gradients {
  Tensor dx, d_scale, d_zero_point;
};

// Points a job at its upstream gradient, kept alive in dy, and at new results.
Gradients prepare_backward(Job& job, const Tensor& grad, int64_t wanted, Tensor& dy) {
  STD_TORCH_CHECK(same_shape(grad, job.x), "grad: expected the shape of x");
  check_alike("grad", grad, "x", job.x);
  dy = in_layout_of(grad, job.x);
  job.call.dy = dy.const_data_ptr();
  Tensor dx = wanted & 1 ? like_dense(job.x) : no_gradient(job.x);
  if (wanted & 1) job.call.dx = dx.mutable_data_ptr();
  return {dx, new_gradient(wanted & 2, job.scale, job.call.d_scale),
          new_gradient(wanted & 4, job.zero_point.value_or(job.scale), job.call.d_zero_point)};
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_backward(
    const Tensor& grad,                       // [*]
    const Tensor& x,                          // [*]
    const Tensor& scale,                      // [1] or [C]
    const std::optional<Tensor>& zero_point,  // [1] or [C]
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis, double grad_scale,
    bool lsq_grad_scale, int64_t activation, int64_t wanted) {
  const Options options{ch_axis, grad_scale, lsq_grad_scale, activation};
  Job job(x, scale, zero_point, quant_min, quant_max, options);
  Tensor dy;
  const Gradients g = prepare_backward(job, grad, wanted, dy);
  FakeQuantCall* const call = &job.call;
  run_fake_quant_backward(&call, 1, x);
  return {g.dx, g.d_scale, g.d_zero_point};
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
    STD_TORCH_CHECK(xs[i].device() == xs[0].device(), "xs: expected one device");
    jobs.push_back(
        std::make_unique<Job>(xs[i], scales[i], zero_point, quant_min[i], quant_max[i], options));
  }
  return jobs;
}

std::vector<FakeQuantCall*> calls_of(const std::vector<std::unique_ptr<Job>>& jobs) {
  std::vector<FakeQuantCall*> calls;
  for (const auto& job : jobs) calls.push_back(&job->call);
  return calls;
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
  const auto calls = calls_of(jobs);
  if (!calls.empty()) run_fake_quant_forward(calls.data(), calls.size(), xs[0]);
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
  std::vector<Tensor> dys(jobs.size()), dxs, d_scales, d_zero_points;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const Gradients g = prepare_backward(*jobs[i], grads[i], wanted, dys[i]);
    dxs.push_back(g.dx);
    d_scales.push_back(g.d_scale);
    d_zero_points.push_back(g.d_zero_point);
  }
  const auto calls = calls_of(jobs);
  if (!calls.empty()) run_fake_quant_backward(calls.data(), calls.size(), xs[0]);
  return {dxs, d_scales, d_zero_points};
}

HQOD_LIBRARY_IMPL(m) {
  m.impl("fake_quant", TORCH_BOX(&fake_quant));
  m.impl("_fake_quant_backward", TORCH_BOX(&fake_quant_backward));
  m.impl("fake_quant_foreach", TORCH_BOX(&fake_quant_foreach));
  m.impl("_fake_quant_foreach_backward", TORCH_BOX(&fake_quant_foreach_backward));
}

}  // namespace
}  // namespace hqod
