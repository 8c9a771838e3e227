// What row_stats asks of its tensors, on every device, and its op in terms of the one function a device has to bring.
// What would read or write outside a tensor is refused here, whoever calls; friendlier messages come from Python.
#pragma once
#include <optional>
#include <tuple>

#include "common/row_divergence_tensors.h"
#include "common/row_stats_math.h"

namespace kdaif {

// The op's arguments, checked, with dense rows; and where its results go.
struct RowStatsTensors {
  Tensor student;          // [N, V]
  MaybeTensor teacher;     // [N, V], of the student's dtype
  MaybeTensor labels;      // int64 [N] contiguous
  double temperature;
  int64_t first_class, class_count, ignore_index;
  Tensor stats;            // [STATS_ALONE or STATS_OF_BOTH, N], accumulation type
  Tensor argmax;           // int64 [1 or 2, N]

  int64_t rows() const { return student.size(0); }
  int64_t classes() const { return student.size(1); }
  int64_t teacher_stride() const { return teacher ? teacher->stride(0) : 0; }
  const void* teacher_data() const { return teacher ? teacher->const_data_ptr() : nullptr; }
  const int64_t* label_data() const { return labels ? labels->const_data_ptr<int64_t>() : nullptr; }
};

inline void check_row_stats(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels, double temperature,
                            int64_t first_class, int64_t class_count) {
  STD_TORCH_CHECK(student.dim() == 2 && student.size(1) > 0, "row_stats: student_logits must be [N, V] with V > 0");
  const int64_t N = student.size(0), V = student.size(1);
  STD_TORCH_CHECK(!teacher || (teacher->dim() == 2 && teacher->size(0) == N && teacher->size(1) == V),
                  "row_stats: logits differ in shape");
  STD_TORCH_CHECK(!teacher || teacher->scalar_type() == student.scalar_type(), "row_stats: logits differ in dtype");
  STD_TORCH_CHECK(!labels || (labels->dim() == 1 && labels->size(0) == N && labels->scalar_type() == ScalarType::Long),
                  "row_stats: labels must be int64 [N]");
  STD_TORCH_CHECK(temperature > 0, "row_stats: temperature is ", temperature, ", expected a positive number");
  STD_TORCH_CHECK(0 <= first_class && 0 <= class_count && first_class <= V && class_count <= V - first_class,
                  "row_stats: the class slice is not within the classes");
}

// run(tensors) computes them.
template <auto run>
std::tuple<Tensor, Tensor> row_stats(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels,
                                     double temperature, int64_t first_class, int64_t class_count, int64_t ignore_index) {
  check_row_stats(student, teacher, labels, temperature, first_class, class_count);
  const int64_t N = student.size(0), sides = teacher ? 2 : 1, count = teacher ? STATS_OF_BOTH : STATS_ALONE;
  const RowStatsTensors tensors{with_dense_rows(student),
                                teacher ? MaybeTensor(with_dense_rows(*teacher)) : MaybeTensor(),
                                labels ? MaybeTensor(torch::stable::contiguous(*labels)) : MaybeTensor(),
                                temperature,
                                first_class,
                                class_count,
                                ignore_index,
                                torch::stable::new_empty(student, {count, N}, accumulation_type(student)),
                                torch::stable::new_empty(student, {sides, N}, ScalarType::Long)};
  run(tensors);
  return {tensors.stats, tensors.argmax};
}

}  // namespace kdaif

#define KDAIF_REGISTER_ROW_STATS(m, run) m.impl("row_stats", TORCH_BOX(&kdaif::row_stats<run>));
