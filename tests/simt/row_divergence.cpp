// csrc/cuda/row_divergence*.cuh on the CPU: called from test_row_divergence.py as a library, and by itself under
// AddressSanitizer.
#include "simt.h"

#include "cuda/row_divergence_launch.cuh"

#include <cstdio>
#include <random>

using namespace kdaif;

namespace {

auto launcher(int order) {
  return [order](auto kernel, Launch l, auto... arguments) {
    simt::launch(Index{l.blocks, l.blocks_y, 1}, l.threads, simt::Order(order), [=] { kernel(arguments...); });
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

extern "C" void plan(const RowDivergence* d, int element, const void* grad, int64_t multiprocessors, int64_t* out) {
  const int64_t size = size_of(element);
  const FastPlan p = fast_plan(d->N, d->V, size, is_vectorisable(*d, grad, size), multiprocessors);
  const int64_t values[] = {is_common(*d), static_cast<int>(p.path), p.width, p.packets, p.launch.blocks,
                            p.launch.blocks_y, p.launch.threads, p.chunk, p.chunks, p.workspace};
  std::memcpy(out, values, sizeof values);
}

extern "C" void launch_of_general(int64_t N, int64_t V, int64_t* out) {
  const Launch l = general_launch(N, V);
  out[0] = l.blocks, out[1] = l.blocks_y, out[2] = l.threads;
}

extern "C" bool row_divergence_fast(int element, int order, bool check, const RowDivergence* d, void* loss, void* grad,
                                    int64_t multiprocessors) {
  const int64_t size = size_of(element);
  const FastPlan p = fast_plan(d->N, d->V, size, is_vectorisable(*d, grad, size), multiprocessors);
  return survives([&] {
    if (element == FLOAT32) run_fast<float>(p, order, check, *d, loss, grad);
    else if (element == BFLOAT16) run_fast<bfloat16>(p, order, check, *d, loss, grad);
    else run_fast<float16>(p, order, check, *d, loss, grad);
  });
}
