// levels.h: <op>_simd.cpp is compiled once for each of several instruction sets; the machine's best is chosen here.
#pragma once

#include <cstdlib>

// The namespaces that hold the copies. One that is compiled for a newer machine must not be entered on an older one, so
// these files include nothing whose inline functions could be merged with another copy's.
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

// PPO_EXT_CPU_LEVEL=3 or 1 uses less than the machine has, to test the other copies.
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
