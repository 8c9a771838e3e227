// csrc/cuda/kd_loss.cuh on the CPU: called from test_kd_loss.py as a library, and by itself under AddressSanitizer.
#include "simt.h"

#include "cuda/kd_loss.cuh"

#include <cstdio>
#include <random>

namespace {

template <class T>
void run_loss(int order, const void* s, const void* t, const int64_t* labels, const void* scale, void* loss, void* grad,
              int64_t N, int64_t V, int64_t s_stride, int64_t t_stride, double temperature, double alpha) {
  using F = typename kdaif::Accumulate<T>::type;
  simt::launch(kdaif::blocks_for(N), kdaif::threads_for(V), simt::Order(order), [&] {
    kdaif::kd_loss_kernel<T, F>(static_cast<const T*>(s), static_cast<const T*>(t), labels, static_cast<const F*>(scale),
                                static_cast<F*>(loss), static_cast<T*>(grad), N, V, s_stride, t_stride, F(temperature),
                                F(alpha));
  });
}

template <class T>
void run_hvp(int order, const void* s, const void* u, const void* scale, void* out, int64_t N, int64_t V,
             int64_t s_stride, int64_t u_stride, double temperature, double alpha) {
  using F = typename kdaif::Accumulate<T>::type;
  simt::launch(kdaif::blocks_for(N), kdaif::threads_for(V), simt::Order(order), [&] {
    kdaif::kd_loss_hvp_kernel<T, F>(static_cast<const T*>(s), static_cast<const T*>(u), static_cast<const F*>(scale),
                                    static_cast<T*>(out), N, V, s_stride, u_stride, F(temperature), F(alpha));
  });
}

template <class Body>
void for_type(int type, Body body) {
  if (type == 0) body(float());
  else if (type == 1) body(double());
  else if (type == 2) body(kdaif::bfloat16());
  else body(kdaif::float16());
}

}  // namespace

extern "C" void kd_loss(int type, int order, const void* s, const void* t, const int64_t* labels, const void* scale,
                        void* loss, void* grad, int64_t N, int64_t V, int64_t s_stride, int64_t t_stride,
                        double temperature, double alpha) {
  for_type(type, [&](auto element) {
    run_loss<decltype(element)>(order, s, t, labels, scale, loss, grad, N, V, s_stride, t_stride, temperature, alpha);
  });
}

extern "C" void kd_loss_hvp(int type, int order, const void* s, const void* u, const void* scale, void* out, int64_t N,
                            int64_t V, int64_t s_stride, int64_t u_stride, double temperature, double alpha) {
  for_type(type, [&](auto element) {
    run_hvp<decltype(element)>(order, s, u, scale, out, N, V, s_stride, u_stride, temperature, alpha);
  });
}

// Heap buffers of exactly the right size, so that AddressSanitizer sees one element too far; awkward widths.
int main() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0, 3);
  for (int64_t V : {1, 2, 31, 33, 130, 1025}) {
    const int64_t N = 3;
    std::vector<float> s(N * V), t(N * V), u(N * V), scale(N, 1.5f), loss(N), grad(N * V), hvp(N * V);
    for (auto* x : {&s, &t, &u})
      for (float& value : *x) value = normal(random);
    std::vector<int64_t> labels{0, V - 1, V};  // the last one is outside: its row must become NaN, nothing else
    for (double alpha : {0.0, 0.4, 1.0}) {
      kd_loss(0, 3, s.data(), t.data(), labels.data(), scale.data(), loss.data(), grad.data(), N, V, V, V, 2.0, alpha);
      kd_loss_hvp(0, 3, s.data(), u.data(), scale.data(), hvp.data(), N, V, V, V, 2.0, alpha);
      if (!(loss[0] == loss[0]) || !(loss[1] == loss[1]) || loss[2] == loss[2]) return 1;
    }
  }
  std::puts("clean");
  return 0;
}
