// levels_cpu.cpp: tells `python -m ppo_ext info` which copy of the CPU kernels runs.

#include <torch/csrc/stable/library.h>

#include "levels.h"

namespace ppo_ext {
namespace {

int64_t cpu_level_number() { return int64_t(cpu_level()); }

}  // namespace
}  // namespace ppo_ext

STABLE_TORCH_LIBRARY(ppo_ext_info, m) { m.def("cpu_level() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(ppo_ext_info, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&ppo_ext::cpu_level_number));
}
