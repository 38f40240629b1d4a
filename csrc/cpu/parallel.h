// A loop over work items on a small persistent set of threads: those of the OpenMP runtime that torch uses, where it is loaded.
#pragma once

#include <cstdint>
#include <functional>

namespace dfe {

// The number of pieces into which parallel_for divides its items, one a thread.
int pieces_of(int64_t items, int threads);

// Call body(piece, begin, end) on contiguous pieces of [0, items) from up to `threads` threads, the caller among them; return when all are
// done. Pieces depend only on `items` and `threads`. `body` must not throw, so it must not allocate: scratch for pieces_of(items, threads)
// pieces is made before. Threads may call it at once. Safe after fork(), which leaves the child this file's own threads.
void parallel_for(int64_t items, int threads, const std::function<void(int, int64_t, int64_t)>& body);

}  // namespace dfe
