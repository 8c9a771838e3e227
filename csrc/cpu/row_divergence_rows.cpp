// row_divergence over rows; compiled once per instruction set (KDAIF_LEVEL), so nothing here may have external linkage
// but the function at the end, and no library template may be instantiated.
#include "cpu/vector.h"

#include "cpu/row_divergence_rows.h"

#include "cpu/for_type.h"
#include "cpu/row_divergence_general.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

template <class T, class F> void no_row(const RowDivergence& d, F* loss, T* grad) {
  if (loss != nullptr) *loss = 0;
  if (grad != nullptr) std::memset(grad, 0, static_cast<size_t>(d.V) * sizeof(T));
}

template <class T> void rows_of(const RowDivergence& d, const RowResults& results, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  const bool plain = is_plain(d), grad_wanted = results.grad != nullptr;
  Scratch<F> scratch(plain && d.rows == nullptr && d.other == 0 && d.interpolation == 1 ? 3 : GeneralRows<F>::COUNT, d.V);
  const Exponentials<F> keep{scratch.row(0), scratch.row(1), scratch.row(2)};
  const GeneralRows<F> general(scratch);
  for (int64_t i = begin; i < end; ++i) {
    F* loss = results.loss == nullptr ? nullptr : static_cast<F*>(results.loss) + i;
    T* grad = grad_wanted ? static_cast<T*>(results.grad) + i * d.V : nullptr;
    RowSettings<F> r = row_settings<F>(d, i);
    if (d.teacher == nullptr) r.kd = r.other = 0;
    if ((d.labels != nullptr && d.labels[i] == d.ignore_index) || (r.ce == 0 && !wants_divergence(d, r))) {
      no_row(d, loss, grad);
      continue;
    }
    const F scale = row_weight<F>(d, i);
    if (!plain || r.other != 0 || r.interpolation != 1) {
      general_row(d, i, r, scale, loss, grad, general);
      continue;
    }
    const T* s = static_cast<const T*>(d.student) + i * d.student_stride;
    const T* t = d.teacher == nullptr ? s : static_cast<const T*>(d.teacher) + i * d.teacher_stride;
    const int64_t label = d.labels == nullptr ? 0 : d.labels[i];
    if (grad_wanted) any_plain_row<T, true>(s, t, d.V, label, scale, r, loss, grad, keep);
    else any_plain_row<T, false>(s, t, d.V, label, scale, r, loss, grad, keep);
  }
}

}  // namespace

void row_divergence_rows(const RowDivergence& d, ElementType type, const RowResults& results, int64_t begin, int64_t end) {
  for_type(type, [&](auto element) { rows_of<decltype(element)>(d, results, begin, end); });
}

}  // namespace kdaif::KDAIF_LEVEL
