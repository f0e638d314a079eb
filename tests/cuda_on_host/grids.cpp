// grids.cpp: every thread of a block is a fiber, and one fiber runs at a time. At a barrier or shuffle the ready thread
// of highest priority continues. The seed draws new priorities at the start of each block and at each block barrier, so
// that some threads run as far ahead of the others as the barriers allow (probabilistic concurrency testing, Burckhardt
// et al., 2010).
#include <cstdio>
#include <mutex>
#include <numeric>
#include <vector>

#include "fibers.h"
#include "layer.h"

extern "C" void __attribute__((weak)) __sanitizer_symbolize_pc(void* pc, const char* format, char* text, size_t size);

namespace cuda_on_host {

Settings settings = [] {
  Settings from_environment;
  if (const char* const seed = std::getenv("CUDA_ON_HOST_SEED")) from_environment.seed = unsigned(std::atoi(seed));
  return from_environment;
}();
Counters counters;
Running running;

namespace {

enum class State { ready, waiting, ended };

struct Fiber {
  Stack stack;
  State state;
  const char* waits_at;
  Place place;
};

struct Error {
  std::string sentence;
  void* pc;
  std::string line;
};

struct Grid {
  const char* op;
  const std::function<void()>* kernel;
  std::mt19937 random;
  unsigned ended, at_barrier;  // threads of the running block
  Place barrier;
  bool failed;
  Error error;
};

std::vector<Fiber> fibers;
Stack main_stack;
Grid grid;

// ---- order ----

unsigned order[kMaxThreads], place_of[kMaxThreads];  // thread by priority, and priority by thread
uint64_t ready[kMaxThreads / 64];                    // one bit per thread, indexed by priority

void set_ready(unsigned thread) { ready[place_of[thread] / 64] |= uint64_t(1) << place_of[thread] % 64; }
void clear_ready(unsigned thread) { ready[place_of[thread] / 64] &= ~(uint64_t(1) << place_of[thread] % 64); }

// The ready thread of highest priority, or -1 if no thread is ready.
int first_ready() {
  for (unsigned i = 0; i < kMaxThreads / 64; ++i)
    if (ready[i]) return int(order[i * 64 + unsigned(__builtin_ctzll(ready[i]))]);
  return -1;
}

void shuffle_numbers(unsigned* numbers, unsigned count) {
  std::iota(numbers, numbers + count, 0u);
  for (unsigned i = count; i > 1; --i) std::swap(numbers[i - 1], numbers[grid.random() % i]);
}

// Draws new priorities, in shuffled order: either whole warps one after another, or one lane of all warps after
// another. Call it only while no thread is ready.
void draw_order() {
  const unsigned threads = running.threads, count = (threads + kWarp - 1) / kWarp;
  unsigned warps[kMaxThreads / kWarp], lanes[kWarp], next = 0;
  shuffle_numbers(warps, count);
  shuffle_numbers(lanes, kWarp);
  const bool by_warp = grid.random() % 2;
  for (unsigned i = 0; i < count * kWarp; ++i) {
    const unsigned warp = warps[by_warp ? i / kWarp : i % count], lane = lanes[by_warp ? i % kWarp : i / count];
    const unsigned thread = warp * kWarp + lane;
    if (thread >= threads) continue;
    place_of[thread] = next;
    order[next++] = thread;
  }
}

// ---- turns ----

void become(unsigned thread) {
  running.thread = thread;
  running.stack = reinterpret_cast<uintptr_t>(fibers[thread].stack.bottom);
}

void leave_kernel() {
  running.in_kernel = false;
  switch_stacks(fibers[running.thread].stack, main_stack);
}

std::string text_of(const Fiber& fiber) {
  if (fiber.state == State::ended) return "has ended";
  return std::string("waits at ") + fiber.waits_at + " (" + text_of(fiber.place) + ")";
}

// The error text for a deadlock: why the threads that have not ended all wait.
std::string describe_stuck() {
  if (grid.at_barrier == 0) return describe_stuck_warps();
  unsigned missing = 0;
  while (fibers[missing].state != State::ended && fibers[missing].waits_at == std::string("__syncthreads")) ++missing;
  return "every thread must reach the __syncthreads at " + text_of(grid.barrier) + ", got " +
         std::to_string(grid.at_barrier) + " of " + std::to_string(running.threads) + " there, while thread " +
         std::to_string(missing) + " " + text_of(fibers[missing]);
}

// Switches to the ready thread of highest priority; returns when the calling thread is chosen again.
void pass_turn() {
  Fiber& from = fibers[running.thread];
  const int next = first_ready();
  if (next == int(running.thread)) return;
  if (next >= 0) {
    ++counters.switches;
    become(unsigned(next));
    switch_stacks(from.stack, fibers[unsigned(next)].stack);
  } else if (grid.ended == running.threads) {
    leave_kernel();
  } else {
    fail(describe_stuck());
  }
}

void run_fiber() {
  arrive_first();
  for (;;) {  // once for each block
    (*grid.kernel)();
    fibers[running.thread].state = State::ended;
    clear_ready(running.thread);
    ++grid.ended;
    pass_turn();
  }
}

void provide_fibers(unsigned threads) {
  while (fibers.size() < threads) {
    fibers.push_back({new_stack(), State::ended, nullptr, {}});
    prepare(fibers.back().stack, run_fiber);
  }
}

// ---- blocks ----

void run_block(unsigned block) {
  running.block = block;
  running.block_began = ++running.interval;
  grid.ended = grid.at_barrier = 0;
  ++counters.blocks;
  poison_shared(grid.random() % 2);
  reset_warps();
  draw_order();
  for (unsigned t = 0; t < running.threads; ++t) wake(t);
  become(unsigned(first_ready()));
  running.in_kernel = true;
  leave_main_stack(main_stack, fibers[running.thread].stack);
}

// The source lines of the code at `pc`, with inlined calls from the innermost to the outermost, as AddressSanitizer
// reports them. Lines outside csrc/, such as those of torch's headers, are recognized by their absolute paths and left
// out.
std::string lines_of(void* pc) {
  if (!pc || !__sanitizer_symbolize_pc) return "";
  char frames[4096] = "";  // strings that end in a zero byte; an empty one ends the list
  __sanitizer_symbolize_pc(pc, "%S", frames, sizeof(frames) - 1);
  std::string result;
  for (const char* frame = frames; *frame; frame += std::strlen(frame) + 1)
    if (*frame != '/') result += (result.empty() ? "" : ", called at ") + std::string(frame);
  return result;
}

[[noreturn]] void throw_error() {
  for (Fiber& fiber : fibers) prepare(fiber.stack, run_fiber);  // the fibers of a failed grid start anew
  std::fill(std::begin(ready), std::end(ready), 0);
  const std::string lines = lines_of(grid.error.pc), where = lines.empty() ? grid.error.line : lines;
  throw KernelError(std::string(grid.op) + ", block " + std::to_string(running.block) + ", thread " +
                    std::to_string(running.thread) + ": " + grid.error.sentence +
                    (where.empty() ? "" : " (" + where + ")"));
}

// Calls run_block for each block, in an order that the seed draws.
void run_blocks(unsigned blocks) {
  const uint64_t begin = grid.random() % blocks;
  uint64_t step = 1 + grid.random() % blocks;
  while (std::gcd(step, uint64_t(blocks)) != 1) ++step;
  for (uint64_t i = 0; i < blocks; ++i) {
    run_block(unsigned((begin + i * step) % blocks));
    if (grid.failed) throw_error();
  }
}

void require(const char* op, const char* what, int64_t got, int64_t most) {
  if (got >= 1 && got <= most) return;
  throw KernelError(std::string(op) + ": " + what + " must be between 1 and " + std::to_string(most) + ", got " +
                    std::to_string(got));
}

}  // namespace

unsigned thread_index() { return running.thread; }
unsigned block_index() { return running.block; }
unsigned block_size() { return running.threads; }
unsigned grid_size() { return running.blocks; }
int64_t max_blocks() { return settings.max_blocks; }

std::string text_of(Place place) {
  const char* name = std::strrchr(place.file, '/');
  return std::string(name ? name + 1 : place.file) + ":" + std::to_string(place.line);
}

void wait_at(const char* what, Place place) {
  Fiber& fiber = fibers[running.thread];
  fiber.state = State::waiting;
  fiber.waits_at = what;
  fiber.place = place;
  clear_ready(running.thread);
  pass_turn();
}

void wake(unsigned thread) {
  fibers[thread].state = State::ready;
  set_ready(thread);
}

void fail(const std::string& sentence, void* pc, const std::string& line) {
  if (!running.in_kernel) {
    std::fprintf(stderr, "cuda_on_host: %s\n", sentence.c_str());
    std::abort();
  }
  grid.failed = true;
  grid.error = {sentence, pc, line};
  leave_kernel();
  __builtin_unreachable();
}

void block_barrier(Place place) {
  if (grid.at_barrier == 0) grid.barrier = place;
  if (!(grid.barrier == place))
    fail("every thread must reach the same __syncthreads, got " + text_of(grid.barrier) + " and " + text_of(place));
  if (++grid.at_barrier < running.threads) return wait_at("__syncthreads", place);
  grid.at_barrier = 0;
  ++running.interval;
  clear_ready(running.thread);
  draw_order();
  for (unsigned t = 0; t < running.threads; ++t) wake(t);
  pass_turn();
}

void run_on_host(const char* op, int64_t blocks, int threads, const std::function<void()>& kernel) {
  static std::mutex one_grid;
  const std::lock_guard<std::mutex> lock(one_grid);
  require(op, "the blocks of a grid", blocks, settings.max_blocks);
  require(op, "the threads of a block", threads, kMaxThreads);
  provide_fibers(unsigned(threads));
  forget_accesses();
  ++counters.grids;
  grid = {op, &kernel, std::mt19937(settings.seed), 0, 0, {}, false, {}};
  running.blocks = unsigned(blocks);
  running.threads = unsigned(threads);
  running.grid_began = running.interval + 1;
  run_blocks(unsigned(blocks));
  const size_t shared_bytes = written_shared_bytes();
  counters.shared_bytes = std::max(counters.shared_bytes, shared_bytes);
  if (shared_bytes > kMaxSharedBytes) require(op, "the bytes of shared memory", int64_t(shared_bytes), kMaxSharedBytes);
}

}  // namespace cuda_on_host
