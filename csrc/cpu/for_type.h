// From a type's name at run time to the type.
#pragma once
#include "common/half.h"
#include "cpu/vector.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

template <class Body> KDAIF_INLINE void for_type(ElementType type, Body body) {
  switch (type) {
    case ElementType::float32: body(float()); break;
    case ElementType::float64: body(double()); break;
    case ElementType::bfloat16: body(bfloat16()); break;
    case ElementType::float16: body(float16()); break;
  }
}

}  // namespace
}  // namespace kdaif::KDAIF_LEVEL
