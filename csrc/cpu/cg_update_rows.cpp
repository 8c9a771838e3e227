// cg_update and cg_dots over chunks of right-hand sides; compiled once per instruction set (KDAIF_LEVEL), so nothing here
// may have external linkage but the functions at the end, and no library template may be instantiated.
//
// Floor: bytes alone. cg_update reads x, r, p, Ap and writes x, r: 24 bytes a float32 element, 28 while the best iterate
// is kept; the same in separate passes (Ap += damping p, two axpys, a dot) is 44. cg_dots reads p and Ap: 8 bytes,
// where two dot products read 12.
//
// Measured against eager PyTorch by `python -m pytest benchmarks/bench_cg_update.py -c benchmarks/pytest.ini`, AVX-512,
// torch 2.13, one thread, float32, medians of ratios in CPU time of one run on a machine that others used too: cg_update
// [8, 1000000] 2.3x, [1, 1000000] 1.7x, [32, 17000] 1.9x, [8, 17000] 1.6x; cg_dots 4.0x, 2.0x, 2.6x, 1.5x. For
// [1, 17000] it is 0.9x and 1.2x: the checks of the public functions cost what the pass saves, so the solver calls the
// ops without them.
#include "cpu/vector.h"

#include "cpu/cg_update_rows.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

// Squares of float32 numbers are exact in float64, so that only the number of additions rounds; and what is summed in
// another order differs in digits that the result does not have.
KDAIF_INLINE Doubles lower(Floats x) {
  typedef float Half __attribute__((vector_size(KDAIF_VECTOR_BYTES / 2)));
  Half half;
  std::memcpy(&half, &x, sizeof half);
  return __builtin_convertvector(half, Doubles);
}
KDAIF_INLINE Doubles upper(Floats x) {
  typedef float Half __attribute__((vector_size(KDAIF_VECTOR_BYTES / 2)));
  Half half;
  std::memcpy(&half, reinterpret_cast<const char*>(&x) + sizeof half, sizeof half);
  return __builtin_convertvector(half, Doubles);
}

struct Sum {
  Doubles first{}, second{};
  KDAIF_INLINE void add(Sum& sum, Floats a, Floats b) {
    sum.first += lower(a) * lower(b);
    sum.second += upper(a) * upper(b);
  }
  KDAIF_INLINE void add(Sum& sum, Doubles a, Doubles b) { sum.first += a * b; }
  KDAIF_INLINE double total(const Sum& sum) { return sum_of(Doubles(sum.first + sum.second)); }
};

template <class F> KDAIF_INLINE void copy_row(const F* from, F* to, int64_t count) {
  for_vectors<F>(count, [&](int64_t v, auto part) __attribute__((always_inline)) { part.put(part.get(from + v, F(0)), to + v); });
}

template <class F> KDAIF_INLINE double squares(const F* r, int64_t count) {
  Sum sum;
  for_vectors<F>(count, [&](int64_t v, auto part) __attribute__((always_inline)) {
    const Vec<F> value = part.get(r + v, F(0));
    Sum::add(sum, value, value);
  });
  return Sum::total(sum);
}

template <bool KEEP, class F>
KDAIF_INLINE double update(F* x, F* r, const F* p, const F* Ap, F* best, F step, F damping, int64_t count) {
  Sum sum;
  for_vectors<F>(count, [&](int64_t v, auto part) __attribute__((always_inline)) {
    const Vec<F> old = part.get(x + v, F(0)), direction = part.get(p + v, F(0));
    if constexpr (KEEP) part.put(old, best + v);
    part.put(old + step * direction, x + v);
    const Vec<F> residual = part.get(r + v, F(0)) - step * (part.get(Ap + v, F(0)) + damping * direction);
    part.put(residual, r + v);
    Sum::add(sum, residual, residual);
  });
  return Sum::total(sum);
}

template <class F> void update_tasks(const CgUpdate& u, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t k = task / u.chunks, first = task % u.chunks * CG_CHUNK;
    const int64_t count = u.P - first < CG_CHUNK ? u.P - first : CG_CHUNK;
    F* x = static_cast<F*>(u.x) + k * u.x_stride + first;
    F* r = static_cast<F*>(u.r) + k * u.r_stride + first;
    const F* p = static_cast<const F*>(u.p) + k * u.p_stride + first;
    const F* Ap = static_cast<const F*>(u.Ap) + k * u.Ap_stride + first;
    const F step = static_cast<const F*>(u.steps)[k], damping = F(u.damping);
    F* best = u.best != nullptr && u.keep[k] ? static_cast<F*>(u.best) + k * u.best_stride + first : nullptr;
    if (step == 0) {  // whatever p and Ap hold
      if (best != nullptr) copy_row(x, best, count);
      u.partial[task] = squares(r, count);
    } else if (best != nullptr) {
      u.partial[task] = update<true>(x, r, p, Ap, best, step, damping, count);
    } else {
      u.partial[task] = update<false>(x, r, p, Ap, best, step, damping, count);
    }
  }
}

template <class F> void dots_tasks(const CgDots& d, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t k = task / d.chunks, first = task % d.chunks * CG_CHUNK;
    const int64_t count = d.P - first < CG_CHUNK ? d.P - first : CG_CHUNK;
    const F* p = static_cast<const F*>(d.p) + k * d.p_stride + first;
    const F* q = static_cast<const F*>(d.q) + k * d.q_stride + first;
    Sum both, own;
    for_vectors<F>(count, [&](int64_t v, auto part) __attribute__((always_inline)) {
      const Vec<F> left = part.get(p + v, F(0)), right = part.get(q + v, F(0));
      Sum::add(both, left, right);
      Sum::add(own, left, left);
    });
    d.partial[task] = Sum::total(both);
    d.partial[d.K * d.chunks + task] = Sum::total(own);
  }
}

}  // namespace

void cg_update_rows(const CgUpdate& u, ElementType type, int64_t begin, int64_t end) {
  if (type == ElementType::float64) update_tasks<double>(u, begin, end);
  else update_tasks<float>(u, begin, end);
}

void cg_dots_rows(const CgDots& d, ElementType type, int64_t begin, int64_t end) {
  if (type == ElementType::float64) dots_tasks<double>(d, begin, end);
  else dots_tasks<float>(d, begin, end);
}

}  // namespace kdaif::KDAIF_LEVEL
