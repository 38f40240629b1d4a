// A loop over work items on a small persistent set of threads.
#pragma once

#include <cstdint>
#include <functional>

namespace dfe {

// Call body(begin, end) on contiguous pieces of [0, items) from up to `threads` threads, the caller among them; return when all are done.
// Pieces depend only on `items` and `threads`. `body` must not throw. Calls from several threads take turns. Safe after fork().
void parallel_for(int64_t items, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace dfe
