// csrc/cpu/team.h by itself: `team_on_host NAME` runs one test and ends with status 0, 1 where something is wrong.
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/team.h"

using dfe::LoopBody;
using dfe::Team;

namespace {

int failures = 0;

void check(bool right, const char* what) {
    if (right) return;
    ++failures;
    std::fprintf(stderr, "wrong: %s\n", what);
}

// Every item once, no piece by two threads at once, none beyond `pieces`.
void loop(Team& team, int64_t items, int pieces) {
    std::vector<std::atomic<int>> seen(static_cast<size_t>(items)), within(static_cast<size_t>(pieces));
    const LoopBody body = [&](int piece, int64_t begin, int64_t end) {
        check(piece >= 0 && piece < pieces, "a piece that is not there");
        check(begin < end && begin >= 0 && end <= items, "items that are not there");
        check(within[static_cast<size_t>(piece)]++ == 0, "a piece is used twice at once");
        for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
        --within[static_cast<size_t>(piece)];
    };
    team.run(items, pieces, body);
    for (const auto& times : seen) check(times == 1, "an item that did not run once");
}

void absent_helpers_are_not_waited_for() {
    Team team(4);
    for (int64_t items : {1, 3, 4, 5, 1000}) loop(team, items, 4);
    team.end(0);
}

// A helper that takes something and does not go on until everything that it did not take is done.
void a_slow_helper_holds_up_its_own_items_alone() {
    Team team(2);
    constexpr int64_t ITEMS = 64;
    std::atomic<int64_t> by_leader{0}, taken{0};
    const LoopBody body = [&](int piece, int64_t begin, int64_t end) {
        if (piece == 0) {
            while (taken == 0) std::this_thread::yield();
            by_leader += end - begin;
        } else {
            taken += end - begin;
            while (by_leader != ITEMS - taken) std::this_thread::yield();
        }
    };
    std::thread helper([&] { team.help(1); });
    team.run(ITEMS, 2, body);
    check(by_leader + taken == ITEMS && taken <= ITEMS / 4, "shares");
    team.end(1);
    helper.join();
}

void many_loops_of_every_size() {
    std::mt19937 random(0);
    for (int round = 0; round < 30; ++round) {
        const int helpers = static_cast<int>(random() % 5);
        Team team(1 + static_cast<int>(random() % 6));
        std::vector<std::thread> threads;
        int come = 0;
        for (int index = 1; index <= helpers && index < team.capacity(); ++index, ++come) threads.emplace_back([&team, index] { team.help(index); });
        for (int i = 0; i < 200; ++i) {
            loop(team, 1 + static_cast<int64_t>(random() % (i % 10 == 0 ? 3000 : 9)), 1 + static_cast<int>(random() % team.capacity()));
            if (random() % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));  // the helpers go to sleep
        }
        team.end(come);
        for (auto& thread : threads) thread.join();
    }
}

void helpers_that_come_late_or_for_nothing_leave() {
    Team team(3);
    std::thread first([&] { team.help(1); });
    loop(team, 100, 3);
    std::thread second([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        team.help(2);
    });
    team.end(2);
    first.join();
    second.join();
}

void too_many_items_are_refused() {
    Team team(2);
    bool refused = false;
    try {
        team.run(Team::MOST_ITEMS + 1, 2, [](int, int64_t, int64_t) {});
    } catch (const std::length_error&) {
        refused = true;
    }
    check(refused, "not refused");
    int64_t done = 0;
    team.run(Team::MOST_ITEMS, 2, [&](int, int64_t begin, int64_t end) { done += end - begin; });
    check(done == Team::MOST_ITEMS, "the most items");
}

}  // namespace

int main(int count, char** arguments) {
    const std::pair<const char*, void (*)()> tests[] = {
        {"absent", absent_helpers_are_not_waited_for},       {"slow", a_slow_helper_holds_up_its_own_items_alone},
        {"many", many_loops_of_every_size},                  {"late", helpers_that_come_late_or_for_nothing_leave},
        {"items", too_many_items_are_refused},
    };
    for (const auto& [name, test] : tests) {
        if (count == 2 && std::strcmp(name, arguments[1]) == 0) {
            test();
            return failures != 0;
        }
    }
    return 2;
}
