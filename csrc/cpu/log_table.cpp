#include "log_table.h"

#include <cmath>

namespace dfe {
namespace {

LogTable make_log_table() {
    LogTable table{};
    for (int j = 0; j + 1 < LOG_PIECES; ++j) {
        table.reciprocal[j] = static_cast<float>(1.0 / (1.0 + (j + 0.5) / LOG_PIECES));
        table.offset[j] = static_cast<float>(2.0 * std::log(static_cast<double>(table.reciprocal[j])));
    }
    table.reciprocal[LOG_PIECES - 1] = 0.5f;
    table.offset[LOG_PIECES - 1] = -MINUS_TWO_LOG_HALF;
    return table;
}

}  // namespace

const LogTable log_table = make_log_table();

}  // namespace dfe
