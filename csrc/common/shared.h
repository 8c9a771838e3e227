// Functions that the CPU and the CUDA kernels share. Forced inline on the CPU: the same source is compiled there for
// several instruction sets, and a shared out-of-line copy would be the wrong one for some CPU.
#pragma once

#if defined(__CUDACC__)
#define KDAIF_SHARED __host__ __device__ __forceinline__
#else
#define KDAIF_SHARED static inline __attribute__((always_inline))
#endif
