// binding.cpp: the Python module `layer`. It is linked into the library of the kernels, so it
// configures and reads the same copy of the host layer that runs them.
#include <pybind11/pybind11.h>

#include "layer.h"

namespace py = pybind11;
namespace cuda_on_host {

std::map<std::string, TestKernel>& test_kernels() {
  static std::map<std::string, TestKernel> kernels;
  return kernels;
}

bool add_test_kernels(const std::map<std::string, TestKernel>& kernels) {
  test_kernels().insert(kernels.begin(), kernels.end());
  return true;
}

}  // namespace cuda_on_host

using namespace cuda_on_host;

namespace {

py::dict counters_and_reset() {
  py::dict result;
  result["grids"] = counters.grids;
  result["blocks"] = counters.blocks;
  result["switches"] = counters.switches;
  result["loads"] = counters.loads;
  result["stores"] = counters.stores;
  result["vector_accesses"] = counters.vector_accesses;
  result["shared_bytes"] = counters.shared_bytes;
  counters = {};
  return result;
}

void launch(const std::string& name, int64_t blocks, int threads, uintptr_t data, int n) {
  const TestKernel kernel = test_kernels().at(name);
  run_on_host(name.c_str(), blocks, threads, [=] { kernel(reinterpret_cast<int*>(data), n); });
}

}  // namespace

PYBIND11_MODULE(layer, m) {
  py::register_local_exception<KernelError>(m, "KernelError", PyExc_RuntimeError);
  m.def("set_seed", [](unsigned seed) { settings.seed = seed; }, "Draws the order of threads and blocks of a grid.");
  m.def("set_max_blocks", [](int64_t blocks) { settings.max_blocks = blocks; }, "The most blocks of a grid.");
  m.def("set_races", [](bool races) { settings.races = races; }, "Whether accesses that no barrier orders are errors.");
  m.def("take_counters", &counters_and_reset, "What the layer has run since the last call.");
  m.def("address_sanitizer_is_active", &address_sanitizer_is_active);
  m.def("launch", &launch, "Runs a test kernel of the layer's own on the int32 at the address `data`.", py::arg("name"),
        py::arg("blocks"), py::arg("threads"), py::arg("data"), py::arg("n"));
}
