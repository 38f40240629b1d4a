#include "gelu_tables.h"

#include <cmath>

namespace dfe {
namespace {

double tail(double m) { return 0.5 * std::erfc(m / std::sqrt(2.0)); }
double deficit(double m) { return m * tail(m); }
double rise(double m) { return 0.5 - tail(m) + m * std::exp(-0.5 * m * m) / std::sqrt(2.0 * std::acos(-1.0)); }

// The polynomials through the Chebyshev points of each piece, in powers of m - j step, or, Shifted, of m. The middle point, of an odd number, is
// m = j step itself: both functions are exactly 0 at 0.
template <int Points, bool Shifted>
void interpolate(double (*function)(double), double step, float (&table)[Points][GELU_PIECES]) {
    for (int j = 0; j < GELU_PIECES; ++j) {
        double at[Points], differences[Points], powers[Points] = {};
        for (int i = 0; i < Points; ++i) {
            at[i] = i == Points / 2 ? 0.0 : 0.5 * step * std::cos((2 * i + 1) * std::acos(-1.0) / (2 * Points));
            differences[i] = function(j * step + at[i]);
        }
        for (int order = 1; order < Points; ++order) {  // Newton's form
            for (int i = Points - 1; i >= order; --i) differences[i] = (differences[i] - differences[i - 1]) / (at[i] - at[i - order]);
        }
        for (int order = Points - 1; order >= 0; --order) {  // powers * (t - at) + difference, t counted from 0 or from j step
            const double root = at[order] + (Shifted ? j * step : 0.0);
            for (int i = Points - 1; i > 0; --i) powers[i] = powers[i - 1] - root * powers[i];
            powers[0] = differences[order] - root * powers[0];
        }
        for (int i = 0; i < Points; ++i) table[i][j] = static_cast<float>(powers[i]);
    }
    table[0][0] = 0.0f;  // but for rounding
}

GeluTables make_gelu_tables() {
    GeluTables tables{};
    interpolate<5, false>(deficit, GELU_STEP, tables.deficit);
    interpolate<5, false>(rise, GELU_STEP, tables.rise);
    interpolate<3, true>(deficit, GELU_COARSE_STEP, tables.coarse_deficit);
    interpolate<3, true>(rise, GELU_COARSE_STEP, tables.coarse_rise);
    return tables;
}

}  // namespace

const GeluTables gelu_tables = make_gelu_tables();

}  // namespace dfe
