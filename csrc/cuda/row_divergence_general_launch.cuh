// From a call of row_divergence to its kernels. launch(kernel, geometry, arguments...) is the caller's: on a GPU, or by
// a test without one.
#pragma once
#include "cuda/row_divergence.cuh"

namespace kdaif {

template <class F, class Launcher>
void launch_general(const RowDivergence& d, Element element, bool check, F* loss, void* grad, Launcher launch) {
  for_kind(d.kind, [&](auto kind) {
    launch(row_divergence_kernel<kind(), F>, general_launch(d.N, d.V), d, element, check, loss, grad);
  });
}

template <class F, class Launcher>
void launch_general_hvp(const RowDivergence& d, Element element, bool check, bool gauss_newton, const Tangents& t,
                        Launcher launch) {
  for_kind(d.kind, [&](auto kind) {
    launch(row_divergence_hvp_kernel<kind(), F>, general_launch(d.N, d.V), d, element, check, gauss_newton, t);
  });
}

}  // namespace kdaif
