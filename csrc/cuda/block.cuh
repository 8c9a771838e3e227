// Reductions over the threads of a warp or a block. Every thread gets the result; the order of operations is fixed, so results
// repeat bit for bit.
#pragma once

namespace kdaif {

constexpr int WARP = 32;

struct Sum {
  template <class F> static __device__ __forceinline__ F join(F a, F b) { return a + b; }
};
struct Max {
  // A NaN is not kept: the sums that follow carry it.
  template <class F> static __device__ __forceinline__ F join(F a, F b) { return b > a ? b : a; }
};

template <class Join, class F>
__device__ __forceinline__ F warp_reduce(F value) {
  for (int offset = WARP / 2; offset > 0; offset /= 2)
    value = Join::join(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// blockDim.x must be a multiple of 32; `memory` holds one F per warp.
template <class Join, class F>
__device__ __forceinline__ F block_reduce(F value, F* memory) {
  value = warp_reduce<Join>(value);
  const int warps = static_cast<int>(blockDim.x) / WARP;
  __syncthreads();  // a reduction before this one may still be reading `memory`
  if (threadIdx.x % WARP == 0) memory[threadIdx.x / WARP] = value;
  __syncthreads();
  value = memory[0];
  for (int i = 1; i < warps; ++i) value = Join::join(value, memory[i]);
  return value;
}

}  // namespace kdaif
