// Runs a CUDA kernel on the CPU, to test what it computes on machines without a GPU.
//
// Every CUDA thread of a block is a fiber. A fiber runs until it meets a barrier or a shuffle; the scheduler then takes
// the next, in an order that the test chooses. A kernel whose result depends on that order has a race. Blocks run one
// after another, in an order of the same sort. Shared memory is thread-local memory of the one thread there is, and full
// of NaN when a block begins. A trap ends the launch with an exception.
//
// What else a kernel may need (a barrier of some threads, a vote) is one more State, or one more use of exchange().
#pragma once
#include <link.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// Out of line, so that a library's symbols say which kernels it runs.
#define __global__ __attribute__((noinline))
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // UBSan sees an index beyond an array of it; AddressSanitizer has no red zones there

struct Index { unsigned x = 0, y = 0, z = 0; };

namespace simt {

constexpr int WARP_SIZE = 32;
constexpr size_t STACK = 128 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, finished };
enum class Order { forward, reverse, odd_even, random, warp_by_warp, warp_by_warp_reverse };

// --- from one stack to another --------------------------------------------------------------------------------------
#if defined(__x86_64__)
// swapcontext asks the kernel for the signal mask each time, which costs more than all else.
struct Context { void* stack_pointer = nullptr; };
extern "C" void simt_switch(Context* from, const Context* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
inline void start(Context& context, char* stack, void (*main)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + STACK) & ~uintptr_t(15));
  *--top = nullptr;  // where main would return to; also what aligns the stack as after a call
  *--top = reinterpret_cast<void*>(main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
}
#else
using Context = ucontext_t;
inline void simt_switch(Context* from, const Context* to) { swapcontext(from, to); }
inline void start(Context& context, char* stack, void (*main)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, main, 0);
}
#endif

struct Fiber {
  Context context{};
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state = State::ready;
  uint64_t published = 0;  // what a shuffle shows to the other lanes
  unsigned thread = 0;
};

inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline Context scheduler;
inline std::function<void()> kernel_body;
inline Index block_index, block_size, grid_size;

inline void wait_at(State barrier) {
  current->state = barrier;
  simt_switch(&current->context, &scheduler);
}

inline std::exception_ptr failure;  // an exception must not leave the fiber's stack, so it is handed over

struct Trap : std::runtime_error {
  Trap() : std::runtime_error("trap") {}
};
[[noreturn]] inline void trap() { throw Trap(); }

inline void fiber_main() {
  try {
    kernel_body();
  } catch (...) {
    failure = std::current_exception();
  }
  wait_at(State::finished);
}

// --- schedules ------------------------------------------------------------------------------------------------------
inline std::vector<int> in_order(int count, Order order, uint64_t& seed) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::reverse || order == Order::warp_by_warp_reverse) std::vector<int>(indices.rbegin(), indices.rend()).swap(indices);
  if (order == Order::odd_even)
    for (int i = 0; i < count; ++i) indices[i] = i < count / 2 ? 2 * i + 1 : 2 * (i - count / 2);
  if (order == Order::random)
    for (int i = count - 1; i > 0; --i) {
      seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(indices[i], indices[(seed >> 33) % (i + 1)]);
    }
  return indices;
}

// Lets the fibers of each group go on whose members have all arrived; a finished member will never arrive.
inline bool release(int first, int count, State barrier) {
  int waiting = 0, finished = 0;
  for (int i = first; i < first + count; ++i) {
    waiting += fibers[i].state == barrier;
    finished += fibers[i].state == State::finished;
  }
  if (waiting == 0 || waiting + finished < count) return false;
  if (finished) throw std::runtime_error("threads wait at a barrier that others have left the kernel without reaching");
  for (int i = first; i < first + count; ++i) fibers[i].state = State::ready;
  return true;
}

// One go at the threads that can go on.
inline bool run_ready(const std::vector<int>& threads) {
  bool moved = false;
  for (int i : threads) {
    if (fibers[i].state != State::ready) continue;
    current = &fibers[i];
    simt_switch(&scheduler, &current->context);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    moved = true;
  }
  return moved;
}

// A warp goes as far as it gets before the next has its turn. The last one first shows what the first one, which writes
// most results, must not see.
inline bool run_warps_in_turn(int threads, Order order, uint64_t& seed) {
  bool moved = false;
  std::vector<int> lanes(WARP_SIZE);
  for (int warp : in_order(threads / WARP_SIZE, order, seed)) {
    std::iota(lanes.begin(), lanes.end(), warp * WARP_SIZE);
    while (run_ready(lanes) || release(warp * WARP_SIZE, WARP_SIZE, State::at_warp_barrier)) moved = true;
  }
  return moved;
}

// All shared memory of all kernels: the thread-local memory of the library or program that this is compiled into.
inline void poison_shared_memory() {
  static const std::pair<void*, size_t> memory = [] {
    std::pair<void*, size_t> found{nullptr, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
          const auto here = reinterpret_cast<uintptr_t>(&fibers);
          bool is_ours = false;
          size_t size = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
            if (segment.p_type == PT_LOAD && here - begin < segment.p_memsz) is_ours = true;
            if (segment.p_type == PT_TLS) size = segment.p_memsz;
          }
          if (!is_ours) return 0;
          *static_cast<std::pair<void*, size_t>*>(result) = {info->dlpi_tls_data, size};
          return 1;
        },
        &found);
    return found;
  }();
  if (memory.first != nullptr) std::memset(memory.first, 0xff, memory.second);
}

inline void run_block(int threads, Order order, uint64_t& seed) {
  while (static_cast<int>(fibers.size()) < threads) fibers.emplace_back();
  for (int i = 0; i < threads; ++i) {
    fibers[i].state = State::ready;
    fibers[i].thread = i;
#if defined(__SANITIZE_ADDRESS__)
    // The functions that were left for good in the middle have left their red zones.
    ASAN_UNPOISON_MEMORY_REGION(fibers[i].stack.get(), STACK);
#endif
    start(fibers[i].context, fibers[i].stack.get(), fiber_main);
  }
  poison_shared_memory();
  for (;;) {
    const bool in_turn = order == Order::warp_by_warp || order == Order::warp_by_warp_reverse;
    bool moved = in_turn ? run_warps_in_turn(threads, order, seed) : run_ready(in_order(threads, order, seed));
    for (int warp = 0; warp < threads; warp += WARP_SIZE) moved |= release(warp, WARP_SIZE, State::at_warp_barrier);
    moved |= release(0, threads, State::at_block_barrier);
    if (moved) continue;
    for (int i = 0; i < threads; ++i)
      if (fibers[i].state != State::finished) throw std::runtime_error("threads wait at different barriers");
    return;
  }
}

// launch(grid, block, order, [&] { kernel(arguments); })
inline void launch(Index grid, unsigned block, Order order, std::function<void()> body) {
  kernel_body = std::move(body);
  grid_size = grid, block_size.x = block;
  uint64_t seed = 1;
  for (int i : in_order(static_cast<int>(grid.x * grid.y), order, seed)) {
    block_index.x = i % grid.x, block_index.y = i / grid.x;
    run_block(static_cast<int>(block), order, seed);
  }
}
inline void launch(unsigned grid, unsigned block, Order order, std::function<void()> body) {
  launch(Index{grid, 1, 1}, block, order, std::move(body));
}

// --- what kernels call ----------------------------------------------------------------------------------------------
inline Index thread_index() {
  Index index;
  index.x = current->thread;
  return index;
}

// What the lane `source` of the same warp shows.
template <class T>
T exchange(T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&current->published, &value, sizeof(T));
  wait_at(State::at_warp_barrier);
  T other;
  std::memcpy(&other, &fibers[current->thread / WARP_SIZE * WARP_SIZE + source].published, sizeof(T));
  wait_at(State::at_warp_barrier);  // nobody publishes again before all have read
  return other;
}
inline unsigned lane() { return current->thread % WARP_SIZE; }

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)
#define __trap() simt::trap()
#define __syncthreads() simt::wait_at(simt::State::at_block_barrier)
#define __syncwarp(...) simt::wait_at(simt::State::at_warp_barrier)
#define __shfl_xor_sync(lanes, value, mask) simt::exchange(value, simt::lane() ^ (mask))
#define __shfl_sync(lanes, value, source) simt::exchange(value, source)
