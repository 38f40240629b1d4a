// What the processor has beyond what compilers can be asked for, for the files that are compiled with those instructions.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace dfe {
namespace {

enum CpuidRegister { EAX, EBX, ECX, EDX };

inline bool cpu_has(int leaf, int subleaf, CpuidRegister from, int bit) {
    unsigned registers[4] = {};
    return __get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) && (registers[from] >> bit & 1u);
}

inline bool has_avx512() {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Whether there are tiles, and the system lets this process use them.
inline bool has_tiles() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl: Linux hands out the tiles' state on request
    return cpu_has(7, 0, EDX, 24) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace
}  // namespace dfe
