// Two kernels with barriers, shared memory and long strides, for test_the_shim_can_fail.py: says whether they give the
// same bits under every schedule, and numbers at all. Far apart, rows lie where 32 bits do not count their elements.
#include "simt.h"

#include "cuda/persample_dot.cuh"
#include "cuda/row_stats.cuh"

#include <sys/mman.h>

#include <cstdio>
#include <string>

using namespace kdaif;

namespace {

constexpr simt::Order ORDERS[] = {simt::Order::forward, simt::Order::reverse, simt::Order::odd_even, simt::Order::random,
                                  simt::Order::warp_by_warp, simt::Order::warp_by_warp_reverse};

float number(int64_t i) { return static_cast<float>((i * 2654435761u >> 7) % 1000) / 100; }

std::vector<float> numbers(int64_t count) {
  std::vector<float> x(count);
  for (int64_t i = 0; i < count; ++i) x[i] = number(i);
  return x;
}

std::vector<float> row_stats(simt::Order order, const float* rows, int64_t N, int64_t V, int64_t stride) {
  std::vector<float> stats(STATS_ALONE * N, 7);
  std::vector<int64_t> argmax(N, -7);
  const RowStatsArguments<float, float> a{rows, nullptr, nullptr, stats.data(), argmax.data(), N, V, stride, 0, 0, 5, -100, 2};
  simt::launch(stats_blocks(N), stats_threads(V), order, [&] { row_stats_kernel<float, float>(a); });
  for (int64_t index : argmax) stats.push_back(static_cast<float>(index));
  return stats;
}

std::vector<float> persample_dot(simt::Order order) {
  const int64_t N = 3, T = 30, I = 40, O = 70, K = 1, part = 64, parts = 2;
  const std::vector<float> a = numbers(N * T * I), b = numbers(N * T * O), v = numbers(K * O * I);
  std::vector<float> partial(K * parts * N * T), dots(N * K, 7);
  const PersampleDotArguments<float, float> g{{a.data(), T * I, I, 1}, {b.data(), T * O, O, 1}, {v.data(), O * I, I, 1},
                                              partial.data(), dots.data(), N, T, I, O, K, part, parts};
  simt::launch(3, DOT_THREADS, order, [&] { persample_dot_kernel<float, float>(g); });
  simt::launch(2, SUM_THREADS, order, [&] { sum_of_sample_kernel<float, float>(g); });
  return dots;
}

std::vector<float> both(simt::Order order) {
  const int64_t N = 3, V = 700;
  const std::vector<float> rows = numbers(N * V);
  std::vector<float> all = row_stats(order, rows.data(), N, V, V);
  for (float dot : persample_dot(order)) all.push_back(dot);
  return all;
}

bool same_far_apart() {
  const int64_t N = 3, V = 40, apart = (int64_t(1) << 30) + 8, size = (N - 1) * apart + V;
  void* memory = mmap(nullptr, size * sizeof(float), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return true;
  float* far = static_cast<float*>(memory);
  std::vector<float> near = numbers(N * V);
  for (int64_t i = 0; i < N * V; ++i) far[i / V * apart + i % V] = near[i];
  const auto x = row_stats(simt::Order::forward, far, N, V, apart), y = row_stats(simt::Order::forward, near.data(), N, V, V);
  return std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

}  // namespace

int main(int, char** arguments) try {
  if (std::string(arguments[1]) == "far") {
    std::puts(same_far_apart() ? "same" : "different");
    return 0;
  }
  const std::vector<float> first = both(ORDERS[0]);
  bool same = true;
  for (simt::Order order : ORDERS) {
    const std::vector<float> other = both(order);
    same &= std::memcmp(first.data(), other.data(), first.size() * sizeof(float)) == 0;
  }
  bool are_numbers = true;
  for (float dot : persample_dot(ORDERS[0])) are_numbers &= dot == dot;
  std::puts(!are_numbers ? "not numbers" : same ? "same" : "different");
} catch (const std::exception& error) {
  std::puts(error.what());
}
