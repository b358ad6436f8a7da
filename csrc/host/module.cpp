// The pybind11 module hqod_ops._host: code for NumPy arrays and the host, without torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "host/match.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Labels = py::array_t<int64_t, py::array::c_style>;  // floating point labels are a TypeError

std::string shape_text(const std::vector<py::ssize_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

void check_shape(const char* name, const py::array& array,
                 const std::vector<py::ssize_t>& expected) {
  const std::vector<py::ssize_t> got(array.shape(), array.shape() + array.ndim());
  if (got != expected) {
    throw py::value_error(std::string(name) + ": expected shape " + shape_text(expected) +
                          ", got " + shape_text(got));
  }
}

void check_finite(const char* name, const Floats& array) {
  const double* values = array.data();
  for (py::ssize_t i = 0; i < array.size(); ++i) {
    if (!std::isfinite(values[i])) {
      throw py::value_error(std::string(name) + ": expected finite values");
    }
  }
}

py::ssize_t rows(const py::array& array) { return array.ndim() == 0 ? 0 : array.shape(0); }

std::pair<py::array_t<int64_t>, py::array_t<double>> match_detections(
    const Floats& det_boxes,   // [D, 4]
    const Floats& det_scores,  // [D]
    const Labels& det_labels,  // [D]
    const Floats& gt_boxes,    // [G, 4]
    const Labels& gt_labels,   // [G]
    double iou_threshold) {
  const py::ssize_t num_det = rows(det_boxes), num_gt = rows(gt_boxes);
  check_shape("det_boxes", det_boxes, {num_det, 4});
  check_shape("det_scores", det_scores, {num_det});
  check_shape("det_labels", det_labels, {num_det});
  check_shape("gt_boxes", gt_boxes, {num_gt, 4});
  check_shape("gt_labels", gt_labels, {num_gt});
  check_finite("det_boxes", det_boxes);
  check_finite("det_scores", det_scores);
  check_finite("gt_boxes", gt_boxes);
  if (!(iou_threshold > 0.0 && iou_threshold <= 1.0)) {
    throw py::value_error("iou_threshold: expected a value in (0, 1], got " +
                          std::string(py::str(py::float_(iou_threshold))));
  }
  py::array_t<int64_t> matched(num_det);
  py::array_t<double> ious(num_det);
  int64_t* matched_out = matched.mutable_data();
  double* ious_out = ious.mutable_data();
  {
    py::gil_scoped_release release;
    hqod::host::match_detections(det_boxes.data(), det_scores.data(), det_labels.data(), num_det,
                                 gt_boxes.data(), gt_labels.data(), num_gt, iou_threshold,
                                 matched_out, ious_out);
  }
  return {std::move(matched), std::move(ious)};
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "GCC " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cxx_standard"] = "C++" + std::to_string(__cplusplus / 100 % 100);
#ifdef NDEBUG
  info["build_type"] = "release";
#else
  info["build_type"] = "debug";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host code of hqod_ops for NumPy arrays.";
  m.def("match_detections", &match_detections, py::arg("det_boxes"), py::arg("det_scores"),
        py::arg("det_labels"), py::arg("gt_boxes"), py::arg("gt_labels"), py::arg("iou_threshold"),
        "Index of the ground truth [D] (-1 for none) and IoU [D] of each detection; see "
        "hqod_ops.detection.harmony.match_detections.");
  m.def("build_info", &build_info, "Compiler, C++ standard and build type of this module.");
}
