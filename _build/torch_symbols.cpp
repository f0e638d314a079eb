// torch_symbols.cpp: functions of libtorch that jump to those of the torch that Python has imported.
//
// A library that names libtorch as one that it needs is bound to this one, which no Linux brings, so that it is no
// library of manylinux_2_28. All that ours takes from libtorch are functions of its stable C interface. Each is defined
// here under its own name, hidden from everybody else; what they jump to is looked up before anything else of the library
// runs. ppo_torch_symbols.inc, which the build writes, has a line SYMBOL(index, name) for each.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__)
#define JUMP(index) "  jmp *ppo_torch_addresses+8*" index "(%rip)\n"
#elif defined(__aarch64__)
#define JUMP(index)                                      \
  "  adrp x16, ppo_torch_addresses+8*" index             \
  "\n"                                                   \
  "  ldr x16, [x16, #:lo12:ppo_torch_addresses+8*" index \
  "]\n"                                                  \
  "  br x16\n"
#else
#error "manylinux wheels are built for x86_64 and aarch64; build without PPO_EXT_MANYLINUX=1"
#endif

#define SYMBOL(index, name) \
  __asm__(".text\n.globl " #name "\n.hidden " #name "\n.type " #name ", %function\n" #name ":\n" JUMP(#index));
#include "ppo_torch_symbols.inc"
#undef SYMBOL

#define SYMBOL(index, name) #name,
static const char* const names[] = {
#include "ppo_torch_symbols.inc"
};
#undef SYMBOL

constexpr int kSymbols = sizeof(names) / sizeof(names[0]);

extern "C" {
__attribute__((visibility("hidden"))) void* ppo_torch_addresses[kSymbols];
}

// The lowest priority that a program may take, and so the first: registering the operators calls these functions.
__attribute__((constructor(101))) static void find_torch() {
  void* const torch = dlopen("libtorch.so", RTLD_LAZY | RTLD_NOLOAD);
  for (int i = 0; i < kSymbols; ++i) {
    ppo_torch_addresses[i] = torch ? dlsym(torch, names[i]) : nullptr;
    if (ppo_torch_addresses[i]) continue;
    // a library cannot refuse to be loaded; ppo_ext has asked for the version of torch before
    std::fprintf(stderr, "ppo_ext: import a torch that has %s before this library is loaded\n", names[i]);
    std::abort();
  }
}
