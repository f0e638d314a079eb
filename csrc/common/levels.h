// levels.h: chooses among the copies of <op>_simd.cpp, which is compiled for several instruction sets (levels).
#pragma once

#include <cstdlib>

// X(namespace) for each copy. Code for a newer machine must not run on an older one, but of an inline function that
// several copies contain the linker keeps one for all of them. So these files include no torch but its 16-bit numbers,
// and the copy for the oldest machines is linked first, as the linker keeps what it finds first.
#if defined(__x86_64__) && !defined(PPO_EXT_ONE_LEVEL)
#define PPO_FOR_EACH_LEVEL(X) X(v4) X(v3) X(base)
#else
#define PPO_FOR_EACH_LEVEL(X) X(base)
#endif

// function(arguments...) of the level in use.
#if defined(__x86_64__) && !defined(PPO_EXT_ONE_LEVEL)
#define PPO_AT_LEVEL(function, ...)                       \
  (cpu_level() == Level::v4   ? v4::function(__VA_ARGS__) \
   : cpu_level() == Level::v3 ? v3::function(__VA_ARGS__) \
                              : base::function(__VA_ARGS__))
#else
#define PPO_AT_LEVEL(function, ...) base::function(__VA_ARGS__)
#endif

namespace ppo_ext {

enum class Level { base, v3, v4 };  // x86-64 itself, x86-64-v3 (AVX2, FMA), x86-64-v4 (AVX-512)

inline Level best_level() {
#if defined(__x86_64__)
  const auto has_v3 = [] {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  };
  const auto has_v4 = [] {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  };
  if (has_v3()) return has_v4() ? Level::v4 : Level::v3;
#endif
  return Level::base;
}

// The best level of this machine. PPO_EXT_CPU_LEVEL=3 or 1 chooses a lower one, to test the other copies.
inline Level cpu_level() {
  static const Level level = [] {
    const char* wanted = std::getenv("PPO_EXT_CPU_LEVEL");
    const Level most = wanted && *wanted == '1' ? Level::base : wanted && *wanted == '3' ? Level::v3 : Level::v4;
    const Level best = best_level();
    return most < best ? most : best;
  }();
  return level;
}

}  // namespace ppo_ext
