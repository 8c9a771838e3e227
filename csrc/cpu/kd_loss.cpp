// kd_loss, its gradient and its Hessian-vector product on the CPU: checks, threads and registration. The loops are in
// kd_loss_rows.cpp, the formulas in common/kd_loss_math.h, the definition in kdaif_fast/reference/kd_loss.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "common/kd_loss_ops.h"
#include "cpu/kd_loss_rows.h"
#include "cpu/level.h"

namespace {

using namespace kdaif;

ElementType element_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::float32;
    case ScalarType::Double: return ElementType::float64;
    case ScalarType::BFloat16: return ElementType::bfloat16;
    case ScalarType::Half: return ElementType::float16;
    default: STD_TORCH_CHECK(false, "kd_loss: logits must be float32, float64, bfloat16 or float16");
  }
}

void check_label_values(const int64_t* labels, int64_t N, int64_t V) {
  for (int64_t i = 0; i < N; ++i)
    STD_TORCH_CHECK(labels[i] >= 0 && labels[i] < V, "kd_loss: labels[", i, "] = ", labels[i],
                    ", expected 0 <= label < ", V);
}

// About 16k elements a task: below that, waking a thread costs more than the work.
int64_t grain(int64_t V) { return std::max<int64_t>(1, 16384 / V); }

void run(const Tensor& student_, const Tensor& teacher_, const Tensor& labels_, const Tensor& scale_,
         double temperature, double alpha, const Tensor* loss, const Tensor* grad) {
  const Tensor student = with_dense_rows(student_), teacher = with_dense_rows(teacher_);
  const Tensor labels = torch::stable::contiguous(labels_), scale = torch::stable::contiguous(scale_);
  const int64_t N = student.size(0), V = student.size(1);
  check_label_values(labels.const_data_ptr<int64_t>(), N, V);
  const KdLossRows rows{student.const_data_ptr(),
                               teacher.const_data_ptr(),
                               labels.const_data_ptr<int64_t>(),
                               scale.const_data_ptr(),
                               loss ? loss->mutable_data_ptr() : nullptr,
                               grad ? grad->mutable_data_ptr() : nullptr,
                               student.stride(0),
                               teacher.stride(0),
                               V,
                               temperature,
                               alpha};
  const ElementType type = element_type(student);
  torch::stable::parallel_for(0, N, grain(V), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(kd_loss_rows, rows, type, begin, end);
  });
}

void run_hvp(const Tensor& scale_, const Tensor& tangent_, const Tensor& student_, double temperature, double alpha,
             const Tensor& out) {
  const Tensor student = with_dense_rows(student_), tangent = with_dense_rows(tangent_);
  const Tensor scale = torch::stable::contiguous(scale_);
  const int64_t N = student.size(0), V = student.size(1);
  const KdLossHvpRows rows{student.const_data_ptr(),
                           tangent.const_data_ptr(),
                           scale.const_data_ptr(),
                           out.mutable_data_ptr(),
                           student.stride(0),
                           tangent.stride(0),
                           V,
                           temperature,
                           alpha};
  const ElementType type = element_type(student);
  torch::stable::parallel_for(0, N, grain(V), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(kd_loss_hvp_rows, rows, type, begin, end);
  });
}

std::string cpu_level() { return level_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) { KDAIF_REGISTER_KD_LOSS(m, run, run_hvp) }

STABLE_TORCH_LIBRARY_FRAGMENT(kdaif_fast, m) { m.def("cpu_level() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CompositeExplicitAutograd, m) { m.impl("cpu_level", TORCH_BOX(&cpu_level)); }
