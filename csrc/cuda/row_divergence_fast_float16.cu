// row_divergence's common case for float16 logits.
#include "cuda/row_divergence_calls.cuh"
#include "cuda/row_divergence_fast_launch.cuh"

namespace kdaif {

template <class T>
void enqueue_fast(const FastPlan& plan, const RowDivergence& d, bool check, float* loss, T* grad, float* workspace,
                  cudaStream_t stream) {
  launch_fast(plan, d, check, loss, grad, workspace, OnStream{stream});
}
template void enqueue_fast(const FastPlan&, const RowDivergence&, bool, float*, float16*, float*, cudaStream_t);

}  // namespace kdaif
