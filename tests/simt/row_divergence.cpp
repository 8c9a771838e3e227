// csrc/cuda/row_divergence*.cuh on the CPU: called from test_row_divergence.py as a library, and by itself under
// AddressSanitizer.
#include "simt.h"

#include "async_copy.h"

#include "cuda/row_divergence_fast_launch.cuh"
#include "cuda/row_divergence_general_launch.cuh"

#include <cstdio>
#include <random>

using namespace kdaif;

namespace {

auto launcher(int order) {
  return [order](auto kernel, Launch l, auto... arguments) {
    Index last{~0u, 0, 0};
    simt::launch(Index{l.blocks, l.blocks_y, 1}, l.threads, simt::Order(order), [=]() mutable {
      if (last.x != blockIdx.x || last.y != blockIdx.y) simt::renew_shared(l.shared);
      last = blockIdx;
      kernel(arguments...);
    });
  };
}

// Whether the launch ended without a trap.
template <class Body>
bool survives(Body body) {
  try {
    body();
  } catch (const simt::Trap&) {
    std::fflush(stdout);
    return false;
  }
  return true;
}

template <class T>
void run_fast(const FastPlan& p, int order, bool check, const RowDivergence& d, void* loss, void* grad) {
  std::vector<float> workspace(p.workspace, NAN);
  launch_fast(p, d, check, static_cast<float*>(loss), static_cast<T*>(grad), workspace.data(), launcher(order));
}

int64_t size_of(int element) { return element == FLOAT64 ? 8 : element == FLOAT32 ? 4 : 2; }

FastPlan plan_of(const RowDivergence& d, int element, const void* grad, bool has_grad, const Machine& m,
                 const char* wish) {
  const int64_t size = size_of(element);
  return fast_plan(d.N, d.V, streams_of(d), has_grad, size, is_vectorisable(d, grad, size), m, plan_wish(wish));
}

}  // namespace

extern "C" bool row_divergence(int element, int order, bool check, const RowDivergence* d, void* loss, void* grad) {
  return survives([&] {
    const Element e = Element(element);
    if (e == FLOAT64) launch_general(*d, e, check, static_cast<double*>(loss), grad, launcher(order));
    else launch_general(*d, e, check, static_cast<float*>(loss), grad, launcher(order));
  });
}

extern "C" bool row_divergence_hvp(int element, int order, bool check, const RowDivergence* d, bool gauss_newton,
                                   const Tangents* t) {
  return survives([&] {
    const Element e = Element(element);
    if (e == FLOAT64) launch_general_hvp<double>(*d, e, check, gauss_newton, *t, launcher(order));
    else launch_general_hvp<float>(*d, e, check, gauss_newton, *t, launcher(order));
  });
}

extern "C" void plan(const RowDivergence* d, int element, const void* grad, int64_t multiprocessors, int64_t shared,
                     const char* wish, int64_t* out) {
  const FastPlan p = plan_of(*d, element, grad, true, {multiprocessors, shared}, wish);
  const int64_t values[] = {is_common(*d), static_cast<int>(p.path), p.width, p.packets, p.launch.blocks,
                            p.launch.blocks_y, p.launch.threads, p.chunk, p.chunks, p.workspace, p.launch.shared,
                            p.ring.slots, p.ring.chunks, p.ring.kept, p.ring.again, p.launch.shared_limit};
  std::memcpy(out, values, sizeof values);
}

extern "C" void launch_of_general(int64_t N, int64_t V, int64_t* out) {
  const Launch l = general_launch(N, V);
  out[0] = l.blocks, out[1] = l.blocks_y, out[2] = l.threads;
}

extern "C" bool row_divergence_fast(int element, int order, bool check, const RowDivergence* d, void* loss, void* grad,
                                    int64_t multiprocessors, int64_t shared, const char* wish) {
  const FastPlan p = plan_of(*d, element, grad, grad != nullptr, {multiprocessors, shared}, wish);
  return survives([&] {
    if (element == FLOAT32) run_fast<float>(p, order, check, *d, loss, grad);
    else if (element == BFLOAT16) run_fast<bfloat16>(p, order, check, *d, loss, grad);
    else run_fast<float16>(p, order, check, *d, loss, grad);
  });
}

extern "C" void hvp_plan(const RowDivergence* d, int element, const Tangents* t, int64_t multiprocessors,
                         int64_t shared, const char* wish, int64_t* out) {
  const int64_t size = size_of(element);
  const FastHvpPlan p = fast_hvp_plan(d->N, d->V, t->K, size, is_vectorisable(*d, *t, size), {multiprocessors, shared},
                                      plan_wish(wish));
  const int64_t values[] = {static_cast<int>(p.path), p.width, p.launch.blocks, p.launch.threads, p.launch.shared,
                            p.items, p.ring.slots, p.ring.chunks, p.ring.kept, p.ring.again,
                            p.launch.shared_limit};
  std::memcpy(out, values, sizeof values);
}

extern "C" bool row_divergence_fast_hvp(int element, int order, bool check, const RowDivergence* d, const Tangents* t,
                                        int64_t multiprocessors, int64_t shared, const char* wish) {
  const int64_t size = size_of(element);
  const FastHvpPlan p = fast_hvp_plan(d->N, d->V, t->K, size, is_vectorisable(*d, *t, size), {multiprocessors, shared},
                                      plan_wish(wish));
  return survives([&] {
    if (element == FLOAT32) launch_fast_hvp<float>(p, *d, check, *t, launcher(order));
    else if (element == BFLOAT16) launch_fast_hvp<bfloat16>(p, *d, check, *t, launcher(order));
    else launch_fast_hvp<float16>(p, *d, check, *t, launcher(order));
  });
}

namespace {

// Arguments in heap buffers of exactly the right size, so that AddressSanitizer sees one element too far.
struct Buffers {
  std::vector<float> student, teacher, values, soft_labels, class_weight, weight, rows;
  std::vector<int64_t> labels, indices;
  std::vector<uint8_t> mask;
};

RowDivergence fill(Buffers& b, int kind, int form, int64_t N, int64_t V, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 3);
  const int64_t k = V < 5 ? V : 5, columns = form == TOP_K ? k : V;
  auto numbers = [&](std::vector<float>& x, int64_t size) {
    x = std::vector<float>(size);
    for (float& value : x) value = normal(random);
    return x.data();
  };
  RowDivergence d{};
  d.student = numbers(b.student, N * V), d.teacher = numbers(b.teacher, N * columns), d.weight = numbers(b.weight, N);
  if (form != LOGITS)
    for (float& p : b.teacher) p = 0.1f;
  d.class_weight = numbers(b.class_weight, V), d.soft_labels = numbers(b.soft_labels, N * V);
  b.rows = std::vector<float>(7 * N, 0.5f), d.rows = b.rows.data();
  b.labels = {0, V - 1, V}, d.labels = b.labels.data();  // the last one is outside: its row becomes NaN, nothing else
  b.mask = std::vector<uint8_t>(N * V, 1), d.mask = b.mask.data();
  b.indices = std::vector<int64_t>(N * k);
  for (int64_t i = 0; i < N * k; ++i) b.indices[i] = V - 1 - i % k;
  d.indices = form == TOP_K ? b.indices.data() : nullptr;
  d.student_stride = d.soft_labels_stride = d.mask_stride = V, d.teacher_stride = columns;
  d.temperature = 2, d.ce = 0.5, d.kd = 0.5, d.interpolation = 1, d.skew = 0.4;
  d.kind = kind, d.form = form, d.class_count = V, d.ignore_index = -100, d.top_k = k, d.N = N, d.V = V;
  return d;
}

constexpr int64_t H200 = 232448;  // bytes of shared memory

bool only_the_last_is_nan(const std::vector<float>& loss) {
  return loss[0] == loss[0] && loss[1] == loss[1] && loss[2] != loss[2];
}

bool try_general(int kind, int form, int64_t V, std::mt19937& random) {
  Buffers b;
  const int64_t N = 3, K = 5;
  const RowDivergence d = fill(b, kind, form, N, V, random);
  std::vector<float> loss(N), grad(N * V), u(K * N * V, 1), out(K * N * V);
  const Tangents t{u.data(), out.data(), K, N * V, V};
  row_divergence(FLOAT32, 3, false, &d, loss.data(), grad.data());
  row_divergence_hvp(FLOAT32, 3, false, &d, true, &t);
  return only_the_last_is_nan(loss);
}

bool try_fast(int64_t V, const char* wish, std::mt19937& random) {
  Buffers b;
  const int64_t N = 3, K = 5;
  RowDivergence d = fill(b, KL, LOGITS, N, V, random);
  d.rows = d.class_weight = d.soft_labels = nullptr, d.mask = nullptr;
  std::vector<float> loss(N), grad(N * V), u(K * N * V, 1), out(K * N * V);
  const Tangents t{u.data(), out.data(), K, N * V, V};
  row_divergence_fast(FLOAT32, 3, false, &d, loss.data(), grad.data(), 20, H200, wish);
  row_divergence_fast_hvp(FLOAT32, 3, false, &d, &t, 20, H200, wish);
  return is_common(d) && only_the_last_is_nan(loss);
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (int64_t V : {1, 33, 1100})
    for (int kind = KL; kind <= SWAPPED_CROSS_ENTROPY; ++kind)
      for (int form : {LOGITS, PROBABILITIES, TOP_K})
        if ((form == LOGITS || !is_between_logits(kind)) && !try_general(kind, form, V, random)) return 1;
  for (int64_t V : {1, 33, 132, 1100, 2052, 17001, 34000})
    if (!try_fast(V, nullptr, random)) return 1;
  for (int64_t V : {516, 4100})
    if (!try_fast(V, "ring:64", random)) return 1;
  std::puts("clean");
  return 0;
}
