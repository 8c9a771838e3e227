// Curvature products of row_divergence's common case for bfloat16 logits.
#include "cuda/row_divergence_calls.cuh"
#include "cuda/row_divergence_fast_launch.cuh"

namespace kdaif {

template <class T>
void enqueue_fast_hvp(const FastHvpPlan& plan, const RowDivergence& d, bool check, const Tangents& t,
                      cudaStream_t stream) {
  launch_fast_hvp<T>(plan, d, check, t, OnStream{stream});
}
template void enqueue_fast_hvp<bfloat16>(const FastHvpPlan&, const RowDivergence&, bool, const Tangents&, cudaStream_t);

}  // namespace kdaif
