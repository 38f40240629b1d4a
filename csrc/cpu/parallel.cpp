#include "parallel.h"

#include <system_error>
#include <thread>
#include <vector>

#include "team.h"

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace dfe {
namespace {

// Threads of this file's own. They serve one team at a time.
class Pool {
public:
    void help(Team& team, const std::function<void()>& work) {
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) {  // they serve another: that one keeps the processors busy
            work();
            return;
        }
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            grow(team.capacity() - 1);
            team_ = &team;
            ++generation_;
        }
        start_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        team_ = nullptr;
        const int came = came_;
        lock.unlock();
        team.end(came);
        lock.lock();
        left_.wait(lock, [this] { return came_ == 0; });
    }

private:
    void grow(int helpers) {
        try {
            while (static_cast<int>(workers_.size()) < helpers) {
                const int index = static_cast<int>(workers_.size()) + 1;
                workers_.emplace_back([this, index, seen = generation_] { work(index, seen); });
            }
        } catch (const std::system_error&) {  // no more threads: those that there are will do
        }
    }

    void work(int index, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            start_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            Team* const team = team_;
            if (team == nullptr || index >= team->capacity()) continue;
            ++came_;
            lock.unlock();
            team->help(index);
            lock.lock();
            if (--came_ == 0) left_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable start_, left_;
    std::vector<std::thread> workers_;
    Team* team_ = nullptr;
    int came_ = 0;
    uint64_t generation_ = 0;
};

// Never destroyed: its threads wait in it until the process ends.
std::atomic<Pool*> current{nullptr};

// The OpenMP runtime that torch has loaded, by the entry points that GCC's compiled code uses. Its threads spin for a while after each of
// torch's operations, and threads of our own would share a core with them: so these run a loop that stands alone between such operations. Not
// a run of many loops: a team of theirs ends when all have come, which is milliseconds late where another process keeps a processor busy.
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

// The team whose leader this thread is.
thread_local Team* leading = nullptr;

#if !defined(_WIN32)
// A forked child has none of the threads, and another thread may have held the locks: it leaves the pool alone and gets its own, and it
// leaves the OpenMP runtime alone, which does not survive a fork. There is no lock around `current` itself that a fork could find taken.
[[maybe_unused]] const int forget_in_child = pthread_atfork(nullptr, nullptr, [] {
    current.store(nullptr);
    open_mp.parallel = nullptr;
    leading = nullptr;
});
#endif

struct Region {
    Team* team;
    const std::function<void()>* work;
};

// What a thread of the OpenMP team does: they may be fewer than were asked for.
void enter(void* data) {
    const Region& region = *static_cast<const Region*>(data);
    if (const int index = open_mp.thread()) {
        region.team->help(index);
    } else {
        (*region.work)();
        region.team->end(open_mp.threads() - 1);
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

// Call `work` with this thread as the leader of a team, of OpenMP's threads or our own.
void lead(int threads, const std::function<void()>& work, bool by_open_mp) {
    Team team(threads);
    const std::function<void()> leader = [&] {
        leading = &team;
        work();
        leading = nullptr;
    };
    if (by_open_mp) {
        Region region{&team, &leader};
        open_mp.parallel(enter, &region, static_cast<unsigned>(team.capacity()), 0);
    } else {
        pool().help(team, leader);
    }
}

}  // namespace

int pieces_of(int64_t items, int threads) { return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(items, threads))); }

void with_helpers(int threads, const std::function<void()>& work) {
    if (threads <= 1 || leading != nullptr) {
        work();
    } else {
        lead(threads, work, false);
    }
}

void parallel_for(int64_t items, int threads, const LoopBody& body, int64_t values) {
    const int pieces = pieces_of(items, threads);
    if (pieces == 1 || (leading == nullptr && values <= SMALL_LOOP)) {
        body(0, 0, items);
    } else {
        if (items > Team::MOST_ITEMS) throw std::length_error("a loop of so many items is not divided");
        const auto loop = [&] { leading->run(items, pieces, body); };
        if (leading != nullptr) {
            loop();
        } else {
            lead(pieces, loop, open_mp.parallel != nullptr);
        }
    }
}

}  // namespace dfe
