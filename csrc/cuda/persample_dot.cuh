// persample_dot on the GPU: <G_i, V_k> = sum_t b_it^T V_k a_it as the matrix product A V_k^T, of which a block forms one tile
// at a time, multiplies it by b's and sums it over the outputs; definition in kdaif_fast/reference/persample_dot.py. No
// torch here, so that the same source can be compiled and run by a test without a GPU.
//
// A block owns DOT_ROWS positions (of as many samples as they belong to), one direction, and a part of its outputs. It leaves
// one number for each position; a second kernel adds those of a sample, in a fixed order and without atomics.
//
// Floor: 2 K N T I O operations, on the ordinary units, in float32 (float64 for float64); A, b and V read once would be
// N T (I + O) + K O I elements, and are N T I (O / DOT_COLUMNS) + K O I (N T / DOT_ROWS), mostly from the L2 cache. Not run
// on a GPU yet.
#pragma once
#include <cstdint>

#include "common/half.h"
#include "cuda/block.cuh"

namespace kdaif {

constexpr int DOT_ROWS = 64, DOT_COLUMNS = 64, DOT_DEPTH = 16;  // positions, outputs and inputs of a tile
constexpr int DOT_SIDE = 16;                                    // threads along both sides of a tile
constexpr int DOT_THREADS = DOT_SIDE * DOT_SIDE;
constexpr int DOT_OWN = DOT_ROWS / DOT_SIDE;                    // rows of a thread, and columns
constexpr int DOT_PITCH = DOT_ROWS + 1;  // of a row in shared memory: 16 loads of a column go to 16 banks
constexpr int SUM_THREADS = 128;
static_assert(DOT_ROWS == DOT_COLUMNS, "a thread's rows and columns are as many, and so are both tiles' elements");

// Elements of a tensor [N, T, features] or [K, O, I] of any strides.
template <class T>
struct Strided {
  const T* data;
  int64_t outer, middle, inner;  // strides
  __device__ __forceinline__ const T* row(int64_t i, int64_t j) const { return data + i * outer + j * middle; }
};

template <class T, class F>
struct PersampleDotArguments {
  Strided<T> inputs;         // [N, T, I]
  Strided<T> output_grads;   // [N, T, O]
  Strided<F> directions;     // [K, O, I], in what sums are formed in
  F* partial;                // [K, parts, N T]
  F* dots;                   // [N, K]
  int64_t N, positions_each, I, O, K;
  int64_t part, parts;       // outputs of a part, and how many parts
  int64_t positions() const { return N * positions_each; }
};

// A block's share of the outputs: all of them, unless that would leave a GPU idle.
inline int64_t dot_part(int64_t positions, int64_t O, int64_t K) {
  constexpr int64_t enough = 264;
  const int64_t blocks = (positions + DOT_ROWS - 1) / DOT_ROWS * K, tiles = (O + DOT_COLUMNS - 1) / DOT_COLUMNS;
  const int64_t wanted = (enough + blocks - 1) / blocks, parts = wanted < tiles ? wanted : tiles;
  return (tiles + parts - 1) / parts * DOT_COLUMNS;
}
// Whether to store A V^T, formed by the vendor's library, rather than to multiply here. An estimate, not yet measured: the
// library multiplies about twice as fast, as this kernel waits for shared memory (8 loads for 16 multiply-adds), but writes
// and reads back a product of 4 bytes for I multiply-adds. And the product has to fit: at most 1 GiB of float32.
inline bool vendor_multiplies(int64_t positions, int64_t I, int64_t O, int64_t K) {
  return I > 64 && positions <= (int64_t{1} << 28) / (O * K);
}
inline unsigned dot_grid(int64_t wanted) { return static_cast<unsigned>(wanted < 0x7fffffff ? wanted : 0x7fffffff); }

template <class F>
struct DotMemory {
  F a[DOT_DEPTH][DOT_PITCH];  // transposed: a column of A's tile is a row here
  F v[DOT_DEPTH][DOT_PITCH];
};

// One tile of A V^T: sums[r][c] of row r * DOT_SIDE + y and column c * DOT_SIDE + x. Outside the tensors all is 0.
template <class T, class F>
__device__ __forceinline__ void product_tile(const PersampleDotArguments<T, F>& g, DotMemory<F>& memory, int64_t first_row,
                                             int64_t k, int64_t first_o, int64_t last_o, F (&sums)[DOT_OWN][DOT_OWN]) {
  const int thread = static_cast<int>(threadIdx.x), x = thread % DOT_SIDE, y = thread / DOT_SIDE;
  for (int r = 0; r < DOT_OWN; ++r)
    for (int c = 0; c < DOT_OWN; ++c) sums[r][c] = 0;
  // Neighbouring threads load neighbouring inputs, always of the same rows.
  const T* a_rows[DOT_OWN];
  const F* v_rows[DOT_OWN];
  for (int r = 0; r < DOT_OWN; ++r) {
    const int64_t row = first_row + r * DOT_SIDE + y, o = first_o + r * DOT_SIDE + y;
    a_rows[r] = row < g.N * g.positions_each ? g.inputs.row(row / g.positions_each, row % g.positions_each) : nullptr;
    v_rows[r] = o < last_o ? g.directions.row(k, o) : nullptr;
  }
  for (int64_t first_i = 0; first_i < g.I; first_i += DOT_DEPTH) {
    const int64_t i = first_i + x;
    for (int r = 0; r < DOT_OWN; ++r) {
      memory.a[x][r * DOT_SIDE + y] = a_rows[r] != nullptr && i < g.I ? widen(a_rows[r][i * g.inputs.inner]) : F(0);
      memory.v[x][r * DOT_SIDE + y] = v_rows[r] != nullptr && i < g.I ? v_rows[r][i * g.directions.inner] : F(0);
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < DOT_DEPTH; ++d) {
      F a[DOT_OWN], v[DOT_OWN];
#pragma unroll
      for (int r = 0; r < DOT_OWN; ++r) a[r] = memory.a[d][r * DOT_SIDE + y], v[r] = memory.v[d][r * DOT_SIDE + x];
#pragma unroll
      for (int r = 0; r < DOT_OWN; ++r)
#pragma unroll
        for (int c = 0; c < DOT_OWN; ++c) sums[r][c] += a[r] * v[c];
    }
    __syncthreads();  // nobody loads the next tile before all are done with this one
  }
}

template <class T, class F>
__global__ void __launch_bounds__(DOT_THREADS) persample_dot_kernel(const PersampleDotArguments<T, F> g) {
  __shared__ DotMemory<F> memory;
  const int thread = static_cast<int>(threadIdx.x), x = thread % DOT_SIDE, y = thread / DOT_SIDE;
  const int64_t positions = g.N * g.positions_each, pieces = g.K * g.parts;
  const int64_t blocks = (positions + DOT_ROWS - 1) / DOT_ROWS * pieces;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    // Blocks that run at the same time share their positions, so that A is read from memory once.
    const int64_t first_row = block / pieces * DOT_ROWS, piece = block % pieces;
    const int64_t part_begin = piece % g.parts * g.part, part_end = part_begin + g.part < g.O ? part_begin + g.part : g.O;
    F totals[DOT_OWN] = {};
    for (int64_t first_o = part_begin; first_o < part_end; first_o += DOT_COLUMNS) {
      F sums[DOT_OWN][DOT_OWN];
      product_tile(g, memory, first_row, piece / g.parts, first_o, part_end, sums);
      for (int r = 0; r < DOT_OWN; ++r) {
        const int64_t row = first_row + r * DOT_SIDE + y;
        if (row >= positions) continue;
        const T* b = g.output_grads.row(row / g.positions_each, row % g.positions_each);
        for (int c = 0; c < DOT_OWN; ++c) {
          const int64_t o = first_o + c * DOT_SIDE + x;
          if (o < part_end) totals[r] += sums[r][c] * widen(b[o * g.output_grads.inner]);
        }
      }
    }
    // The 16 threads of a row are one half of a warp.
    for (int r = 0; r < DOT_OWN; ++r) {
      for (int offset = DOT_SIDE / 2; offset > 0; offset /= 2) totals[r] += __shfl_xor_sync(0xffffffffu, totals[r], offset);
      const int64_t row = first_row + r * DOT_SIDE + y;
      if (x == 0 && row < positions) g.partial[piece * positions + row] = totals[r];
    }
  }
}

// A warp a sample and direction: its positions and parts, in a fixed order.
template <class T, class F>
__global__ void __launch_bounds__(SUM_THREADS) sum_of_sample_kernel(const PersampleDotArguments<T, F> g) {
  const int64_t warps = SUM_THREADS / WARP, lane = threadIdx.x % WARP;
  for (int64_t at = blockIdx.x * warps + threadIdx.x / WARP; at < g.N * g.K; at += gridDim.x * warps) {
    const int64_t sample = at / g.K, k = at % g.K;
    F total = 0;
    for (int64_t part = 0; part < g.parts; ++part) {
      const F* of_sample = g.partial + ((k * g.parts + part) * g.N + sample) * g.positions_each;
      for (int64_t t = lane; t < g.positions_each; t += WARP) total += of_sample[t];
    }
    total = warp_reduce<Sum>(total);
    if (lane == 0) g.dots[at] = total;
  }
}

}  // namespace kdaif
