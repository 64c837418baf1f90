// x * sigmoid(tree(x)) of a g = 2 tree and its gradients, for rows of channels (channels_last).
//
// LANES pixels climb the tree side by side: the first level reads whole rows, its result is transposed, and
// all other levels are arithmetic on vectors of LANES pixels that stay in the cache. `tree_cpu.py` builds
// and calls this.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;

struct BFloat16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    BFloat16& operator=(float value) {  // to nearest, ties to even; NaN stays NaN
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
        bits = uint16_t(value == value ? rounded : 0x7fc0);
        return *this;
    }
};

// Where a level's parameters begin in the flat (4c - 5,) tensor, and its nodes among the tree's c - 1.
struct Level {
    int nodes, weight, bias, slope, first;
};

std::vector<Level> levels_of(int channels) {
    std::vector<Level> levels;
    for (int nodes = channels / 2, at = 0, first = 0; nodes; first += nodes, nodes /= 2) {
        levels.push_back({nodes, at, at + 2 * nodes, at + 3 * nodes, first});
        at += (nodes > 1 ? 4 : 3) * nodes;
    }
    return levels;
}

template <class R>
R prelu(R y, R slope) {
    return y > 0 ? y : slope * y;
}

// One pixel's row to the first level's nodes.
template <class E, class R>
void enter(const E* __restrict__ x, const R* __restrict__ weight, const R* __restrict__ bias, int nodes,
           R* __restrict__ y) {
    for (int j = 0; j < nodes; j++)
        y[j] = weight[2 * j] * R(x[2 * j]) + weight[2 * j + 1] * R(x[2 * j + 1]) + bias[j];
}

template <class E, class R>
void scale(const E* __restrict__ x, R gate, int channels, E* __restrict__ out) {
    for (int c = 0; c < channels; c++) out[c] = R(x[c]) * gate;
}

// `rows` <= LANES rows of x to the tree's nodes before their PReLUs, y[node][lane], and to the gates.
template <class E, class R>
void climb(const E* x, int rows, int channels, const std::vector<Level>& levels, const R* parameters,
           R* row, R (*y)[LANES], R* gate) {
    const Level& bottom = levels[0];
    for (int lane = 0; lane < LANES; lane++) {
        if (lane < rows)
            enter(x + int64_t(lane) * channels, parameters, parameters + bottom.bias, bottom.nodes, row);
        for (int j = 0; j < bottom.nodes; j++) y[j][lane] = lane < rows ? row[j] : R(0);
    }
    for (size_t above = 1; above < levels.size(); above++) {
        const Level &level = levels[above], &below = levels[above - 1];
        const R *w = parameters + level.weight, *b = parameters + level.bias;
        const R* slope = parameters + below.slope;
        for (int j = 0; j < level.nodes; j++) {
            const R *left = y[below.first + 2 * j], *right = y[below.first + 2 * j + 1];
            for (int lane = 0; lane < LANES; lane++)
                y[level.first + j][lane] = w[2 * j] * prelu(left[lane], slope[2 * j]) +
                                           w[2 * j + 1] * prelu(right[lane], slope[2 * j + 1]) + b[j];
        }
    }
    const R* root = y[channels - 2];
    for (int lane = 0; lane < LANES; lane++) gate[lane] = 1 / (1 + std::exp(-root[lane]));
}

template <class E, class R>
void forward(const E* x, const R* parameters, E* out, int64_t rows, int channels, int threads) {
    const auto levels = levels_of(channels);
    const int64_t tiles = (rows + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads)
    {
        std::vector<R> row(channels), nodes(size_t(channels - 1) * LANES);
        auto y = reinterpret_cast<R(*)[LANES]>(nodes.data());
        R gate[LANES];
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t begin = tile * LANES;
            const int count = int(std::min<int64_t>(LANES, rows - begin));
            const E* from = x + begin * channels;
            E* to = out + begin * channels;
            climb(from, count, channels, levels, parameters, row.data(), y, gate);
            for (int64_t lane = 0; lane < count; lane++)
                scale(from + lane * channels, gate[lane], channels, to + lane * channels);
        }
    }
}

// The gradient of one pixel's row from those of the first level's nodes, `error[c]` for channel c's.
template <class E, class R>
void leave(const E* __restrict__ grad, const E* __restrict__ x, const R* __restrict__ weight,
           const R* __restrict__ error, R gate, int channels, E* __restrict__ grad_x, R* __restrict__ sums) {
    for (int c = 0; c < channels; c++) {
        sums[c] += R(x[c]) * error[c];
        grad_x[c] = R(grad[c]) * gate + weight[c] * error[c];
    }
}

// Gradients of one tile; those of the parameters are added to `sums`, (channels,) for the first level's
// weights, and to `lanes`, [parameter][lane], for all others.
template <class E, class R>
void descend(const E* grad, const E* x, E* grad_x, int rows, int channels, const std::vector<Level>& levels,
             const R* parameters, R* row, R (*y)[LANES], R* sums, R (*lanes)[LANES]) {
    R gate[LANES], error[LANES] = {};
    climb(x, rows, channels, levels, parameters, row, y, gate);
    for (int lane = 0; lane < rows; lane++) {
        R dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < channels; c++)
            dot += R(grad[int64_t(lane) * channels + c]) * R(x[int64_t(lane) * channels + c]);
        error[lane] = dot * gate[lane] * (1 - gate[lane]);
    }
    std::copy(error, error + LANES, y[channels - 2]);
    for (size_t above = levels.size() - 1; above > 0; above--) {  // y turns into its gradient, level by level
        const Level &level = levels[above], &below = levels[above - 1];
        for (int j = 0; j < level.nodes; j++) {
            const R* d = y[level.first + j];
            R* bias = lanes[level.bias + j];
            for (int lane = 0; lane < LANES; lane++) bias[lane] += d[lane];
            for (int child = 2 * j; child < 2 * j + 2; child++) {
                R *node = y[below.first + child], *dw = lanes[level.weight + child];
                R* ds = lanes[below.slope + child];
                const R w = parameters[level.weight + child], slope = parameters[below.slope + child];
                for (int lane = 0; lane < LANES; lane++) {
                    const R value = node[lane], d_out = d[lane] * w;
                    dw[lane] += d[lane] * prelu(value, slope);
                    ds[lane] += value > 0 ? R(0) : d_out * value;
                    node[lane] = value > 0 ? d_out : d_out * slope;
                }
            }
        }
    }
    const Level& bottom = levels[0];
    for (int j = 0; j < bottom.nodes; j++)
        for (int lane = 0; lane < LANES; lane++) lanes[bottom.bias + j][lane] += y[j][lane];
    for (int lane = 0; lane < rows; lane++) {
        for (int c = 0; c < channels; c++) row[c] = y[c / 2][lane];
        const int64_t at = int64_t(lane) * channels;
        leave(grad + at, x + at, parameters, row, gate[lane], channels, grad_x + at, sums);
    }
}

template <class E, class R>
void backward(const E* grad, const E* x, const R* parameters, E* grad_x, R* grad_parameters, int64_t rows,
              int channels, int threads) {
    const auto levels = levels_of(channels);
    const int64_t tiles = (rows + LANES - 1) / LANES;
    const size_t count = 4 * size_t(channels) - 5;
    std::vector<R> totals(threads * count);  // a row a thread, summed in order: the same on every run
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++) {
        std::vector<R> row(channels), nodes(size_t(channels - 1) * LANES), lanes(count * LANES);
        auto y = reinterpret_cast<R(*)[LANES]>(nodes.data());
        auto by_lane = reinterpret_cast<R(*)[LANES]>(lanes.data());
        R* total = totals.data() + part * count;
        for (int64_t tile = tiles * part / threads; tile < tiles * (part + 1) / threads; tile++) {
            const int64_t begin = tile * LANES, at = begin * channels;
            descend(grad + at, x + at, grad_x + at, int(std::min<int64_t>(LANES, rows - begin)), channels, levels,
                    parameters, row.data(), y, total, by_lane);
        }
        for (size_t i = channels; i < count; i++)
            for (int lane = 0; lane < LANES; lane++) total[i] += by_lane[i][lane];
    }
    for (size_t i = 0; i < count; i++) {
        grad_parameters[i] = 0;
        for (int part = 0; part < threads; part++) grad_parameters[i] += totals[part * count + i];
    }
}

}  // namespace

#define EXPOSE(NAME, E, R)                                                                                   \
    extern "C" void forward_##NAME(const E* x, const R* parameters, E* out, int64_t rows, int channels,      \
                                   int threads) {                                                            \
        forward(x, parameters, out, rows, channels, threads);                                                \
    }                                                                                                        \
    extern "C" void backward_##NAME(const E* grad, const E* x, const R* parameters, E* grad_x,               \
                                    R* grad_parameters, int64_t rows, int channels, int threads) {           \
        backward(grad, x, parameters, grad_x, grad_parameters, rows, channels, threads);                     \
    }

EXPOSE(float32, float, float)
EXPOSE(float64, double, double)
EXPOSE(bfloat16, BFloat16, float)
