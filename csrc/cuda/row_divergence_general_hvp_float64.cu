// Curvature products of row_divergence with every option for float64 logits.
#include "cuda/row_divergence_calls.cuh"
#include "cuda/row_divergence_general_launch.cuh"

namespace kdaif {

template <class F>
void enqueue_general_hvp(const RowDivergence& d, Element element, bool check, bool gauss_newton, const Tangents& t,
                         cudaStream_t stream) {
  launch_general_hvp<F>(d, element, check, gauss_newton, t, OnStream{stream});
}
template void enqueue_general_hvp<double>(const RowDivergence&, Element, bool, bool, const Tangents&, cudaStream_t);

}  // namespace kdaif
