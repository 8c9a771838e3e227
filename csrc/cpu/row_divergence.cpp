// row_divergence, its gradient and its curvature products on the CPU: value checks, threads and registration. The loops
// are in row_divergence_rows.cpp, the formulas in common/row_divergence_math.h, the definition in
// kdaif_fast/reference/row_divergence.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "common/row_divergence_tensors.h"
#include "cpu/huge_pages.h"
#include "cpu/level.h"
#include "cpu/row_divergence_rows.h"

namespace {

using namespace kdaif;

ElementType element_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::float32;
    case ScalarType::Double: return ElementType::float64;
    case ScalarType::BFloat16: return ElementType::bfloat16;
    default: return ElementType::float16;
  }
}

void check_values(const RowDivergence& d) {
  for (int64_t i = 0; d.labels != nullptr && i < d.N; ++i)
    STD_TORCH_CHECK((d.labels[i] >= 0 && d.labels[i] < d.V) || d.labels[i] == d.ignore_index, "row_divergence: labels[", i,
                    "] = ", d.labels[i], ", expected 0 <= label < ", d.V);
  for (int64_t i = 0; d.indices != nullptr && i < d.N * d.top_k; ++i)
    STD_TORCH_CHECK(d.indices[i] >= 0 && d.indices[i] < d.class_count, "row_divergence: indices[", i / d.top_k, ", ",
                    i % d.top_k, "] = ", d.indices[i], ", expected 0 <= index < ", d.class_count);
}

void* fresh_rows(const Tensor& x) {
  prefer_huge_pages(x.mutable_data_ptr(), x.numel() * x.element_size());
  return x.mutable_data_ptr();
}

// About 16k elements a task: below that, waking a thread costs more than the work.
int64_t grain(int64_t V) { return std::max<int64_t>(1, 16384 / V); }

void run(const RowDivergence& d, const Tensor& student, const Tensor* loss, const Tensor* grad) {
  check_values(d);
  const RowResults results{loss ? loss->mutable_data_ptr() : nullptr, grad ? fresh_rows(*grad) : nullptr};
  const ElementType type = element_type(student);
  torch::stable::parallel_for(0, d.N, grain(d.V), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(row_divergence_rows, d, type, results, begin, end);
  });
}

void run_hvp(const RowDivergence& d, const Tensor& student, const Tensor& tangents, bool gauss_newton, const Tensor& out) {
  check_values(d);
  const RowTangents k{tangents.const_data_ptr(), fresh_rows(out), tangents.size(0),
                      tangents.stride(0),        tangents.stride(1),     gauss_newton};
  const ElementType type = element_type(student);
  torch::stable::parallel_for(0, d.N, grain(d.V * std::max<int64_t>(1, k.count)), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(row_divergence_hvp_rows, d, type, k, begin, end);
  });
}

std::string cpu_level() { return level_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) { KDAIF_REGISTER_ROW_DIVERGENCE(m, run, run_hvp) }

STABLE_TORCH_LIBRARY_FRAGMENT(kdaif_fast, m) { m.def("cpu_level() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CompositeExplicitAutograd, m) { m.impl("cpu_level", TORCH_BOX(&cpu_level)); }
