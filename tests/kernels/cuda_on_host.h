// Stands in for CUDA when a .cu file of csrc/cuda is compiled as C++: a block's threads are coroutines, one block after the other, so
// that the kernel's own index and arithmetic code runs, shared memory, barriers and warp shuffles included. A warp runs as far ahead of the others as
// the barriers of the block allow.
//
// host_launch(name, grid, block, shared bytes, arguments, reversed) runs a kernel named in DFE_KERNEL; arguments as for cudaLaunchKernel. With
// `reversed` warps and threads take their turns in the opposite order: a result that depends on it betrays a missing barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define DFE_HOST
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__
#define __align__(BYTES) alignas(BYTES)
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

static dim3 gridDim, blockIdx, blockDim, threadIdx;
static constexpr int warpSize = 32;

namespace on_host {

enum class State { ready, at_warp, at_block, done };

struct Thread {
    ucontext_t context;  // where it starts
    jmp_buf place;       // where it waits: unlike swapcontext, a jump asks nothing of the operating system
    bool started;
    std::vector<char> stack;
    State state;
    dim3 index;
};

static std::vector<Thread> threads;
static Thread* running;
static jmp_buf scheduler;
static std::vector<uint64_t> exchanged;  // by shuffles: a slot for each thread
static std::vector<unsigned char> dynamic_shared;
static unsigned shared_bytes;  // of the launch
static constexpr unsigned MARGIN = 4096;  // behind them, to see that nothing is written there
static void (*body)(void**);
static void** body_arguments;

inline void wait(State state) {
    running->state = state;
    if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Thread& thread) {
    running = &thread;
    threadIdx = thread.index;
    if (_setjmp(scheduler) != 0) return;
    if (running->started) _longjmp(running->place, 1);
    running->started = true;
    setcontext(&running->context);
}

inline void start_tensor_core_block();
inline void start_warpgroup_block();

inline size_t number(const Thread& thread) { return static_cast<size_t>(&thread - threads.data()); }

inline void thread_main() {
    body(body_arguments);
    wait(State::done);
}

// Lets the threads of [begin, end) go on where all that are not done wait in `state`; whether there are any.
inline bool release(size_t begin, size_t end, State state) {
    bool any = false;
    for (size_t i = begin; i < end; ++i) {
        if (threads[i].state == State::done) continue;
        if (threads[i].state != state) return false;
        any = true;
    }
    for (size_t i = begin; any && i < end; ++i) {
        if (threads[i].state == state) threads[i].state = State::ready;
    }
    return any;
}

inline void run_block(bool reversed) {
    const size_t count = threads.size();
    start_tensor_core_block();
    start_warpgroup_block();
    for (size_t i = 0; i < count; ++i) {
        Thread& thread = threads[i];
        thread.state = State::ready;
        thread.started = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, thread_main, 0);
    }
    const size_t warps = (count + 31) / 32;
    for (;;) {
        bool left = false;
        for (size_t k = 0; k < warps; ++k) {
            const size_t begin = 32 * (reversed ? warps - 1 - k : k), end = begin + 32 < count ? begin + 32 : count;
            do {
                for (size_t i = begin; i < end; ++i) {
                    Thread& thread = threads[reversed ? begin + end - 1 - i : i];
                    if (thread.state == State::ready) resume(thread);
                }
            } while (release(begin, end, State::at_warp));
            for (size_t i = begin; i < end; ++i) left = left || threads[i].state != State::done;
        }
        if (!left) return;
        if (!release(0, count, State::at_block)) {
            std::fprintf(stderr, "cuda_on_host: threads wait at different barriers\n");
            std::abort();
        }
    }
}

template <typename T>
T shuffle(T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
    const size_t mine = number(*running), warp = mine / 32 * 32;
    memcpy(&exchanged[mine], &value, sizeof value);
    wait(State::at_warp);
    if (from < 32 && warp + from < threads.size()) memcpy(&value, &exchanged[warp + from], sizeof value);
    wait(State::at_warp);
    return value;
}

inline unsigned lane() { return static_cast<unsigned>(number(*running) % 32); }

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
}

template <typename... A>
void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>{});
}

// Not inline: the map would be one for all libraries of the process.
static std::map<std::string, void (*)(void**)>& kernels() {
    static std::map<std::string, void (*)(void**)> found;
    return found;
}

struct Registered {
    Registered(const char* name, void (*run)(void**)) { kernels()[name] = run; }
};

}  // namespace on_host

#define DFE_KERNEL(NAME) static const on_host::Registered registered_##NAME{#NAME, [](void** arguments) { on_host::call(NAME, arguments); }};
#define DFE_DYNAMIC_SHARED(TYPE, NAME) TYPE* const NAME = reinterpret_cast<TYPE*>(on_host::dynamic_shared.data())

static inline void __syncthreads() { on_host::wait(on_host::State::at_block); }
static inline void __syncwarp(unsigned = ~0u) { on_host::wait(on_host::State::at_warp); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) { return on_host::shuffle(value, static_cast<unsigned>(lane)); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) { return on_host::shuffle(value, on_host::lane() ^ static_cast<unsigned>(mask)); }
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) { return on_host::shuffle(value, on_host::lane() + delta); }
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) { return on_host::shuffle(value, on_host::lane() - delta); }
template <typename T>
T __ldg(const T* address) { return *address; }
static inline int atomicAdd(int* address, int value) { return *address += value, *address - value; }

#include "tensor_core_on_host.h"
#include "wgmma_on_host.h"

// 0 where done, 1 where no kernel has the name.
extern "C" int host_launch(const char* name, const unsigned* grid, const unsigned* block, unsigned shared, void** arguments, int reversed) {
    using namespace on_host;
    const auto found = kernels().find(name);
    if (found == kernels().end()) return 1;
    body = found->second;
    body_arguments = arguments;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const size_t count = size_t{block[0]} * block[1] * block[2];
    threads.resize(count);
    exchanged.assign(count, 0);
    for (size_t i = 0; i < count; ++i) {
        const unsigned n = static_cast<unsigned>(i);
        threads[i].index = {n % block[0], n / block[0] % block[1], n / (block[0] * block[1])};
        if (threads[i].stack.empty()) threads[i].stack.resize(64 * 1024);
    }
    for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) {
                shared_bytes = shared;
                dynamic_shared.assign(shared + MARGIN, 0xff);  // not a number, in every float type
                run_block(reversed != 0);
                for (unsigned i = shared; i < shared + MARGIN; ++i) {
                    if (dynamic_shared[i] == 0xff) continue;
                    std::fprintf(stderr, "cuda_on_host: written past %u bytes of shared memory\n", shared);
                    std::abort();
                }
            }
    return 0;
}
