// csrc/cuda/row_stats.cuh on the CPU: called from test_row_stats.py as a library, and by itself under AddressSanitizer.
#include "simt.h"

#include "cuda/row_stats.cuh"

#include <cstdio>
#include <random>

namespace {

struct Call {
  const void *student, *teacher;
  const int64_t* labels;
  void* stats;
  int64_t* argmax;
  int64_t N, V, student_stride, teacher_stride, first_class, class_count, ignore_index;
  double temperature;
};

template <class T>
void run(int order, const Call& c) {
  using F = typename kdaif::Accumulate<T>::type;
  const kdaif::RowStatsArguments<T, F> arguments{static_cast<const T*>(c.student), static_cast<const T*>(c.teacher), c.labels,
                                                 static_cast<F*>(c.stats), c.argmax, c.N, c.V, c.student_stride,
                                                 c.teacher_stride, c.first_class, c.class_count, c.ignore_index, F(c.temperature)};
  simt::launch(kdaif::stats_blocks(c.N), kdaif::stats_threads(c.V), simt::Order(order), [&] {
    if (c.teacher == nullptr) kdaif::row_stats_kernel<T, F>(arguments);
    else kdaif::row_stats_of_both_kernel<T, F>(arguments);
  });
}

}  // namespace

extern "C" void row_stats(int type, int order, const Call* call) {
  if (type == 0) run<float>(order, *call);
  else if (type == 1) run<double>(order, *call);
  else if (type == 2) run<kdaif::bfloat16>(order, *call);
  else run<kdaif::float16>(order, *call);
}

// Heap buffers of exactly the right size, so that AddressSanitizer sees one element too far; awkward widths.
int main() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0, 3);
  for (int64_t V : {1, 2, 31, 33, 130, 1025}) {
    const int64_t N = 4;
    std::vector<float> s(N * V), t(N * V), stats(kdaif::STATS_OF_BOTH * N);
    for (auto* x : {&s, &t})
      for (float& value : *x) value = normal(random);
    std::copy(s.begin(), s.begin() + V, t.begin());        // no divergence: the third pass
    std::vector<int64_t> labels{0, V - 1, V, -1}, argmax(2 * N);  // the last two are outside: NaN, and nothing read there
    Call call{s.data(), t.data(), labels.data(), stats.data(), argmax.data(), N, V, V, V, V / 2, V - V / 2, -100, 2.0};
    for (const void* teacher : {static_cast<const void*>(t.data()), static_cast<const void*>(nullptr)}) {
      call.teacher = teacher;
      row_stats(0, 3, &call);
      for (int64_t i = 0; i < N; ++i) {
        const float ce = stats[kdaif::STAT_CE * N + i], entropy = stats[kdaif::STAT_ENTROPY * N + i];
        if ((ce == ce) != (i < 2) || !(entropy >= 0) || argmax[i] < 0 || argmax[i] >= V) return 1;
      }
      if (teacher != nullptr && stats[kdaif::STAT_FORWARD_KL * N] != 0) return 2;
    }
  }
  std::puts("clean");
  return 0;
}
