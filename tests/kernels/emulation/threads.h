// What a kernel sees of the emulated GPU: where its thread stands, shuffles and barriers. Defined in machine.cpp.
#pragma once

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
