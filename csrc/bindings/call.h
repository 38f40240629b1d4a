// A call of an op with all of its arguments, on tensors that stay where they are, to be run any number of times.
#pragma once

#include <memory>
#include <vector>

namespace dfe {

class Call {
public:
    virtual ~Call() = default;
    // Needs no interpreter lock, and does not take it.
    virtual void run(int threads) const = 0;
};

// Calls that follow each other: the interpreter is asked once for all of them.
class Calls : public Call {
public:
    explicit Calls(std::vector<std::shared_ptr<const Call>> calls) : calls_(std::move(calls)) {}

    void run(int threads) const override {
        for (const auto& call : calls_) call->run(threads);
    }

private:
    std::vector<std::shared_ptr<const Call>> calls_;
};

}  // namespace dfe
