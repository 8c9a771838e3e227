// Rows that pass through shared memory. Each thread has a ring of slots there for packets that it copies and reads
// itself, so no barrier guards them; copies run ahead of what is computed, into the next row, all the time.
//
// A row is a tape of chunks: all of them in order for the first look; then, for the second, those at its end that the
// ring still holds, and before them, again from memory, the others, the last first, since the caches have those. Chunks
// are thus used in the order in which they were copied. Every step uses one chunk, frees one slot or none, and closes one
// group of copies, be it empty. A copy is then at least as many steps old as there are slots when it is used, so that
// to wait for all but the last IN_FLIGHT groups is enough wherever there are more slots than that.
//
// Predicted, not measured on a GPU, for [8192, 32000] bfloat16 on 132 multiprocessors at 1.98 GHz and 4.3 TB/s, where
// copying alone takes 11 700 cycles a row and 85 % of its bandwidth leaves 55 instructions and 6.9 exponentials an
// element. One block of 512 threads has 7 slots of 32 KiB: a row of 4, and 3 of the next, 96 KiB in flight. Counted from
// the machine code (rarely executed parts left out) an element costs, in both looks together: at T = 1, 33 instructions
// and 4 exponentials; at T = 2, 37 and 4; at other T, about 44 and 5.5, the rest being polynomials. The one barrier a
// row, with its reduction, takes some 600 cycles. So T = 1 and 2 should reach 85 %, other T 75 to 85 %.
// tests/test_cuda_instructions.py has the ceilings.
#pragma once
#if defined(__CUDACC__)
#include <cuda_pipeline_primitives.h>
#endif

#include "cuda/row_divergence_fast.cuh"

namespace kdaif {

#if defined(__CUDACC__)
__device__ __forceinline__ void* dynamic_shared_memory() {
  extern __shared__ uint4 dynamic_memory[];
  return dynamic_memory;
}
#endif

// `Source` says what the items of work are that a block copies: open(item), false if there is nothing to copy, and
// stream(k), where the item's k-th array begins. A thread has `packets` packets of each in a slot.
template <class T, int width, int packets, int in_flight, class Source>
struct Ring {
  using P = Packet<T, width>;

  const RingShape shape;
  const int V, threads, chunk, stream_size, slot_size, size;  // elements; packets, of all threads
  const int64_t items;
  Source source;
  P* column;  // this thread's first packet
  int64_t item;     // being copied
  int place = 0;    // of the next copy on its tape
  int oldest = 0;   // slot that is freed, and filled, next: its first packet

  __device__ __forceinline__ Ring(const RingShape& shape, int64_t V, int64_t items, const Source& source)
      : shape(shape), V(static_cast<int>(V)), threads(static_cast<int>(blockDim.x)), chunk(threads * width * packets),
        stream_size(threads * packets), slot_size(shape.streams * stream_size), size(shape.slots * slot_size),
        items(items), source(source), column(static_cast<P*>(dynamic_shared_memory()) + threadIdx.x),
        item(blockIdx.x) {
    skip();
    for (int slot = 0; slot < shape.slots; ++slot) step(true);
  }

  __device__ __forceinline__ int first() const { return static_cast<int>(threadIdx.x) * width; }
  __device__ __forceinline__ int next(int slot) const { return slot + slot_size == size ? 0 : slot + slot_size; }
  __device__ __forceinline__ P packet(int slot, int stream, int i) const {
    return column[slot + stream * stream_size + i * threads];
  }
  __device__ __forceinline__ void skip() {
    while (item < items && !source.open(item)) item += gridDim.x;
  }

  // Before a chunk is read. CUDA's function does not tell the compiler that memory has changed.
  __device__ __forceinline__ void wait() const {
    __pipeline_wait_prior(in_flight);
    asm volatile("" ::: "memory");
  }

  // After: `frees` if it is not needed any more.
  __device__ __forceinline__ void step(bool frees) {
    if (frees) {
      if (item < items) copy();
      oldest = next(oldest);
    }
    __pipeline_commit();
  }

  __device__ __forceinline__ void copy() {
    const int v = first() + chunk * (place < shape.chunks ? place : shape.chunks + shape.again - 1 - place);
#pragma unroll
    for (int i = 0; i < packets; ++i) {
      const int at = v + i * threads * width;
      if (at >= V) break;
      for (int k = 0; k < source.streams(); ++k)
        __pipeline_memcpy_async(column + oldest + k * stream_size + i * threads, source.stream(k) + at, 16);
    }
    if (++place < shape.chunks + shape.again) return;
    place = 0, item += gridDim.x;
    skip();
  }

  // body(v, slot, i) for this thread's packets of a chunk.
  template <class Body>
  __device__ __forceinline__ void visit(int v, int slot, Body body) {
#pragma unroll
    for (int i = 0; i < packets; ++i)
      if (v + i * threads * width < V) body(v + i * threads * width, slot, i);
  }
  template <class Body>
  __device__ __forceinline__ void first_look(Body body) {
    int slot = oldest, v = first();
#pragma unroll 1
    for (int i = 0; i < shape.chunks; ++i, v += chunk, slot = next(slot)) {
      wait();
      visit(v, slot, body);
      step(i < shape.again || shape.kept == 0);
    }
  }
  template <class Body>
  __device__ __forceinline__ void second_look(Body body) {
#pragma unroll 1
    for (int i = 0; i < shape.chunks; ++i) {
      wait();
      visit(first() + chunk * (i < shape.kept ? shape.again + i : shape.chunks - 1 - i), oldest, body);
      step(true);
    }
  }
};

// The student's row, and the teacher's; ignored rows are not copied.
template <int parts, class T>
struct RowSource {
  const RowDivergence& d;
  const T *s = nullptr, *t = nullptr;
  __device__ __forceinline__ bool open(int64_t row) {
    const FastPointers<T> at(d, static_cast<T*>(nullptr), row);
    s = at.s, t = at.t;
    return d.labels == nullptr || d.labels[row] != d.ignore_index;
  }
  __device__ __forceinline__ static constexpr int streams() { return parts == LABELS ? 1 : 2; }
  __device__ __forceinline__ const T* stream(int k) const { return k == 0 ? s : t; }
};

template <int parts, class T, int width>
__global__ void __launch_bounds__(FAST_THREADS, 1)
fast_ring_kernel(const RowDivergence d, const RingShape shape, bool check, float* __restrict__ loss,
                 T* __restrict__ grads) {
  __shared__ BlockMemory<RowSums> memory;
  static_assert(sizeof memory <= STATIC_SHARED);
  BlockTeam<RowSums> team(memory);
  Ring<T, width, RING_PACKETS, IN_FLIGHT, RowSource<parts, T>> ring(shape, d.V, d.N, RowSource<parts, T>{d});
  for (int64_t row = blockIdx.x; row < d.N; row += gridDim.x) {
    const RowLabel y = row_label(d, row, check);
    const FastPointers<T> at(d, grads, row);
    if (y.ignored) {
      if (loss != nullptr && team.rank() == 0) loss[row] = 0;
      write_zeros<T, width>(at.grad, 0, d.V, team);
      continue;
    }
    const AtLabel<T> l = AtLabel<T>::template of<parts>(at, y);
    const float weight = weight_of(d, row, y);
    auto teacher = [&](int slot, int i) { return parts == LABELS ? Packet<T, width>{} : ring.packet(slot, 1, i); };
    FastRow<parts> r = fast_row<parts>(d);
    ring.first_look([&](int, int slot, int i) { r.add(ring.packet(slot, 0, i), teacher(slot, i)); });
    team.join(r);
    if (at.grad != nullptr) {
      const GradientFactors<parts> f(d, r, weight);
      ring.second_look([&](int v, int slot, int i) {
        store_packet(gradient_packet(r, f, ring.packet(slot, 0, i), teacher(slot, i)), at.grad + v);
      });
      write_label<parts, width>(at, y, l, 0, d.V, r, f, team);
    }
    write_loss<parts, T, width>(d, at, r, y, weight, l, team, loss == nullptr ? nullptr : loss + row);
  }
}

}  // namespace kdaif
