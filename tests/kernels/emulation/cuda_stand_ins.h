// CUDA as far as the kernels use it, for g++. One block runs at a time, so `__shared__` memory may be static.
#pragma once

#include <cstddef>

#include "threads.h"

using std::int32_t;
using std::int64_t;
using std::uint32_t;

struct __nv_bfloat16 {
    uint16_t bits;
    constexpr __nv_bfloat16() : bits(0) {}
    explicit __nv_bfloat16(float value) : bits(as_type<uint32_t>(value) >> 16) {}
    operator float() const { return as_type<float>(uint32_t(bits) << 16); }
};

struct __half {
    uint16_t bits;
    constexpr __half() : bits(0) {}
    explicit __half(float value) : bits(half_of_float(value)) {}
    operator float() const { return float_of_half(bits); }
};

inline uint32_t __float_as_uint(float value) { return as_type<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return as_type<float>(bits); }

template <typename Number>
struct PerAxis {  // by value, as MLX passes shapes and strides
    Number numbers[8];
    Number operator[](int axis) const { return numbers[axis]; }
};
using Shape = PerAxis<int32_t>;
using Strides = PerAxis<int64_t>;

#define __global__
#define __device__
#define __grid_constant__
#define __shared__ static
inline uint3 index_in_block() { return attributes().thread_position_in_threadgroup; }
inline uint3 index_of_block() { return attributes().threadgroup_position_in_grid; }
inline uint3 size_of_block() { return attributes().threads_per_threadgroup; }
#define threadIdx index_in_block()
#define blockIdx index_of_block()
#define blockDim size_of_block()

inline void __syncthreads() { wait_for_threadgroup(true); }
inline void __syncwarp() {}  // as of simdgroup_barrier in metal_stand_ins.h
inline float __shfl_xor_sync(unsigned, float value, int mask) { return exchange(value, mask); }
