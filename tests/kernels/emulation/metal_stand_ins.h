// Metal as far as the kernels use it, for g++. An address space is a word that says nothing here, but `threadgroup`
// memory is shared by all threads: one threadgroup runs at a time.
#pragma once

#include "threads.h"

using uint = unsigned;
using std::int64_t;
using std::uint32_t;

struct bfloat {  // constexpr: a static array of it, which threadgroup memory is here, needs no code to begin with
    uint16_t bits;
    constexpr bfloat() : bits(0) {}
    explicit bfloat(float value) : bits(as_type<uint32_t>(value) >> 16) {}
    operator float() const { return as_type<float>(uint32_t(bits) << 16); }
};

struct half {
    uint16_t bits;
    constexpr half() : bits(0) {}
    explicit half(float value) : bits(half_of_float(value)) {}
    operator float() const { return float_of_half(bits); }
};

using bfloat16_t = bfloat;  // as MLX names them
using float16_t = half;

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void simdgroup_barrier(mem_flags) {}  // orders nothing here: threads of a simdgroup share by shuffles alone
inline void threadgroup_barrier(mem_flags memory) { wait_for_threadgroup(memory == mem_flags::mem_threadgroup); }
inline float simd_shuffle_xor(float value, uint16_t mask) { return exchange(value, mask); }
}  // namespace metal

using namespace metal;

#define device
#define constant
#define thread
#define threadgroup static
