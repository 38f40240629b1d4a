#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace dfe {
namespace {

class Pool {
public:
    void run(int64_t items, int pieces, const std::function<void(int, int64_t, int64_t)>& body) {
        std::lock_guard<std::mutex> turn(turn_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(workers_.size()) < pieces - 1) {
                const int index = static_cast<int>(workers_.size()) + 1;
                workers_.emplace_back([this, index, seen = generation_] { work(index, seen); });
            }
            body_ = &body;
            items_ = items;
            pieces_ = pieces;
            pending_ = pieces - 1;
            ++generation_;
        }
        start_.notify_all();
        body(0, 0, items / pieces);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
    }

private:
    void work(int index, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            start_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= pieces_) continue;
            const auto* body = body_;
            const int64_t begin = items_ * index / pieces_, end = items_ * (index + 1) / pieces_;
            lock.unlock();
            (*body)(index, begin, end);
            lock.lock();
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable start_, done_;
    std::vector<std::thread> workers_;
    const std::function<void(int, int64_t, int64_t)>* body_ = nullptr;
    int64_t items_ = 0;
    int pieces_ = 0, pending_ = 0;
    uint64_t generation_ = 0;
};

// Never destroyed: its threads wait in it until the process ends.
std::atomic<Pool*> current{nullptr};

// The OpenMP runtime that torch has loaded, by the entry points that GCC's compiled code uses. Its threads spin for a while after each of
// torch's operations: threads of our own would share a core with them, and be half as fast wherever both are at work.
struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
    int (*thread)();
    int (*threads)();
};

OpenMp find_open_mp() {
    OpenMp found{};
#if !defined(_WIN32)
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.thread = reinterpret_cast<decltype(found.thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    found.threads = reinterpret_cast<decltype(found.threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    if (found.thread == nullptr || found.threads == nullptr) found.parallel = nullptr;
#endif
    return found;
}

// Found when the module is loaded, after torch.
OpenMp open_mp = find_open_mp();

#if !defined(_WIN32)
// A forked child has none of the threads, and another thread may have held the locks: it leaves the pool alone and gets its own, and it
// leaves the OpenMP runtime alone, which does not survive a fork. There is no lock around `current` itself that a fork could find taken.
[[maybe_unused]] const int forget_in_child = pthread_atfork(nullptr, nullptr, [] {
    current.store(nullptr);
    open_mp.parallel = nullptr;
});
#endif

struct Shared {
    int64_t items;
    int pieces;
    const std::function<void(int, int64_t, int64_t)>* body;
};

// What a thread of the team does: the team may be smaller than was asked for.
void share(void* data) {
    const Shared& shared = *static_cast<const Shared*>(data);
    for (int piece = open_mp.thread(); piece < shared.pieces; piece += open_mp.threads()) {
        (*shared.body)(piece, shared.items * piece / shared.pieces, shared.items * (piece + 1) / shared.pieces);
    }
}

Pool& pool() {
    Pool* found = current.load();
    if (found == nullptr) {
        Pool* const made = new Pool;
        if (current.compare_exchange_strong(found, made)) return *made;
        delete made;  // another thread was first
    }
    return *found;
}

}  // namespace

int pieces_of(int64_t items, int threads) { return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(items, threads))); }

void parallel_for(int64_t items, int threads, const std::function<void(int, int64_t, int64_t)>& body) {
    const int pieces = pieces_of(items, threads);
    if (pieces == 1) {
        body(0, 0, items);
    } else if (open_mp.parallel != nullptr) {
        Shared shared{items, pieces, &body};
        open_mp.parallel(share, &shared, static_cast<unsigned>(pieces), 0);
    } else {
        pool().run(items, pieces, body);
    }
}

}  // namespace dfe
