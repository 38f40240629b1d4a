// The levels: the sets of instructions for each of which every csrc/cpu/<op>.cpp is compiled (isa.h), the later ones only where the compiler has them.
#pragma once

// Declarations in the namespace of each of them.
#define DFE_DECLARE_AT_LEVELS(...)          \
    namespace base { __VA_ARGS__ }          \
    namespace avx2 { __VA_ARGS__ }          \
    namespace avx512 { __VA_ARGS__ }        \
    namespace avx512_bf16 { __VA_ARGS__ }
