// What a kernel sees of the emulated GPU: where its thread stands, shuffles and barriers. Defined in machine.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// For float as for double, as Metal and CUDA have them: C's own take doubles alone.
using std::fabs;
using std::floor;
using std::sqrt;

template <typename To, typename From>
To as_type(From from) {  // the same 32 bits
    static_assert(sizeof(To) == sizeof(From), "as_type");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

inline float float_of_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? __builtin_nanf("") : sign * __builtin_inff();
    return sign * __builtin_ldexpf(exponent ? fraction + 1024 : fraction, (exponent ? exponent : 1) - 25);
}

// Of a value that float16 holds, or one beyond: a kernel rounds before. Any other is cut off, which shows.
inline uint16_t half_of_float(float value) {
    const uint16_t sign = as_type<uint32_t>(value) >> 16 & 0x8000;
    if (value != value) return sign | 0x7e00;
    const float magnitude = fabsf(value);
    if (magnitude >= 65536.0f) return sign | 0x7c00;
    if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(magnitude * 0x1p24f);
    return sign | static_cast<uint16_t>((as_type<uint32_t>(magnitude) >> 13) - (112 << 10));
}

struct uint3 {
    unsigned x, y, z;
};

// By Metal's names, and with Metal's types, so that a signature that asks for another type does not compile.
struct Attributes {
    unsigned simdgroup_index_in_threadgroup;
    unsigned thread_index_in_simdgroup;
    unsigned simdgroups_per_threadgroup;
    unsigned thread_index_in_threadgroup;
    uint3 thread_position_in_grid;
    uint3 thread_position_in_threadgroup;
    uint3 threadgroup_position_in_grid;
    uint3 threadgroups_per_grid;
    uint3 threads_per_grid;
    uint3 threads_per_threadgroup;
};

Attributes attributes();                     // of the thread that asks
float exchange(float value, unsigned mask);  // the value of the lane whose number differs by the bits of mask
void wait_for_threadgroup(bool orders_threadgroup_memory);

// The kernel, in one thread. The buffers stand in the order of the signature.
void run_thread(void** buffers, const Attributes& here);
