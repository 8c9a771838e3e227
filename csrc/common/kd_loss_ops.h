// The ops of the kd_loss family, in terms of the two functions that a device has to bring:
//   run(student, teacher, labels, scale, T, alpha, loss or null, grad or null)   and
//   run_hvp(scale, tangent, student, T, alpha, out).
#pragma once
#include <tuple>

#include "common/kd_loss_tensors.h"

namespace kdaif {

template <auto run>
Tensor kd_loss(const Tensor& student, const Tensor& teacher, const Tensor& labels, const Tensor& weight,
               double temperature, double alpha) {
  check_logits(student, teacher, weight);
  check_labels(labels, student);
  const Tensor loss = new_loss(student);
  run(student, teacher, labels, weight, temperature, alpha, &loss, nullptr);
  return loss;
}

template <auto run>
std::tuple<Tensor, Tensor> kd_loss_with_grad(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                                             const Tensor& weight, double temperature, double alpha) {
  check_logits(student, teacher, weight);
  check_labels(labels, student);
  const Tensor loss = new_loss(student), grad = new_logits(student);
  run(student, teacher, labels, weight, temperature, alpha, &loss, &grad);
  return {loss, grad};
}

template <auto run>
Tensor kd_loss_grad(const Tensor& grad_output, const Tensor& student, const Tensor& teacher, const Tensor& labels,
                    double temperature, double alpha) {
  check_logits(student, teacher, grad_output);
  check_labels(labels, student);
  const Tensor grad = new_logits(student);
  run(student, teacher, labels, grad_output, temperature, alpha, nullptr, &grad);
  return grad;
}

template <auto run_hvp>
Tensor kd_loss_hvp(const Tensor& grad_output, const Tensor& tangent, const Tensor& student, double temperature,
                   double alpha) {
  check_logits(student, tangent, grad_output);
  const Tensor out = new_logits(student);
  run_hvp(grad_output, tangent, student, temperature, alpha, out);
  return out;
}

}  // namespace kdaif

#define KDAIF_REGISTER_KD_LOSS(m, run, run_hvp)                                  \
  m.impl("kd_loss", TORCH_BOX(&kdaif::kd_loss<run>));                            \
  m.impl("kd_loss_with_grad", TORCH_BOX(&kdaif::kd_loss_with_grad<run>));        \
  m.impl("kd_loss_grad", TORCH_BOX(&kdaif::kd_loss_grad<run>));                  \
  m.impl("kd_loss_hvp", TORCH_BOX(&kdaif::kd_loss_hvp<run_hvp>));
