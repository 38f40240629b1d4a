// The interpreter lock, given up and taken back.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>
#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

namespace dfe {

// ACT, which asks for the lock. Until Python 3.13 the end of the interpreter ends a daemon thread that does so by unwinding it (pthread_exit);
// a destructor on the way, here or in pybind11, then ends the process with an abort. Such a thread waits for ever instead, as from 3.14 on.
template <typename Act>
void or_wait_for_the_end(Act&& act) {
#if defined(__GLIBCXX__)
    try {
        act();
    } catch (abi::__forced_unwind&) {
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
#else
    act();
#endif
}

// Without the lock for the rest of the block, as py::gil_scoped_release.
class Unlocked {
public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    ~Unlocked() {
        or_wait_for_the_end([this] { PyEval_RestoreThread(state_); });
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

private:
    PyThreadState* state_;
};

}  // namespace dfe
