// Metal as far as the kernels use it, for g++. An address space is a word that says nothing here, but `threadgroup`
// memory is shared by all threads: one threadgroup runs at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "threads.h"

using uint = unsigned;
using std::int64_t;

struct bfloat {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }
};

struct half {
    uint16_t bits;
    operator float() const {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        const float sign = bits >> 15 ? -1.0f : 1.0f;
        if (exponent == 31) return fraction ? __builtin_nanf("") : sign * __builtin_inff();
        return sign * __builtin_ldexpf(exponent ? fraction + 1024 : fraction, (exponent ? exponent : 1) - 25);
    }
};

using bfloat16_t = bfloat;  // as MLX names them
using float16_t = half;

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags memory) { wait_for_threadgroup(memory == mem_flags::mem_threadgroup); }
inline float simd_shuffle_xor(float value, uint16_t mask) { return exchange(value, mask); }
}  // namespace metal

using namespace metal;

#define device
#define constant
#define thread
#define threadgroup static
