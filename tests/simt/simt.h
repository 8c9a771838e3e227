// Runs a CUDA kernel on the CPU, to test what it computes on machines without a GPU.
//
// Every CUDA thread of a block is a fiber. A fiber runs until it meets a barrier or a shuffle; the scheduler then takes
// the next, in an order that the test chooses. A kernel whose result depends on that order has a race. Blocks run one
// after another, and shared memory is a static variable, full of what the block before left in it. A trap ends the launch
// with an exception.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static

struct Index { unsigned x = 0, y = 0, z = 0; };

namespace simt {

constexpr int WARP_SIZE = 32;
constexpr size_t STACK = 128 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, finished };
enum class Order { forward, reverse, odd_even, random, warp_by_warp };

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state = State::ready;
  uint64_t published = 0;  // what a shuffle shows to the other lanes
  unsigned thread = 0;
};

inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> kernel_body;
inline Index block_index, block_size, grid_size;

inline void wait_at(State barrier) {
  current->state = barrier;
  swapcontext(&current->context, &scheduler);
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
  current->state = State::finished;
  swapcontext(&current->context, &scheduler);
}

inline std::vector<int> thread_order(int count, Order order, uint64_t& seed) {
  std::vector<int> threads(count);
  std::iota(threads.begin(), threads.end(), 0);
  if (order == Order::reverse) std::vector<int>(threads.rbegin(), threads.rend()).swap(threads);
  if (order == Order::odd_even)
    for (int i = 0; i < count; ++i) threads[i] = i < count / 2 ? 2 * i + 1 : 2 * (i - count / 2);
  if (order == Order::random)
    for (int i = count - 1; i > 0; --i) {
      seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(threads[i], threads[(seed >> 33) % (i + 1)]);
    }
  return threads;
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

// One go at the threads that can go on; with warp_by_warp, a warp goes as far as it gets before the next has its turn.
inline bool run_ready(const std::vector<int>& threads) {
  bool moved = false;
  for (int i : threads) {
    if (fibers[i].state != State::ready) continue;
    current = &fibers[i];
    swapcontext(&scheduler, &current->context);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    moved = true;
  }
  return moved;
}

inline bool run_warps_in_turn(int threads) {
  bool moved = false;
  std::vector<int> lanes(WARP_SIZE);
  for (int warp = 0; warp < threads; warp += WARP_SIZE) {
    std::iota(lanes.begin(), lanes.end(), warp);
    while (run_ready(lanes) || release(warp, WARP_SIZE, State::at_warp_barrier)) moved = true;
  }
  return moved;
}

inline void run_block(int threads, Order order, uint64_t& seed) {
  while (static_cast<int>(fibers.size()) < threads) fibers.emplace_back();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::ready;
    fiber.thread = i;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (;;) {
    bool moved = order == Order::warp_by_warp ? run_warps_in_turn(threads) : run_ready(thread_order(threads, order, seed));
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
  for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
    for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block(static_cast<int>(block), order, seed);
}
inline void launch(unsigned grid, unsigned block, Order order, std::function<void()> body) {
  launch(Index{grid, 1, 1}, block, order, std::move(body));
}

inline Index thread_index() {
  Index index;
  index.x = current->thread;
  return index;
}

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&current->published, &value, sizeof(T));
  wait_at(State::at_warp_barrier);
  const unsigned lane = current->thread % WARP_SIZE, first = current->thread - lane;
  T other;
  std::memcpy(&other, &fibers[first + (lane ^ mask)].published, sizeof(T));
  wait_at(State::at_warp_barrier);  // nobody publishes again before all have read
  return other;
}

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)
#define __trap() simt::trap()
#define __syncthreads() simt::wait_at(simt::State::at_block_barrier)
#define __shfl_xor_sync(lanes, value, mask) simt::shuffle_xor(value, mask)
