// One thread and its helpers, through any number of loops one after the other. The helpers come when they can: the leader waits for no work
// that nobody has begun, so a helper without a processor holds up at most the items that it was at.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace dfe {

using LoopBody = std::function<void(int, int64_t, int64_t)>;

// Waits for `ready()` without giving the processor up, for `limit` at most; returns whether it came true.
template <typename Ready>
bool spin(std::chrono::microseconds limit, Ready ready) {
    std::chrono::steady_clock::time_point end{};
    for (;;) {
        for (int i = 0; i < 16; ++i) {
            if (ready()) return true;
#if defined(__x86_64__) || defined(_M_X64)
            _mm_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        }
        const auto now = std::chrono::steady_clock::now();
        if (end == std::chrono::steady_clock::time_point{}) {
            end = now + limit;
        } else if (now > end) {
            return false;
        }
    }
}

// The processor that this thread is on, -1 where the system does not tell.
inline int processor() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

// Moves this thread to another processor than number `other`, for now, if it may use one.
inline void move_away([[maybe_unused]] int other) {
#if defined(__linux__)
    cpu_set_t allowed;
    if (other < 0 || other >= CPU_SETSIZE || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
    cpu_set_t elsewhere = allowed;
    CPU_CLR(other, &elsewhere);
    if (CPU_COUNT(&elsewhere) == 0 || sched_setaffinity(0, sizeof(elsewhere), &elsewhere) != 0) return;
    sched_setaffinity(0, sizeof(allowed), &allowed);
#endif
}

// A number that threads wait for. A thread that goes to sleep wakes up ahead of threads that used up their time, as one that spins does not.
class Counter {
public:
    int64_t value() const { return value_.load(std::memory_order_acquire); }
    // Only while nobody waits.
    void reset() { value_.store(0, std::memory_order_relaxed); }

    void add(int64_t amount) {
        value_.fetch_add(amount);  // sequentially consistent, as what wait() does: one of the two sees the other
        if (asleep_.load() > 0) {
            const std::lock_guard<std::mutex> lock(mutex_);
            changed_.notify_all();
        }
    }

    // Until ready(value()), at first without sleeping.
    template <typename Ready>
    void wait(std::chrono::microseconds limit, Ready ready) {
        if (spin(limit, [&] { return ready(value()); })) return;
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        changed_.wait(lock, [&] { return ready(value_.load()); });
        asleep_.fetch_sub(1);
    }

private:
    std::atomic<int64_t> value_{0};
    std::atomic<int> asleep_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

class Team {
public:
    static constexpr int MOST_THREADS = 255;
    static constexpr int64_t MOST_ITEMS = (int64_t{1} << 28) - 1;

    explicit Team(int threads) : capacity_(std::max(1, std::min(threads, MOST_THREADS))), shares_(new Share[static_cast<size_t>(capacity_)]) {}

    int capacity() const { return capacity_; }

    // By the leader: body(piece, begin, end) over [0, items), no piece by two threads at once. Each thread has a share of the items, takes half
    // of what is left of it at a time, and then from the shares of others what they have not begun.
    void run(int64_t items, int pieces, const LoopBody& body) {
        if (items > MOST_ITEMS) throw std::length_error("a loop of so many items is not divided");
        pieces = std::min(pieces, capacity_);
        body_ = &body;
        finished_.reset();
        leader_.store(processor(), std::memory_order_relaxed);
        for (int s = 0; s < pieces; ++s) shares_[s].left.store(packed(items * s / pieces, items * (s + 1) / pieces, pieces), std::memory_order_release);
        loops_.add(1);
        const int64_t done = take(0);
        finished_.wait(LEADER_SPINS, [&](int64_t others) { return done + others == items; });
    }

    // By helper number `piece`, from 1 on: work until the leader is done.
    void help(int piece) {
        for (int64_t seen = 0;;) {
            loops_.wait(HELPER_SPINS, [&](int64_t loops) { return loops != seen; });
            seen = loops_.value();
            if (over_.load(std::memory_order_acquire)) break;
            // A virtual machine's kernel takes a halted processor for a busy one, and wakes the helper where the leader is.
            if (const int leader = leader_.load(std::memory_order_relaxed); leader == processor()) move_away(leader);
            take(piece);
        }
        gone_.add(1);
    }

    // By the leader, after the last loop. `helpers`: how many come to help(), all of which have left it then, or are about to.
    void end(int helpers) {
        over_.store(true, std::memory_order_release);
        loops_.add(1);
        gone_.wait(LEADER_SPINS, [&](int64_t gone) { return gone == helpers; });
    }

private:
    static constexpr std::chrono::microseconds LEADER_SPINS{20}, HELPER_SPINS{50};

    // What nobody has taken of a piece, in one word: begin and end in 28 bits each, and the number of pieces of the loop, 8 bits. A word that
    // a later loop happens to repeat is as good as that loop's own, since what is taken is read from the loop after it was taken.
    struct alignas(64) Share {
        std::atomic<uint64_t> left{0};
    };
    static uint64_t packed(int64_t begin, int64_t end, int pieces) {
        return static_cast<uint64_t>(begin) << 36 | static_cast<uint64_t>(end) << 8 | static_cast<uint64_t>(pieces);
    }
    static int64_t begin_of(uint64_t word) { return static_cast<int64_t>(word >> 36); }
    static int64_t end_of(uint64_t word) { return static_cast<int64_t>(word >> 8 & MOST_ITEMS); }
    static int pieces_of(uint64_t word) { return static_cast<int>(word & 255); }

    // Everything that can be taken now, as piece `piece`; returns how many items.
    int64_t take(int piece) {
        int64_t done = 0;
        for (int k = 0, pieces = pieces_of(shares_[0].left.load(std::memory_order_acquire)); k < pieces && piece < pieces; ++k) {
            std::atomic<uint64_t>& left = shares_[(piece + k) % pieces].left;
            uint64_t word = left.load(std::memory_order_acquire);
            for (;;) {
                const int64_t begin = begin_of(word), end = end_of(word), count = (end - begin + 1) / 2;
                const int of = pieces_of(word);
                if (count == 0 || piece >= of) break;
                // The owner from the front, others from the back: neighbouring items share what was read.
                const uint64_t rest = k == 0 ? packed(begin + count, end, of) : packed(begin, end - count, of);
                if (!left.compare_exchange_weak(word, rest, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
                (*body_)(piece, k == 0 ? begin : end - count, k == 0 ? begin + count : end);
                done += count;
                if (piece > 0) finished_.add(count);
                word = left.load(std::memory_order_acquire);
            }
        }
        return done;
    }

    const int capacity_;
    const std::unique_ptr<Share[]> shares_;
    const LoopBody* body_ = nullptr;
    Counter loops_, finished_, gone_;
    std::atomic<bool> over_{false};
    std::atomic<int> leader_{-1};  // its processor
};

}  // namespace dfe
