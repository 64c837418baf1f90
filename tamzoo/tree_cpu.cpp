// x * sigmoid(tree(x)) of a g = 2 tree and its gradients, for rows of channels (channels_last).
//
// Levels of LANES nodes and more work on vectors of nodes, one pixel at a time; what they leave is
// transposed, and the levels above work on vectors of LANES pixels. All between x and the result stays in
// the cache. `tree_cpu.py` builds and calls this.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;

// Takes subnormal numbers for 0 while it lives, in its thread. Slopes begin at 0, and the product of a few that
// have hardly moved is subnormal; some CPUs take far longer for one.
struct SubnormalsAreZero {
#ifdef __SSE2__
    const unsigned before = _mm_getcsr();
    SubnormalsAreZero() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
    ~SubnormalsAreZero() { _mm_setcsr(before); }
#endif
};

struct BFloat16 {
    uint16_t bits;
};

uint16_t rounded(float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const uint32_t bits = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return uint16_t(value == value ? bits : 0x7fc0);
}

// What two neighbouring channels hold.
template <class R>
struct Pair {
    R even, odd;
};

template <class R>
Pair<R> get(const R* x, int j) {
    return {x[2 * j], x[2 * j + 1]};
}

template <class R>
void put(R* x, int j, Pair<R> value) {
    x[2 * j] = value.even;
    x[2 * j + 1] = value.odd;
}

Pair<float> get(const BFloat16* x, int j) {  // at once: the halves of a little-endian number
    uint32_t both;
    std::memcpy(&both, x + 2 * j, 4);
    const uint32_t even = both << 16, odd = both & 0xffff0000;
    Pair<float> value;
    std::memcpy(&value.even, &even, 4);
    std::memcpy(&value.odd, &odd, 4);
    return value;
}

void put(BFloat16* x, int j, Pair<float> value) {
    const uint32_t both = rounded(value.even) | uint32_t(rounded(value.odd)) << 16;
    std::memcpy(x + 2 * j, &both, 4);
}

// A PReLU's slope at y: what it multiplies y by.
template <class R>
R factor(R y, R slope) {
    return y > 0 ? R(1) : slope;
}

// A level's nodes, where they begin among the tree's c - 1, and where their parameters begin in the flat
// (4c - 5,) tensor: weights of left children, of right ones, biases; slopes of left nodes, of right ones.
struct Level {
    int nodes, first, left, right, bias, slope;
};

template <class R>
struct Tree {
    int channels;
    std::vector<Level> levels;
    size_t low = 1;          // levels that are climbed a pixel at a time
    std::vector<int> order;  // where the tensor has each parameter: there, left and right alternate
    std::vector<R> parameters;

    Tree(int channels, const R* flat) : channels(channels), order(4 * channels - 5), parameters(order.size()) {
        for (int nodes = channels / 2, at = 0, first = 0; nodes; first += nodes, nodes /= 2) {
            levels.push_back({nodes, first, at, at + nodes, at + 2 * nodes, at + 3 * nodes});
            for (int j = 0; j < nodes; j++) {
                order[at + j] = at + 2 * j;
                order[at + nodes + j] = at + 2 * j + 1;
                order[at + 2 * nodes + j] = at + 2 * nodes + j;
                if (nodes > 1) order[at + 3 * nodes + j % 2 * nodes / 2 + j / 2] = at + 3 * nodes + j;
            }
            at += 4 * nodes;
        }
        while (low < levels.size() && levels[low].nodes >= LANES) low++;
        for (size_t i = 0; i < order.size(); i++) parameters[i] = flat[order[i]];
    }

    const Level& handed() const { return levels[low - 1]; }
    int high_nodes() const { return 2 * handed().nodes - 1; }  // handed to the levels above, and theirs
};

// The layouts of what the levels make of LANES pixels.
struct ByPixel {  // [pixel][node], with one sum of all pixels; the vectors are of nodes
    int channels;
    int at(int j, int pixel) const { return pixel * channels + j; }
    static int sum(int j, int) { return j; }

    template <class F>
    void each(int nodes, int pixels, F body) const {
        for (int pixel = 0; pixel < pixels; pixel++)
#pragma omp simd
            for (int j = 0; j < nodes; j++) body(j, pixel);
    }
};

struct ByNode {  // [node][pixel], with a sum for each pixel; the vectors are of pixels
    static int at(int j, int pixel) { return j * LANES + pixel; }
    static int sum(int j, int pixel) { return at(j, pixel); }

    template <class F>
    void each(int nodes, int, F body) const {
        for (int j = 0; j < nodes; j++)
#pragma omp simd
            for (int pixel = 0; pixel < LANES; pixel++) body(j, pixel);
    }
};

// A level's nodes before their PReLUs, from those of the level below.
template <class Layout, class R>
void climb(Layout layout, const Level& level, const Level& below, const R* p, int pixels, const R* children,
           R* y) {
    const R *left = p + level.left, *right = p + level.right, *bias = p + level.bias;
    const R *left_slope = p + below.slope, *right_slope = left_slope + level.nodes;
    layout.each(level.nodes, pixels, [=](int j, int pixel) {
        const R a = children[layout.at(2 * j, pixel)], b = children[layout.at(2 * j + 1, pixel)];
        y[layout.at(j, pixel)] =
            left[j] * (a * factor(a, left_slope[j])) + right[j] * (b * factor(b, right_slope[j])) + bias[j];
    });
}

// Turns a level's children into their gradients, and adds to the sums of its parameters.
template <class Layout, class R>
void descend(Layout layout, const Level& level, const Level& below, const R* p, int pixels, const R* grad,
             R* children, R* sums) {
    const R *left = p + level.left, *right = p + level.right;
    const R *left_slope = p + below.slope, *right_slope = left_slope + level.nodes;
    R *left_sum = sums + layout.sum(level.left, 0), *right_sum = sums + layout.sum(level.right, 0);
    R *bias_sum = sums + layout.sum(level.bias, 0), *left_slope_sum = sums + layout.sum(below.slope, 0);
    R* right_slope_sum = sums + layout.sum(below.slope + level.nodes, 0);
    layout.each(level.nodes, pixels, [=](int j, int pixel) {
        const int sum = layout.sum(j, pixel);
        const R d = grad[layout.at(j, pixel)], d_left = d * left[j], d_right = d * right[j];
        R &a = children[layout.at(2 * j, pixel)], &b = children[layout.at(2 * j + 1, pixel)];
        const R a_factor = factor(a, left_slope[j]), b_factor = factor(b, right_slope[j]);
        bias_sum[sum] += d;
        left_sum[sum] += d * (a * a_factor);
        right_sum[sum] += d * (b * b_factor);
        left_slope_sum[sum] += d_left * (a > 0 ? R(0) : a);
        right_slope_sum[sum] += d_right * (b > 0 ? R(0) : b);
        a = d_left * a_factor;
        b = d_right * b_factor;
    });
}

// `pixels` <= LANES rows of x to the tree's nodes before their PReLUs, low[pixel][node] and high[node][pixel],
// and to the gates.
template <class E, class R>
void climb(const Tree<R>& tree, const E* x, int pixels, R* low, R* high, R* gate) {
    const ByPixel rows{tree.channels};
    const R* p = tree.parameters.data();
    const Level &bottom = tree.levels[0], &handed = tree.handed();
    const R *left = p + bottom.left, *right = p + bottom.right, *bias = p + bottom.bias;
    rows.each(bottom.nodes, pixels, [=](int j, int pixel) {
        const auto [even, odd] = get(x + rows.at(0, pixel), j);
        low[rows.at(j, pixel)] = left[j] * even + right[j] * odd + bias[j];
    });
    for (size_t above = 1; above < tree.low; above++) {
        const Level &level = tree.levels[above], &below = tree.levels[above - 1];
        climb(rows, level, below, p, pixels, low + below.first, low + level.first);
    }
    for (int j = 0; j < handed.nodes; j++)
        for (int pixel = 0; pixel < LANES; pixel++)
            high[ByNode::at(j, pixel)] = pixel < pixels ? low[rows.at(handed.first + j, pixel)] : R(0);
    for (size_t above = tree.low; above < tree.levels.size(); above++) {
        const Level &level = tree.levels[above], &below = tree.levels[above - 1];
        const R* children = high;
        high += ByNode::at(below.nodes, 0);
        climb(ByNode(), level, below, p, LANES, children, high);
    }
    for (int pixel = 0; pixel < LANES; pixel++) gate[pixel] = 1 / (1 + std::exp(-high[pixel]));
}

template <class E, class R>
void forward(const E* x, const R* parameters, E* out, int64_t rows, int channels, int threads) {
    const Tree<R> tree(channels, parameters);
    const ByPixel layout{channels};
    const int64_t tiles = (rows + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads)
    {
        const SubnormalsAreZero mode;
        std::vector<R> low(layout.at(0, LANES)), high(ByNode::at(tree.high_nodes(), 0));
        R gates[LANES], *gate = gates;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int pixels = int(std::min<int64_t>(LANES, rows - tile * LANES));
            const E* from = x + tile * LANES * channels;
            E* to = out + tile * LANES * channels;
            climb(tree, from, pixels, low.data(), high.data(), gate);
            layout.each(channels / 2, pixels, [=](int j, int pixel) {
                const auto [even, odd] = get(from + layout.at(0, pixel), j);
                put(to + layout.at(0, pixel), j, Pair<R>{even * gate[pixel], odd * gate[pixel]});
            });
        }
    }
}

// Gradients of one tile; those of the parameters are added to `low_sums`, [parameter], and, for the levels
// above, to `high_sums`, [parameter][pixel].
template <class E, class R>
void descend(const Tree<R>& tree, const E* grad, const E* x, E* grad_x, int pixels, R* low, R* high, R* low_sums,
             R* high_sums) {
    const ByPixel rows{tree.channels};
    const R* p = tree.parameters.data();
    const Level &bottom = tree.levels[0], &handed = tree.handed();
    R gates[LANES], *gate = gates;
    climb(tree, x, pixels, low, high, gate);
    R* d = high + ByNode::at(tree.high_nodes() - 1, 0);  // of the root
    for (int pixel = 0; pixel < LANES; pixel++) {
        R dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int j = 0; j < (pixel < pixels ? bottom.nodes : 0); j++) {
            const auto [even, odd] = get(x + rows.at(0, pixel), j);
            const auto [d_even, d_odd] = get(grad + rows.at(0, pixel), j);
            dot += d_even * even + d_odd * odd;
        }
        d[pixel] = dot * gate[pixel] * (1 - gate[pixel]);
    }
    for (size_t above = tree.levels.size() - 1; above >= tree.low; above--) {
        const Level &level = tree.levels[above], &below = tree.levels[above - 1];
        R* children = d - ByNode::at(below.nodes, 0);
        descend(ByNode(), level, below, p, LANES, d, children, high_sums);
        d = children;
    }
    for (int j = 0; j < handed.nodes; j++)
        for (int pixel = 0; pixel < pixels; pixel++) low[rows.at(handed.first + j, pixel)] = d[ByNode::at(j, pixel)];
    for (size_t above = tree.low - 1; above > 0; above--) {
        const Level &level = tree.levels[above], &below = tree.levels[above - 1];
        descend(rows, level, below, p, pixels, low + level.first, low + below.first, low_sums);
    }
    const R *left = p + bottom.left, *right = p + bottom.right;
    R *left_sum = low_sums + bottom.left, *right_sum = low_sums + bottom.right, *bias_sum = low_sums + bottom.bias;
    rows.each(bottom.nodes, pixels, [=](int j, int pixel) {
        const auto [even, odd] = get(x + rows.at(0, pixel), j);
        const auto [d_even, d_odd] = get(grad + rows.at(0, pixel), j);
        const R error = low[rows.at(j, pixel)], z = gate[pixel];
        left_sum[j] += even * error;
        right_sum[j] += odd * error;
        bias_sum[j] += error;
        put(grad_x + rows.at(0, pixel), j, Pair<R>{d_even * z + left[j] * error, d_odd * z + right[j] * error});
    });
}

template <class E, class R>
void backward(const E* grad, const E* x, const R* parameters, E* grad_x, R* grad_parameters, int64_t rows,
              int channels, int threads) {
    const Tree<R> tree(channels, parameters);
    const int64_t tiles = (rows + LANES - 1) / LANES;
    const size_t count = tree.order.size();
    std::vector<R> totals(threads * count);  // a row a thread, summed in order: the same on every run
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++) {
        const SubnormalsAreZero mode;
        std::vector<R> low(size_t(channels) * LANES), high(ByNode::at(tree.high_nodes(), 0));
        std::vector<R> high_sums(count * LANES);
        R* total = totals.data() + part * count;
        for (int64_t tile = tiles * part / threads; tile < tiles * (part + 1) / threads; tile++) {
            const int64_t begin = tile * LANES, at = begin * channels;
            descend(tree, grad + at, x + at, grad_x + at, int(std::min<int64_t>(LANES, rows - begin)), low.data(),
                    high.data(), total, high_sums.data());
        }
        for (size_t i = 0; i < count; i++)
            for (int lane = 0; lane < LANES; lane++) total[i] += high_sums[i * LANES + lane];
    }
    for (size_t i = 0; i < count; i++) {
        R sum = 0;
        for (int part = 0; part < threads; part++) sum += totals[part * count + i];
        grad_parameters[tree.order[i]] = sum;
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
