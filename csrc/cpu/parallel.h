// Loops over work items on several threads: a run of loops on threads of this file's own, a loop by itself on those of the OpenMP runtime that
// torch uses, where it is loaded.
#pragma once

#include <cstdint>
#include <functional>

namespace dfe {

// The number of pieces into which parallel_for divides its items at first, one a thread.
int pieces_of(int64_t items, int threads);

// Call body(piece, begin, end) on contiguous parts of [0, items) that together are all of them, from up to `threads` threads, the caller among
// them; return when all are done. 0 <= piece < pieces_of(items, threads); a piece has any number of parts, one after the other, and which
// parts differs from run to run: what an item gives must not depend on it. `body` must not throw, so it must not allocate (scratch for
// pieces_of(items, threads) pieces is made before), nor run loops. Threads may call this at once. Safe after fork(), which leaves the child
// this file's own threads. The caller waits for no part that nobody has begun. `values`: about how many the loop goes through in all; where threads
// would have to be woken for SMALL_LOOP of them or fewer, the caller takes them all, as piece 0.
constexpr int64_t SMALL_LOOP = 1 << 15;
void parallel_for(int64_t items, int threads, const std::function<void(int, int64_t, int64_t)>& body, int64_t values = INT64_MAX);

// Call `work` on this thread, with the other threads standing by for its loops until it returns: between two loops that follow within some
// 50 us they do not sleep, so that an operation of torch's in `work` would share the processors with them. It must not throw. Within `work` of
// another call this is a plain call.
void with_helpers(int threads, const std::function<void()>& work);

}  // namespace dfe
