// csrc/cuda/row_divergence*.cuh on the CPU: called from test_row_divergence.py as a library, and by itself under
// AddressSanitizer.
#include "simt.h"

#include "cuda/row_divergence.cuh"

#include <cstdio>
#include <random>

using namespace kdaif;

namespace {

template <class Body>
void for_accumulation(int element, Body body) {
  if (element == FLOAT64) body(double());
  else body(float());
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

}  // namespace

extern "C" bool row_divergence(int element, int order, bool check, const RowDivergence* d, void* loss, void* grad) {
  const Launch l = general_launch(d->N, d->V);
  return survives([&] {
    for_accumulation(element, [&](auto zero) {
      using F = decltype(zero);
      for_kind(d->kind, [&](auto kind) {
        simt::launch(l.blocks, l.threads, simt::Order(order), [&] {
          row_divergence_kernel<kind(), F>(*d, Element(element), check, static_cast<F*>(loss), grad);
        });
      });
    });
  });
}

extern "C" bool row_divergence_hvp(int element, int order, bool check, const RowDivergence* d, bool gauss_newton,
                                   const Tangents* t) {
  const Launch l = general_launch(d->N, d->V);
  return survives([&] {
    for_accumulation(element, [&](auto zero) {
      using F = decltype(zero);
      for_kind(d->kind, [&](auto kind) {
        simt::launch(l.blocks, l.threads, simt::Order(order), [&] {
          row_divergence_hvp_kernel<kind(), F>(*d, Element(element), check, gauss_newton, *t);
        });
      });
    });
  });
}
