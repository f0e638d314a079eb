// warps.cpp: shuffles, votes and warp barriers. Each lane of the mask waits until all lanes of it have called; the last
// one computes every lane's result. What CUDA leaves undefined is an error.
#include "layer.h"

namespace cuda_on_host {
namespace {

struct Call {
  Intrinsic intrinsic;
  unsigned mask;
  uint64_t value;
  int lane;  // the source lane or the offset to it, depending on the shuffle
  Place place;
};

struct Warp {
  unsigned waiting;  // lanes that have called and wait for their result
  uint16_t interval;
  Call calls[kWarp];
  uint64_t results[kWarp];
};

Warp warps[kMaxThreads / kWarp];

const char* name_of(Intrinsic intrinsic) {
  static const char* const names[] = {"__shfl_sync", "__shfl_down_sync", "__shfl_up_sync", "__shfl_xor_sync",
                                      "__any_sync",  "__all_sync",       "__ballot_sync",  "__syncwarp"};
  return names[int(intrinsic)];
}

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

std::string text_of(const Call& call) {
  return std::string(name_of(call.intrinsic)) + " (" + text_of(call.place) + ") with mask " + hex(call.mask);
}

bool same_call(const Call& a, const Call& b) {
  return a.intrinsic == b.intrinsic && a.mask == b.mask && a.place == b.place;
}

// The lane whose value `lane` receives; `lane` itself if the shift goes past the end of the warp.
int source_of(const Call& call, int lane) {
  const int source = call.intrinsic == Intrinsic::shfl        ? call.lane
                     : call.intrinsic == Intrinsic::shfl_down ? lane + call.lane
                     : call.intrinsic == Intrinsic::shfl_up   ? lane - call.lane
                                                              : lane ^ call.lane;
  return source >= 0 && source < int(kWarp) ? source : lane;
}

unsigned ballot(const Warp& warp, unsigned mask) {
  unsigned result = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1 && warp.calls[lane].value) result |= 1u << lane;
  return result;
}

uint64_t result_of(const Warp& warp, int lane) {
  const Call& call = warp.calls[lane];
  switch (call.intrinsic) {
    case Intrinsic::any:
      return ballot(warp, call.mask) != 0;
    case Intrinsic::all:
      return ballot(warp, call.mask) == call.mask;
    case Intrinsic::ballot:
      return ballot(warp, call.mask);
    case Intrinsic::syncwarp:
      return 0;
    default:
      break;
  }
  const int source = source_of(call, lane);
  if (!(call.mask >> source & 1))
    fail("lane " + std::to_string(lane) + " must read from a lane that the mask names, got lane " +
         std::to_string(source) + " in " + text_of(call));
  return warp.calls[source].value;
}

void answer(Warp& warp, unsigned mask, unsigned first_thread) {
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) warp.results[lane] = result_of(warp, int(lane));
  // All lanes of the warp took part, so this orders their memory accesses as __syncwarp does.
  warp.interval += mask == 0xffffffffu && warp.calls[0].intrinsic == Intrinsic::syncwarp;
  warp.waiting &= ~mask;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1 && first_thread + lane != running.thread) wake(first_thread + lane);
}

}  // namespace

uint64_t call_together(Intrinsic intrinsic, unsigned mask, uint64_t value, int lane, Place place) {
  const unsigned own = running.thread % kWarp;
  Warp& warp = warps[running.thread / kWarp];
  const Call call{intrinsic, mask, value, lane, place};
  if (!(mask >> own & 1))
    fail("the mask must name lane " + std::to_string(own) + ", which calls, got " + text_of(call));
  for (unsigned others = mask & warp.waiting; others; others &= others - 1) {
    const unsigned other = unsigned(__builtin_ctz(others));
    if (!same_call(call, warp.calls[other]))
      fail("all lanes of a mask must make the same call, got " + text_of(warp.calls[other]) + " in lane " +
           std::to_string(other) + " and " + text_of(call) + " in lane " + std::to_string(own));
  }
  warp.calls[own] = call;
  warp.waiting |= 1u << own;
  if (mask & ~warp.waiting) {
    wait_at(name_of(intrinsic), place);
  } else {
    answer(warp, mask, running.thread - own);
  }
  return warp.results[own];
}

void reset_warps() {
  for (Warp& warp : warps) warp.waiting = 0;
}

uint16_t warp_interval(unsigned warp) { return warps[warp].interval; }

std::string describe_stuck_warps() {
  for (const Warp& warp : warps) {
    if (!warp.waiting) continue;
    const Call& call = warp.calls[__builtin_ctz(warp.waiting)];
    return "every lane that the mask names must make the call, got " + text_of(call) + " in lanes " +
           hex(warp.waiting) + " only";
  }
  return "";
}

}  // namespace cuda_on_host
