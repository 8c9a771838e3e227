// cg_update and cg_dots on the CPU: checks, threads, the sums of partial sums, and registration. The loops are in
// cg_update_rows.cpp, the definitions in kdaif_fast/reference/cg_update.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/cg_update_rows.h"
#include "cpu/persample_tensors.h"

namespace {

using namespace kdaif;

ElementType type_of(const char* op, const Tensor& vectors) {
  const ElementType type = element_type(op, vectors);
  STD_TORCH_CHECK(type == ElementType::float32 || type == ElementType::float64, op, ": vectors must be float32 or float64");
  return type;
}

void check_vectors(const char* op, const Tensor& vectors, const Tensor& like) {
  STD_TORCH_CHECK(vectors.dim() == 2 && same_sizes(vectors, like) && vectors.scalar_type() == like.scalar_type(), op,
                  ": vectors must be [K, P] of one size and dtype");
}

void check_written(const char* op, const Tensor& vectors) {
  STD_TORCH_CHECK(vectors.stride(1) == 1 || vectors.size(1) <= 1, op, ": rows that are written must be contiguous");
}

int64_t chunks_of(int64_t P) { return (P + CG_CHUNK - 1) / CG_CHUNK; }

// sums[i] = the i-th `chunks` partial sums, in their order.
template <class F> void add_up(const std::vector<double>& partial, int64_t chunks, F* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[i * chunks + chunk];
    sums[i] = F(total);
  }
}

Tensor totals(const std::vector<double>& partial, int64_t chunks, const Tensor& vectors, std::initializer_list<int64_t> shape) {
  const Tensor sums = torch::stable::new_empty(vectors, shape);
  if (vectors.scalar_type() == ScalarType::Double) add_up(partial, chunks, sums.mutable_data_ptr<double>(), sums.numel());
  else add_up(partial, chunks, sums.mutable_data_ptr<float>(), sums.numel());
  return sums;
}

Tensor cg_update(const Tensor& x, const Tensor& r, const Tensor& p, const Tensor& Ap, const Tensor& steps, double damping,
                 const std::optional<Tensor>& best, const std::optional<Tensor>& keep) {
  const ElementType type = type_of("cg_update", x);
  for (const Tensor& vectors : {x, r, p, Ap}) check_vectors("cg_update", vectors, x);
  for (const Tensor& vectors : {x, r}) check_written("cg_update", vectors);
  const int64_t K = x.size(0), P = x.size(1), chunks = chunks_of(P);
  STD_TORCH_CHECK(steps.dim() == 1 && steps.size(0) == K && steps.scalar_type() == x.scalar_type(),
                  "cg_update: steps must be [K] of the vectors' dtype");
  STD_TORCH_CHECK(best.has_value() == keep.has_value(), "cg_update: best and keep go together");
  std::optional<Tensor> kept;
  if (best) {
    check_vectors("cg_update", *best, x), check_written("cg_update", *best);
    STD_TORCH_CHECK(keep->dim() == 1 && keep->size(0) == K && keep->scalar_type() == ScalarType::Bool,
                    "cg_update: keep must be bool [K]");
    kept = torch::stable::contiguous(*keep);
  }
  const Tensor directions = with_dense_rows(p), products = with_dense_rows(Ap), a = torch::stable::contiguous(steps);
  std::vector<double> partial(static_cast<size_t>(K * chunks));
  const CgUpdate u{x.mutable_data_ptr(),
                   r.mutable_data_ptr(),
                   directions.const_data_ptr(),
                   products.const_data_ptr(),
                   best ? best->mutable_data_ptr() : nullptr,
                   a.const_data_ptr(),
                   kept ? kept->const_data_ptr<bool>() : nullptr,
                   partial.data(),
                   x.stride(0),
                   r.stride(0),
                   directions.stride(0),
                   products.stride(0),
                   best ? best->stride(0) : 0,
                   P,
                   chunks,
                   damping};
  torch::stable::parallel_for(0, K * chunks, tasks_worth_a_thread(CG_CHUNK), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(cg_update_rows, u, type, begin, end);
  });
  return totals(partial, chunks, x, {K});
}

Tensor cg_dots(const Tensor& p, const Tensor& q) {
  const ElementType type = type_of("cg_dots", p);
  check_vectors("cg_dots", p, p), check_vectors("cg_dots", q, p);
  const int64_t K = p.size(0), P = p.size(1), chunks = chunks_of(P);
  const Tensor left = with_dense_rows(p), right = with_dense_rows(q);
  std::vector<double> partial(static_cast<size_t>(2 * K * chunks));
  const CgDots d{left.const_data_ptr(), right.const_data_ptr(), partial.data(), left.stride(0), right.stride(0), K, P, chunks};
  torch::stable::parallel_for(0, K * chunks, tasks_worth_a_thread(CG_CHUNK), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(cg_dots_rows, d, type, begin, end);
  });
  return totals(partial, chunks, p, {2, K});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) {
  m.impl("cg_update", TORCH_BOX(&cg_update));
  m.impl("cg_dots", TORCH_BOX(&cg_dots));
}
