// row_stats on the CPU: label values, threads and registration. The loops are in row_stats_rows.cpp, the formulas in
// common/row_stats_math.h, the definition in kdaif_fast/reference/row_stats.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/row_stats_tensors.h"
#include "cpu/level.h"
#include "cpu/row_stats_rows.h"

namespace {

using namespace kdaif;

ElementType element_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::float32;
    case ScalarType::Double: return ElementType::float64;
    case ScalarType::BFloat16: return ElementType::bfloat16;
    case ScalarType::Half: return ElementType::float16;
    default: STD_TORCH_CHECK(false, "row_stats: logits must be float32, float64, bfloat16 or float16");
  }
}

void check_label_values(const int64_t* labels, int64_t N, int64_t V, int64_t ignore_index) {
  for (int64_t i = 0; i < N; ++i)
    STD_TORCH_CHECK((labels[i] >= 0 && labels[i] < V) || labels[i] == ignore_index, "row_stats: labels[", i, "] is ",
                    labels[i], ", expected 0 <= label < ", V, " or ", ignore_index);
}

// About 16k elements a task: below that, waking a thread costs more than the work.
int64_t grain(int64_t V) { return std::max<int64_t>(1, 16384 / V); }

void run(const RowStatsTensors& tensors) {
  const int64_t N = tensors.rows(), V = tensors.classes();
  if (tensors.labels) check_label_values(tensors.label_data(), N, V, tensors.ignore_index);
  const RowStatsRows rows{tensors.student.const_data_ptr(),
                          tensors.teacher_data(),
                          tensors.label_data(),
                          tensors.stats.mutable_data_ptr(),
                          tensors.argmax.mutable_data_ptr<int64_t>(),
                          tensors.student.stride(0),
                          tensors.teacher_stride(),
                          N,
                          V,
                          tensors.first_class,
                          tensors.class_count,
                          tensors.ignore_index,
                          tensors.temperature};
  const ElementType type = element_type(tensors.student);
  torch::stable::parallel_for(0, N, grain(V), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(row_stats_rows, rows, type, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) { KDAIF_REGISTER_ROW_STATS(m, run) }
