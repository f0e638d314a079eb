// undefined.cpp: the functions that code compiled with g++ -fsanitize=alignment,bounds,... calls when it finds an
// error. The first member of every report is the source line.
#include "layer.h"

namespace cuda_on_host {
namespace {

struct Report {
  const char* file;
  uint32_t line, column;
};

struct Type {
  uint16_t kind, info;
  char name[1];  // in quotes
};

struct BadPointer : Report {
  const Type* type;
  unsigned char log_alignment, access;
};

[[noreturn]] void fail_at(const Report* report, void* pc, const std::string& sentence) {
  fail(sentence, pc, text_of(Place{report->file, int(report->line)}));
}

[[noreturn]] void fail_pointer(const BadPointer* report, void* pc, uintptr_t address) {
  const char* const accesses[] = {"a load", "a store", "a use"};
  const std::string access = accesses[std::min<int>(report->access, 2)];
  const unsigned alignment = 1u << report->log_alignment, remainder = unsigned(address % alignment);
  const std::string must = access + " of a " + report->type->name + " must be ";
  if (remainder == 0) fail_at(report, pc, must + "within its variable, got one beyond it");
  fail_at(report, pc,
          must + "at a multiple of " + std::to_string(alignment) + " bytes, got an address with remainder " +
              std::to_string(remainder));
}

}  // namespace
}  // namespace cuda_on_host

using namespace cuda_on_host;

#define PPO_HANDLER(name, sentence) \
  void __ubsan_handle_##name(const Report* report) { fail_at(report, __builtin_return_address(0), sentence); }

extern "C" {
void __ubsan_handle_type_mismatch_v1(const BadPointer* report, uintptr_t address) {
  fail_pointer(report, __builtin_return_address(0), address);
}

void __ubsan_handle_out_of_bounds(const Report* report, uintptr_t index) {
  const std::string got = std::to_string(intptr_t(index));
  fail_at(report, __builtin_return_address(0), "an index must be within its array, got " + got);
}

PPO_HANDLER(add_overflow, "a sum must fit into its integer type, got one that does not")
PPO_HANDLER(sub_overflow, "a difference must fit into its integer type, got one that does not")
PPO_HANDLER(mul_overflow, "a product must fit into its integer type, got one that does not")
PPO_HANDLER(negate_overflow, "a negated number must fit into its integer type, got one that does not")
PPO_HANDLER(divrem_overflow, "a quotient must fit into its integer type, got one that does not or a divisor of 0")
PPO_HANDLER(shift_out_of_bounds, "a shift must be by less than the bits of its type and fit, got one that does not")
PPO_HANDLER(float_cast_overflow, "a number must fit into the integer type it is cast to, got one that does not")
PPO_HANDLER(load_invalid_value, "a bool must be 0 or 1, got another value")
}
