// The emulated GPU: runs a kernel thread by thread and watches its memory.
//
//   machine THREADGROUPS THREADS forward|backward  (r|w BYTES OFFSET FIRST FILE)...
//
// Each buffer has so many bytes, begins OFFSET bytes beyond a multiple of 16, and is handed to the kernel from FIRST on.
//
// Each thread is a fiber. It runs until it comes to a shuffle, where it waits for its simdgroup, or to a barrier, where
// it waits for its threadgroup; a wait that can never end is an error. Threads run in the order asked for.
//
// The kernel is compiled in one of two ways. With AddressSanitizer, which needs nothing from here but heap buffers of
// the exact size. Or with -fsanitize=thread and, instead of ThreadSanitizer, the functions at the end of this file,
// which the compiler calls at every access to memory: an access is a race where another thread has touched the same
// byte since the last barrier, or is of another threadgroup, and one of the two writes. A shuffle orders nothing.
// Reading what was never written, writing to an input, and accesses outside of all buffers are errors too.

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "threads.h"

extern "C" {
// There only where the kernel is compiled with AddressSanitizer, which must be told where the stack is.
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** saved, const void* stack, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* saved, const void** old_stack, size_t* old_size);
extern char __data_start, _end;  // of the static memory of this program, by the linker
}

namespace {

constexpr unsigned SIMDGROUP = 32;
constexpr size_t STACK = 64 << 10, MOST_BUFFERS = 128;  // Metal binds 31, CUDA more
constexpr long MOST_THREADGROUP_MEMORY = 32 << 10;

[[noreturn]] void fail(const std::string& what) {
    fprintf(stderr, "%s\n", what.c_str());
    _Exit(66);
}

struct Buffer {
    char* start;
    size_t size, first;
    bool writable;
    std::string file;
};

enum State { READY, AT_SHUFFLE, AT_BARRIER, DONE };

struct Fiber {
    ucontext_t context;
    char* stack;
    State state;
    Attributes here;
    unsigned shuffles;  // done so far
    float given[2];     // to the last two: a lane may be one ahead of another
    long barriers;      // passed, of those that order threadgroup memory
};

std::vector<Buffer> buffers;
std::vector<Fiber> fibers;
Fiber* current = nullptr;
ucontext_t scheduler;
const void* scheduler_stack;
size_t scheduler_stack_size;

void leaving(void** saved, const void* stack, size_t size) {
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(saved, stack, size);
}

void arrived(void* saved, const void** old_stack, size_t* old_size) {
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(saved, old_stack, old_size);
}

void run_fiber() {
    arrived(nullptr, &scheduler_stack, &scheduler_stack_size);
    const Attributes here = current->here;  // on the stack, where the kernel may read
    void* handed[MOST_BUFFERS];
    for (size_t i = 0; i < buffers.size(); i++) handed[i] = buffers[i].start + buffers[i].first;
    run_thread(handed, here);
    current->state = DONE;
    leaving(nullptr, scheduler_stack, scheduler_stack_size);
}

void resume(Fiber& fiber) {
    void* saved = nullptr;
    current = &fiber;
    leaving(&saved, fiber.stack, STACK);
    swapcontext(&scheduler, &fiber.context);
    arrived(saved, nullptr, nullptr);
}

void wait_in(State state) {
    Fiber& self = *current;
    void* saved = nullptr;
    self.state = state;
    leaving(&saved, scheduler_stack, scheduler_stack_size);
    swapcontext(&self.context, &scheduler);
    arrived(saved, nullptr, nullptr);
}

// Make the fibers from first on ready if all of them are in that state.
bool release(Fiber* first, size_t count, State state) {
    for (size_t i = 0; i < count; i++)
        if (first[i].state != state) return false;
    for (size_t i = 0; i < count; i++) first[i].state = READY;
    return true;
}

void run_threadgroup(bool backward) {
    for (Fiber& fiber : fibers) {
        fiber.state = READY;
        fiber.shuffles = fiber.barriers = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_fiber, 0);
    }
    const size_t count = fibers.size();
    for (bool finished = false; !finished;) {
        for (size_t i = 0; i < count; i++) {
            Fiber& fiber = fibers[backward ? count - 1 - i : i];
            if (fiber.state == READY) resume(fiber);
        }
        finished = true;
        for (Fiber& fiber : fibers) finished &= fiber.state == DONE;
        if (finished) break;
        bool released = release(&fibers[0], count, AT_BARRIER);
        for (size_t i = 0; i < count; i += SIMDGROUP) released |= release(&fibers[i], SIMDGROUP, AT_SHUFFLE);
        if (!released) fail("deadlock: not every thread comes to the same shuffle or barrier");
    }
}

}  // namespace

Attributes attributes() { return current->here; }

float exchange(float value, unsigned mask) {
    Fiber& self = *current;
    if (mask == 0 || mask >= SIMDGROUP) fail("shuffle: lane " + std::to_string(mask) + " away is in no simdgroup");
    const unsigned turn = self.shuffles++;
    self.given[turn % 2] = value;
    wait_in(AT_SHUFFLE);
    const unsigned lane = self.here.thread_index_in_simdgroup;
    const Fiber& other = (&self)[int(lane ^ mask) - int(lane)];
    return other.given[turn % 2];
}

void wait_for_threadgroup(bool orders_threadgroup_memory) {
    wait_in(AT_BARRIER);
    current->barriers += orders_threadgroup_memory;
}

namespace {

// The threads that touched a byte last, and how many barriers they had passed. Threads are numbered through the grid.
struct Touched {
    long writer = -1, writer_barriers = 0;
    long reader = -1, reader_barriers = 0;
    bool by_several = false;  // read, after the same barrier
};

std::unordered_map<const char*, Touched> device_memory, threadgroup_memory;
const char *lowest = &_end, *highest = &__data_start;  // of all that was touched in threadgroup memory

std::string said(const char* does, const std::string& what) {  // at a fault alone: there are millions of accesses
    return "thread " + std::to_string(current->here.thread_position_in_grid.x) + does + what;
}

void touch_byte(Touched& byte, bool write, long barriers, const char* memory) {
    const long self = current->here.thread_position_in_grid.x;
    const bool written = byte.writer != -1 && byte.writer != self && byte.writer_barriers == barriers;
    const bool read = byte.reader != -1 && (byte.reader != self || byte.by_several) && byte.reader_barriers == barriers;
    const char* does = write ? " writes " : " reads ";
    if (written)
        fail("data race: " + said(does, memory) + " that thread " + std::to_string(byte.writer) + " has written");
    if (read && write) fail("data race: " + said(does, memory) + " that another thread has read");
    if (byte.writer == -1 && !write) fail("never written: " + said(does, memory));
    if (write) {
        byte.writer = self, byte.writer_barriers = barriers;
    } else {
        byte.reader = self, byte.reader_barriers = barriers, byte.by_several = read;
    }
}

void touch(const char* address, size_t size, bool write) {
    const char* end = address + size;
    if (address >= current->stack && end <= current->stack + STACK) return;
    for (const Buffer& buffer : buffers) {
        if (address < buffer.start || end > buffer.start + buffer.size) continue;
        if (write && !buffer.writable) fail("read only: " + said(" writes ", "an input"));
        // No barrier stands between two threadgroups, and none orders device memory here.
        for (; buffer.writable && address < end; address++)
            touch_byte(device_memory[address], write, 0, "device memory");
        return;
    }
    if (address < &__data_start || end > &_end)
        fail("out of bounds: " + said(write ? " writes " : " reads ", "what is in no buffer"));
    lowest = std::min(lowest, address);
    highest = std::max(highest, end);
    if (highest - lowest > MOST_THREADGROUP_MEMORY) fail("more than 32 KB of threadgroup memory");
    for (; address < end; address++)
        touch_byte(threadgroup_memory[address], write, current->barriers, "threadgroup memory");
}

}  // namespace

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(size)                                                                           \
    void __tsan_read##size(void* address) { touch((const char*)address, size, false); }            \
    void __tsan_write##size(void* address) { touch((const char*)address, size, true); }            \
    void __tsan_unaligned_read##size(void* address) { touch((const char*)address, size, false); }  \
    void __tsan_unaligned_write##size(void* address) { touch((const char*)address, size, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_read_range(void* address, size_t size) { touch((const char*)address, size, false); }
void __tsan_write_range(void* address, size_t size) { touch((const char*)address, size, true); }
}

int main(int, char** arguments) {
    const unsigned groups = atoi(arguments[1]), threads = atoi(arguments[2]);
    const bool backward = std::string(arguments[3]) == "backward";
    for (char** argument = arguments + 4; *argument; argument += 5) {
        const size_t size = atol(argument[1]), offset = atol(argument[2]), first = atol(argument[3]);
        Buffer buffer{(char*)malloc(offset + size) + offset, size, first, argument[0][0] == 'w', argument[4]};
        memset(buffer.start, 0xff, size);  // NaN: what the kernel does not write is seen
        if (!buffer.writable) {
            FILE* file = fopen(argument[4], "rb");
            if (!file || fread(buffer.start, 1, size, file) != size) fail("cannot read " + buffer.file);
            fclose(file);
        }
        buffers.push_back(buffer);
    }
    if (buffers.size() > MOST_BUFFERS) fail("more buffers than MOST_BUFFERS");
    fibers.resize(threads);
    for (Fiber& fiber : fibers) fiber.stack = (char*)malloc(STACK);
    for (unsigned i = 0; i < groups; i++) {
        const unsigned group = backward ? groups - 1 - i : i;
        for (unsigned j = 0; j < threads; j++) {
            Attributes& here = fibers[j].here;
            here.simdgroup_index_in_threadgroup = j / SIMDGROUP;
            here.thread_index_in_simdgroup = j % SIMDGROUP;
            here.simdgroups_per_threadgroup = threads / SIMDGROUP;
            here.thread_index_in_threadgroup = j;
            here.thread_position_in_grid = {group * threads + j, 0, 0};
            here.thread_position_in_threadgroup = {j, 0, 0};
            here.threadgroup_position_in_grid = {group, 0, 0};
            here.threadgroups_per_grid = {groups, 1, 1};
            here.threads_per_grid = {groups * threads, 1, 1};
            here.threads_per_threadgroup = {threads, 1, 1};
        }
        threadgroup_memory.clear();
        run_threadgroup(backward);
    }
    for (const Buffer& buffer : buffers) {
        if (!buffer.writable) continue;
        FILE* file = fopen(buffer.file.c_str(), "wb");
        if (!file || fwrite(buffer.start, 1, buffer.size, file) != buffer.size || fclose(file))
            fail("cannot write " + buffer.file);
    }
    fflush(nullptr);
    _Exit(0);  // no search for leaks
}
