// row_divergence with every option, its gradient and its curvature products on the GPU: one block a row. The row's own
// mathematics are in common/row_divergence_math.h, the common case without options in row_divergence_fast.cuh.
//
// Floor: 2 reads and 1 write of V elements. Here the row is read 3 to 5 times (softmax; the mixture's sums, if a label
// is left out of a mixture; terms; gradient; and twice more by a smoothed cross-entropy); rows of up to some 64 KiB are
// found in the caches then.
#pragma once
#include "cuda/row_divergence_plan.h"
#include "cuda/row_divergence_row.cuh"

namespace kdaif {

// Calls body(v, term, j) for all of a row: j is the class within the divergence, -1 outside.
template <int kind, class F, class Body>
__device__ __forceinline__ void for_each_output(const Row<kind, F>& r, bool diverges, F* tile, Body body) {
  const int64_t begin = diverges ? r.d.first_class : r.d.V, count = diverges ? r.d.class_count : 0;
  for (int64_t v = threadIdx.x; v < r.d.V - count; v += blockDim.x)
    body(v < begin ? v : v + count, ClassTerm<F>{}, int64_t(-1));
  if (diverges) r.for_each_class(tile, [&](int64_t j, F top) { body(begin + j, r.at(j, top), j); });
}

template <class F>
__device__ __forceinline__ void write_zeros(F* loss, void* grad, Element element, int64_t row, int64_t V) {
  if (loss != nullptr && threadIdx.x == 0) loss[row] = 0;
  if (grad == nullptr) return;
  for (int64_t v = threadIdx.x; v < V; v += blockDim.x) store(F(0), grad, element, row * V + v);
}

template <int kind, class F>
__device__ __forceinline__ void write_gradient(const Row<kind, F>& r, const RowCrossEntropy<F>& ce, bool diverges,
                                               F mass, F* tile, void* grad) {
  const LabelPartGrad<F> l = kind == DECOUPLED && r.x.kd != 0 ? label_part_grad(r.part) : LabelPartGrad<F>{0, 0};
  for_each_output(r, diverges, tile, [&](int64_t v, ClassTerm<F> c, int64_t j) {
    F g = 0;
    if (j >= 0) {
      g = c.term.first - c.q * mass;
      if (kind == DECOUPLED && r.x.kd != 0) g += r.x.kd * (j == r.label_class ? l.label : c.q * l.others);
      g *= r.chain();
    }
    if (r.x.ce != 0)
      g += r.x.ce * (ce.mass * exp_of(ce.student.log_probability(r.logit(v), F(1))) - ce.target(r, v));
    store(r.weight * g, grad, r.element, r.row * r.d.V + v);
  });
}

// loss [N] and grad [N, V] may be null.
template <int kind, class F>
__global__ void __launch_bounds__(GENERAL_THREADS, 1)
row_divergence_kernel(const RowDivergence d, Element element, bool check, F* __restrict__ loss,
                      void* __restrict__ grad) {
  using Memory = RowMemory<F, GENERAL_THREADS>;
  __shared__ Memory memory;
  for (int64_t row = blockIdx.x; row < d.N; row += gridDim.x) {
    const RowLabel y = row_label(d, row, check);
    if (y.ignored) {
      write_zeros(loss, grad, element, row, d.V);
      continue;
    }
    Row<kind, F> r(d, element, row, y);
    RowCrossEntropy<F> ce;
    const bool diverges = r.diverges();
    F value = 0, mass = 0;
    if (r.x.ce != 0) ce.prepare(r, memory.sums);
    if (diverges) {
      r.prepare(memory, check);
      r.for_each_class(memory.tile, [&](int64_t j, F top) {
        const ClassTerm<F> c = r.at(j, top);
        value += c.term.value, mass += c.term.first;
      });
      value = block_reduce<Sum>(value, memory.sums);
      mass = block_reduce<Sum>(mass, memory.sums);
      if (kind == DECOUPLED && r.x.kd != 0) value += r.x.kd * r.label_value();
    }
    if (r.x.ce != 0) value += r.x.ce * ce.value;
    if (loss != nullptr && threadIdx.x == 0) loss[row] = r.weight * value;
    if (grad != nullptr) write_gradient(r, ce, diverges, mass, memory.tile, grad);
  }
}

// Up to TANGENTS tangents of one row, and their sums over its classes.
template <class F>
struct TangentSums {
  F student_1[TANGENTS] = {};  // of softmax(s) u
  F q[TANGENTS] = {};          // of q u
  F along[TANGENTS] = {};      // of curvature u

  __device__ __forceinline__ void join(int count, F* sums) {
    for (int k = 0; k < TANGENTS; ++k) {
      if (k >= count) break;
      student_1[k] = block_reduce<Sum>(student_1[k], sums);
      q[k] = block_reduce<Sum>(q[k], sums);
      along[k] = block_reduce<Sum>(along[k], sums);
    }
  }
};

// What multiplies a tangent of this row, besides its sums.
template <class F>
struct RowCurvature {
  F mass = 0, curvature = 0;  // sums over the classes
  F p_mass = 0, q_y = 0, q_rest = 0;  // of the DECOUPLED label part
};

template <int kind, class F, class Memory>
__device__ __forceinline__ RowCurvature<F> row_curvature(const Row<kind, F>& r, bool gauss_newton, Memory& memory) {
  RowCurvature<F> h;
  r.for_each_class(memory.tile, [&](int64_t j, F top) {
    const ClassTerm<F> c = r.at(j, top);
    h.mass += kept_mass<kind>(c.term, gauss_newton);
    h.curvature += kept_curvature<kind>(c.term, gauss_newton);
  });
  h.mass = block_reduce<Sum>(h.mass, memory.sums);
  h.curvature = block_reduce<Sum>(h.curvature, memory.sums);
  if (kind == DECOUPLED && r.x.kd != 0) {
    h.p_mass = r.part.p_y + r.part.p_rest;
    h.q_y = exp_of(r.part.log_q_y), h.q_rest = exp_of(r.part.log_q_rest);
  }
  return h;
}

// The product's element at class j of the divergence, before the chain rule.
template <int kind, class F>
__device__ __forceinline__ F curve(const Row<kind, F>& r, const RowCurvature<F>& h, const ClassTerm<F>& c,
                                   bool is_label, bool gauss_newton, F u, F u_label, F mean, F along) {
  const F centred = u - mean;
  F g = kept_curvature<kind>(c.term, gauss_newton) * centred + c.q * (h.mass * centred - (along - mean * h.curvature));
  if (kind == DECOUPLED && r.x.kd != 0) {
    const F all_q = is_label ? h.q_y : h.q_rest * c.q;
    const F all_mean = h.q_rest * mean + (h.q_y != 0 ? h.q_y * u_label : F(0));
    g += r.x.kd * (h.p_mass * all_q * (u - all_mean) - r.part.p_rest * c.q * centred);
  }
  return g;
}

// One look at the row for its sums and one to write, for all of these tangents.
template <int kind, class F, class Memory>
__device__ __forceinline__ void multiply(const Row<kind, F>& r, const RowCrossEntropy<F>& ce, const RowCurvature<F>& h,
                                         const Tangents& t, int64_t first, bool gauss_newton, bool diverges,
                                         Memory& memory) {
  const int count = t.K - first < TANGENTS ? static_cast<int>(t.K - first) : TANGENTS;
  const int64_t offset = r.row * t.row_stride + first * t.tangent_stride;
  auto tangent = [&](int k, int64_t v) { return load<F>(t.u, r.element, offset + k * t.tangent_stride + v); };
  auto student_1 = [&](int64_t v) { return exp_of(ce.student.log_probability(r.logit(v), F(1))); };
  TangentSums<F> sums;
  for_each_output(r, diverges, memory.tile, [&](int64_t v, ClassTerm<F> c, int64_t) {
    const F p = r.x.ce != 0 ? student_1(v) : F(0), curvature = kept_curvature<kind>(c.term, gauss_newton);
#pragma unroll
    for (int k = 0; k < TANGENTS; ++k) {
      if (k >= count) break;
      const F u = tangent(k, v);
      sums.student_1[k] += p * u, sums.q[k] += c.q * u, sums.along[k] += curvature * u;
    }
  });
  sums.join(count, memory.sums);
  const F chain = r.chain() * r.chain();
  for_each_output(r, diverges, memory.tile, [&](int64_t v, ClassTerm<F> c, int64_t j) {
    const F p = r.x.ce != 0 ? r.x.ce * ce.mass * student_1(v) : F(0);
#pragma unroll
    for (int k = 0; k < TANGENTS; ++k) {
      if (k >= count) break;
      const F u = tangent(k, v), u_label = kind == DECOUPLED && h.q_y != 0 ? tangent(k, r.label) : F(0);
      F g = p != 0 || r.x.ce != 0 ? p * (u - sums.student_1[k]) : F(0);
      if (j >= 0)
        g += chain * curve(r, h, c, j == r.label_class, gauss_newton, u, u_label, sums.q[k], sums.along[k]);
      store(r.weight * g, t.out, r.element, ((first + k) * r.d.N + r.row) * r.d.V + v);
    }
  });
}

// K tangents of a row share its softmax, and TANGENTS of them the terms. Floor: 2 K + 2 reads or writes of V elements.
template <int kind, class F>
__global__ void __launch_bounds__(GENERAL_THREADS, 1)
row_divergence_hvp_kernel(const RowDivergence d, Element element, bool check, bool gauss_newton, const Tangents t) {
  using Memory = RowMemory<F, GENERAL_THREADS>;
  __shared__ Memory memory;
  for (int64_t row = blockIdx.x; row < d.N; row += gridDim.x) {
    const RowLabel y = row_label(d, row, check);
    if (y.ignored) {
      for (int64_t k = 0; k < t.K; ++k) write_zeros<F>(nullptr, t.out, element, k * d.N + row, d.V);
      continue;
    }
    Row<kind, F> r(d, element, row, y);
    RowCrossEntropy<F> ce;
    RowCurvature<F> h;
    const bool diverges = r.diverges();
    if (r.x.ce != 0) ce.prepare(r, memory.sums);
    if (diverges) {
      r.prepare(memory, check);
      h = row_curvature(r, gauss_newton, memory);
    }
    for (int64_t first = 0; first < t.K; first += TANGENTS)
      multiply(r, ce, h, t, first, gauss_newton, diverges, memory);
  }
}

}  // namespace kdaif
