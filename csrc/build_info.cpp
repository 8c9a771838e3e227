// What this build was made with. No tensors cross here: those go through torch's dispatcher.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build_info, module) {
  pybind11::dict build;
  build["torch headers"] = TORCH_BUILD_VERSION;
  build["C++ compiler"] = CXX_COMPILER;
  build["CPU instruction sets"] = CPU_LEVELS;
  build["nvcc"] = NVCC_VERSION;
  build["CUDA architectures"] = CUDA_ARCHS;
  module.attr("BUILD") = build;
}
