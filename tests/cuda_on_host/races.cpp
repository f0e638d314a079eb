// races.cpp: finds data races. For each byte it keeps the last store and the loads since then. Two accesses of one byte
// by different threads, at least one of them a store, must be separated by a barrier, even if this run ordered them
// correctly.
#include <sys/mman.h>

#include <unordered_map>

#include "layer.h"

namespace cuda_on_host {
namespace {

// An access: the thread, and between which barriers of its block and of its warp it happened (their interval numbers).
struct Mark {
  uint32_t interval;
  uint16_t thread, warp_interval;
};
constexpr uint16_t kThread = kMaxThreads - 1, kSeveralWarps = 1 << 13, kSeveralLanes = 1 << 14, kAtomic = 1 << 15;

struct Byte {
  Mark store, load;
};

constexpr uintptr_t kPage = 4096;
constexpr size_t kMostPages = 65536, kUsualPages = 4096;  // at most 256 MiB of tensors, usually 16 MiB

// ---- the table of bytes ----

std::unordered_map<uintptr_t, Byte*> pages;
Byte* table = nullptr;
constexpr size_t kTableBytes = kMostPages * kPage * sizeof(Byte);  // address space; pages become real when first used

struct Recent {
  uintptr_t page;
  Byte* bytes;
} recent[64];

void forget_all() {
  if (table) madvise(table, kTableBytes, MADV_DONTNEED);
  pages.clear();
  std::fill(std::begin(recent), std::end(recent), Recent{});
}

Byte* find_page(uintptr_t page) {
  Recent& slot = recent[page % 64];
  if (slot.page == page) return slot.bytes;
  if (!table) {
    constexpr int kProtection = PROT_READ | PROT_WRITE, kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const p = mmap(nullptr, kTableBytes, kProtection, kFlags, -1, 0);
    if (p == MAP_FAILED) fail("the table of accesses must fit into memory, got no room for it");
    table = static_cast<Byte*>(p);
  }
  if (pages.size() == kMostPages)
    forget_all();  // too many pages: accesses so far are forgotten, so races with them are missed
  Byte*& bytes = pages[page];
  if (!bytes) bytes = table + (pages.size() - 1) * kPage;
  slot = {page, bytes};
  return bytes;
}

// ---- order ----

// The first interval of the block that last saw another block's atomic access: that block may read what the other
// wrote.
uint32_t passed_on_to = 0;

// Whether no barrier orders the two accesses.
bool is_unordered(const Mark& other, const Mark& mine, bool shared) {
  if (other.interval < running.grid_began) return false;
  if (other.interval < running.block_began) return !shared && passed_on_to != running.block_began;
  if (other.interval < mine.interval) return false;
  const unsigned thread = other.thread & kThread;
  if (other.thread & kSeveralWarps || thread / kWarp != mine.thread / kWarp) return true;
  if (other.warp_interval != mine.warp_interval) return false;
  return thread != mine.thread || other.thread & kSeveralLanes;
}

Mark add_load(const Mark& before, const Mark& mine) {
  if (before.interval != mine.interval) return mine;
  const unsigned thread = before.thread & kThread;
  if (thread / kWarp != mine.thread / kWarp || before.thread & kSeveralWarps) return {mine.interval, kSeveralWarps, 0};
  if (before.warp_interval != mine.warp_interval) return mine;
  const bool several = thread != mine.thread || before.thread & kSeveralLanes;
  return {mine.interval, uint16_t(mine.thread | (several ? kSeveralLanes : 0)), mine.warp_interval};
}

std::string owner_of(const Mark& mark) {
  if (mark.interval < running.block_began) return "another block";
  return mark.thread & kSeveralWarps ? "several warps" : "thread " + std::to_string(mark.thread & kThread);
}

std::string describe(uintptr_t address, size_t size, Access access, const std::string& other) {
  const char* const kinds[] = {"a load", "a store", "an atomic update"};
  return std::string(kinds[int(access)]) + " of " + std::to_string(size) + " bytes of " +
         (is_shared(address) ? "shared" : "global") + " memory must be separated by a barrier from the " + other +
         ", got none";
}

}  // namespace

void check_order(uintptr_t address, size_t size, Access access, void* pc) {
  const bool atomic = access == Access::atomic;
  const bool shared = is_shared(address);
  const Mark mine{running.interval, uint16_t(running.thread), warp_interval(running.thread / kWarp)};
  for (uintptr_t p = address; p < address + size; ++p) {
    Byte& byte = find_page(p / kPage)[p % kPage];
    const bool both_atomic = atomic && byte.store.thread & kAtomic;
    const bool of_this_grid = byte.store.interval >= running.grid_began;
    if (both_atomic && of_this_grid && byte.store.interval < running.block_began) passed_on_to = running.block_began;
    if (!both_atomic && is_unordered(byte.store, mine, shared)) {
      const char* const kind = byte.store.thread & kAtomic ? "atomic update of " : "store of ";
      fail(describe(address, size, access, kind + owner_of(byte.store)), pc);
    }
    if (access == Access::load) {
      byte.load = add_load(byte.load, mine);
      continue;
    }
    if (is_unordered(byte.load, mine, shared))
      fail(describe(address, size, access, "load of " + owner_of(byte.load)), pc);
    byte.store = {mine.interval, uint16_t(mine.thread | (atomic ? kAtomic : 0)), mine.warp_interval};
  }
}

void forget_accesses() {
  if (pages.size() > kUsualPages) forget_all();
}

}  // namespace cuda_on_host
