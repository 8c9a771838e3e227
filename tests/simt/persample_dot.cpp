// csrc/cuda/persample_dot.cuh on the CPU: called from test_persample_dot.py as a library, and by itself under
// AddressSanitizer.
#include "simt.h"

#include "cuda/persample_dot.cuh"

#include <cmath>
#include <cstdio>
#include <random>

namespace {

struct Call {
  const void *inputs, *output_grads, *directions;
  void *partial, *dots;
  int64_t input_strides[3], output_strides[3], direction_strides[3];
  int64_t N, T, I, O, K, part, parts;
};

template <class T>
kdaif::Strided<T> strided(const void* data, const int64_t (&strides)[3]) {
  return {static_cast<const T*>(data), strides[0], strides[1], strides[2]};
}

template <class T>
void run(int order, unsigned most_blocks, const Call& c) {
  using F = typename kdaif::Accumulate<T>::type;
  const kdaif::PersampleDotArguments<T, F> arguments{
      strided<T>(c.inputs, c.input_strides), strided<T>(c.output_grads, c.output_strides),
      strided<F>(c.directions, c.direction_strides), static_cast<F*>(c.partial), static_cast<F*>(c.dots),
      c.N, c.T, c.I, c.O, c.K, c.part, c.parts};
  simt::launch(most_blocks, kdaif::DOT_THREADS, simt::Order(order), [&] { kdaif::persample_dot_kernel<T, F>(arguments); });
  simt::launch(most_blocks, kdaif::SUM_THREADS, simt::Order(order), [&] { kdaif::sum_of_sample_kernel<T, F>(arguments); });
}

}  // namespace

extern "C" int64_t part_of(int64_t positions, int64_t O, int64_t K) { return kdaif::dot_part(positions, O, K); }

extern "C" bool vendor_multiplies(int64_t positions, int64_t I, int64_t O, int64_t K) {
  return kdaif::vendor_multiplies(positions, I, O, K);
}

extern "C" void persample_dot(int type, int order, unsigned most_blocks, const Call* call) {
  if (type == 0) run<float>(order, most_blocks, *call);
  else if (type == 1) run<double>(order, most_blocks, *call);
  else if (type == 2) run<kdaif::bfloat16>(order, most_blocks, *call);
  else run<kdaif::float16>(order, most_blocks, *call);
}

// Heap buffers of exactly the right size, so that AddressSanitizer sees one element too far; awkward sizes.
int main() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  struct Size { int64_t N, T, I, O, K; };
  for (const auto& [N, T, I, O, K] : {Size{1, 1, 1, 1, 1}, Size{5, 13, 17, 65, 2}, Size{65, 1, 16, 64, 1}, Size{3, 2, 33, 130, 3}}) {
    const int64_t part = 64, parts = (O + part - 1) / part;
    std::vector<float> a(N * T * I), b(N * T * O), v(K * O * I), partial(K * parts * N * T, NAN), dots(N * K, NAN);
    for (auto* x : {&a, &b, &v})
      for (float& value : *x) value = normal(random);
    const Call call{a.data(), b.data(), v.data(), partial.data(), dots.data(), {T * I, I, 1}, {T * O, O, 1}, {O * I, I, 1},
                    N, T, I, O, K, part, parts};
    persample_dot(0, 3, 3, &call);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) {
        double wanted = 0, size = 0;
        for (int64_t t = 0; t < T; ++t)
          for (int64_t o = 0; o < O; ++o)
            for (int64_t i = 0; i < I; ++i) {
              const double term = double(b[(n * T + t) * O + o]) * v[(k * O + o) * I + i] * a[(n * T + t) * I + i];
              wanted += term, size += std::abs(term);
            }
        if (!(std::abs(dots[n * K + k] - wanted) <= 1e-6 * size)) return 1;
      }
  }
  std::puts("clean");
  return 0;
}
