// row_divergence with every option for float64 logits.
#include "cuda/row_divergence_calls.cuh"
#include "cuda/row_divergence_general_launch.cuh"

namespace kdaif {

template <class F>
void enqueue_general(const RowDivergence& d, Element element, bool check, F* loss, void* grad, cudaStream_t stream) {
  launch_general(d, element, check, loss, grad, OnStream{stream});
}
template void enqueue_general(const RowDivergence&, Element, bool, double*, void*, cudaStream_t);

}  // namespace kdaif
