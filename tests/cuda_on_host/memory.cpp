// memory.cpp: g++ -fsanitize=thread inserts a call before every load and store of the kernels. This file implements
// these calls: it checks with AddressSanitizer, whose allocator provides all of torch's memory, that the bytes are
// allocated, and with races.cpp that no other thread accesses them at the same time. (g++ cannot combine the two
// sanitizers, and ThreadSanitizer's own runtime does not know fibers.)
#include "fibers.h"
#include "layer.h"

extern "C" {
void* __attribute__((weak)) __asan_region_is_poisoned(void* begin, size_t size);
void __attribute__((weak)) __asan_get_shadow_mapping(size_t* scale, size_t* offset);
const char* __attribute__((weak)) __asan_locate_address(void* p, char* name, size_t size, void** region, size_t* bytes);
}

namespace cuda_on_host {
namespace {

constexpr uintptr_t kNullPage = 65536;

// The first byte of the range that is not allocated, or null. AddressSanitizer's shadow memory has one byte for every 8
// bytes; it is 0 where all 8 are allocated.
void* poisoned_byte(uintptr_t address, size_t size) {
  static size_t scale = 0, offset = 0;
  if (offset == 0) __asan_get_shadow_mapping(&scale, &offset);
  const auto state = [](uintptr_t p) { return *reinterpret_cast<const int8_t*>((p >> scale) + offset); };
  if (size <= 16 && state(address) == 0 && state(address + size - 1) == 0) return nullptr;
  return __asan_region_is_poisoned(reinterpret_cast<void*>(address), size);
}

std::string describe_address(void* p) {
  char name[8];
  void* region = nullptr;
  size_t size = 0;
  const std::string kind = __asan_locate_address(p, name, sizeof(name), &region, &size);
  if (kind != "heap") return "memory of the kind " + kind;
  const intptr_t from_begin = static_cast<char*>(p) - static_cast<char*>(region);
  const intptr_t beyond_end = from_begin - intptr_t(size);
  const std::string block = "a heap block of " + std::to_string(size) + " bytes";
  if (from_begin < 0) return std::to_string(-from_begin) + " bytes before " + block;
  if (beyond_end >= 0) return std::to_string(beyond_end) + " bytes beyond the end of " + block;
  return "byte " + std::to_string(from_begin) + " of " + block + " that has been freed";
}

[[noreturn]] void fail_access(size_t size, Access access, const std::string& got, void* pc) {
  fail(std::string(access == Access::load ? "a load" : "a store") + " of " + std::to_string(size) +
           " bytes must touch allocated memory only (AddressSanitizer), got " + got,
       pc);
}

void check(void* p, size_t size, Access access, void* pc) {
  if (!running.in_kernel) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (address - running.stack < kStack) return;  // the thread's own variables
  ++(access == Access::load ? counters.loads : counters.stores);
  counters.vector_accesses += size == 16;
  if (address < kNullPage) fail_access(size, access, "address " + std::to_string(address), pc);
  void* const poisoned = address_sanitizer_is_active() ? poisoned_byte(address, size) : nullptr;
  if (poisoned) fail_access(size, access, describe_address(poisoned), pc);
  if (settings.races) check_order(address, size, access, pc);
}

}  // namespace

bool address_sanitizer_is_active() { return __asan_region_is_poisoned != nullptr; }

void touch_atomically(void* p, size_t size) { check(p, size, Access::atomic, __builtin_return_address(0)); }

}  // namespace cuda_on_host

// ---- what g++ calls ----

using cuda_on_host::Access;
using cuda_on_host::check;

#define PPO_ACCESS(name, size, access) \
  void __tsan_##name(void* p) { check(p, size, Access::access, __builtin_return_address(0)); }
#define PPO_ACCESSES(size)                     \
  PPO_ACCESS(read##size, size, load)           \
  PPO_ACCESS(write##size, size, store)         \
  PPO_ACCESS(unaligned_read##size, size, load) \
  PPO_ACCESS(unaligned_write##size, size, store)

extern "C" {
PPO_ACCESSES(1)
PPO_ACCESSES(2)
PPO_ACCESSES(4)
PPO_ACCESSES(8)
PPO_ACCESSES(16)

void __tsan_read_range(void* p, size_t size) { check(p, size, Access::load, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { check(p, size, Access::store, __builtin_return_address(0)); }

// g++ inserts calls of these as well; they need no check. The atomic addition is torch's reference count, in host code.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
int __tsan_atomic32_fetch_add(volatile int* p, int x, int) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }
}
