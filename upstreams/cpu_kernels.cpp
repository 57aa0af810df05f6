// Kernels on a CPU, in fp32: the selective scan of Mamba, forward and backward, its depthwise convolution, and HuBERT's first one.
//
// Channels are innermost in memory and fill the lanes of a vector. A thread walks over its rows tile by tile in time and, within a
// tile, over blocks of LANES channels, whose states stay in the first cache. Vectors are the compiler's own type, so that the same
// source serves AVX-512, AVX2 and NEON. Written from the equations of Gu and Dao 2023 (arXiv 2312.00752).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int TILE = 16;  // frames; `KEPT_FRAMES` in scan_cpu.py
constexpr int AHEAD = 4;  // frames whose values are asked for before they are needed
constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

#define INLINE static inline __attribute__((always_inline))

INLINE Vector all(float x) { return x - Vector{}; }

INLINE Vector load(const float* from, int count) {
    Vector x{};
    if (count == LANES)
        std::memcpy(&x, from, sizeof x);
    else
        std::memcpy(&x, from, count * sizeof(float));
    return x;
}

INLINE void store(float* to, Vector x, int count) {
    if (count == LANES)
        std::memcpy(to, &x, sizeof x);
    else
        std::memcpy(to, &x, count * sizeof(float));
}

// 2^x: the whole part goes to the exponent, the rest through a polynomial of relative error 2e-9 that is 1 at 0. NaN stays NaN.
INLINE Vector exp2(Vector x) {
    x = x < -127.0f ? all(-127.0f) : x;
    x = x > 128.0f ? all(128.0f) : x;
    const Vector shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: the low bits now hold the biased exponent
    const Vector f = x - (shifted - 12583039.0f);
    Vector p = f * 1.5353361165798413e-4f + 1.3398874661692281e-3f;
    p = p * f + 9.618437362624566e-3f;
    p = p * f + 5.550332470342781e-2f;
    p = p * f + 0.24022647913556217f;
    p = p * f + 0.6931472028555604f;
    p = p * f + 1.0f;
    return p * (Vector)((Integers)shifted << 23);
}

INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp2(-LOG2E * x)); }

// log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|; log(1 + e) = 2 atanh(e / (2 + e)) as a series, whose ninth term is below 1e-9.
INLINE Vector softplus(Vector x) {
    const Vector e = exp2(-LOG2E * (x < 0.0f ? -x : x));
    const Vector s = e / (2.0f + e), q = s * s;
    Vector p = q * (1.0f / 15) + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return (x < 0.0f ? all(0.0f) : x) + 2.0f * s * p;
}

// x Phi(x), with erfc(a) = t e^(-a^2) q(t), t = 1 / (1 + 0.4 a), a >= 0: q fitted to a relative error of 4e-8.
INLINE Vector gelu(Vector x) {
    const Vector a = (x < 0.0f ? -x : x) * 0.70710678118654752440f;
    const Vector t = 1.0f / (1.0f + 0.4f * a);
    Vector q = t * 0.03263752332067926f - 0.09700953738936345f;
    q = q * t - 0.008929585887963831f;
    q = q * t + 0.19887140095933362f;
    q = q * t - 0.0006429630800233198f;
    q = q * t + 0.22957236403154935f;
    q = q * t + 0.19203537159133352f;
    q = q * t + 0.22792549784117971f;
    q = q * t + 0.2255399623295236f;
    const Vector tail = 0.5f * t * q * exp2(-LOG2E * a * a);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// Calls work(item) for every item, on up to `threads` threads.
template <class Work>
void share(int64_t items, int64_t threads, Work work) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
        for (int64_t item; (item = next++) < items;) work(item);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min(threads, items); ++i) others.emplace_back(run);
    run();
    for (auto& each : others) each.join();
}

}  // namespace

extern "C" {

// The same fields in the same order as `_Arguments` in scan_cpu.py. Values are (batch, frames, channels) with channels innermost;
// states (batch, states, width). Pointers may be null where a tensor is optional.
struct Arguments {
    const float *u, *delta, *b, *c, *z, *a, *d, *bias, *initial;  // a: (states or 1, width), in units of log 2
    const int64_t* num_frames;
    float *y, *last, *kept;                                              // kept: (batch, tiles, states, width), or null
    const float *grad_y, *grad_last;                                     // from here on of the backward pass only
    float *grad_u, *grad_delta, *grad_z, *grad_b, *grad_c, *grad_a;      // grad_b, grad_c: (ranges, batch, frames, states)
    float *grad_d, *grad_bias, *grad_initial;                            // grad_a, grad_d, grad_bias: a row of each batch
    int64_t u_batch, u_frame, delta_batch, delta_frame, b_batch, b_frame, c_batch, c_frame, z_batch, z_frame;
    int64_t batch, width, frames, states, decays, ranges, threads, softplus, reverse;
};
}

namespace {

struct Item {
    int64_t row, range, first, past, end, tiles;  // channels first..past; `end` valid frames

    Item(const Arguments& g, int64_t item) {
        row = item / g.ranges;
        range = item % g.ranges;
        const int64_t blocks = (g.width + LANES - 1) / LANES;
        first = blocks * range / g.ranges * LANES;
        past = std::min(blocks * (range + 1) / g.ranges * LANES, g.width);
        end = g.num_frames ? std::min(std::max(g.num_frames[row], int64_t{0}), g.frames) : g.frames;
        tiles = (end + TILE - 1) / TILE;
    }
};

// The inputs of one frame and block of channels.
struct Frame {
    Vector u, raw, step, drive;

    __attribute__((always_inline)) Frame(const Arguments& g, int64_t row, int64_t t, int64_t channel, int count, Vector bias) {
        u = load(g.u + row * g.u_batch + t * g.u_frame + channel, count);
        raw = load(g.delta + row * g.delta_batch + t * g.delta_frame + channel, count) + bias;
        step = g.softplus ? softplus(raw) : raw;
        drive = step * u;
    }
};

INLINE void prefetch(const Arguments& g, int64_t row, int64_t t, int64_t channel) {
    __builtin_prefetch(g.u + row * g.u_batch + t * g.u_frame + channel);
    __builtin_prefetch(g.delta + row * g.delta_batch + t * g.delta_frame + channel);
    if (g.z) __builtin_prefetch(g.z + row * g.z_batch + t * g.z_frame + channel);
}

void forward_item(const Arguments& g, const Item& item) {
    const int64_t states = g.states, row = item.row;
    const int64_t blocks = (item.past - item.first + LANES - 1) / LANES, plane = states * g.width;
    std::vector<Vector> kept_states(blocks * states), decays_of(g.decays);
    for (int64_t i = 0; i < blocks * states && g.initial; ++i) {
        const int64_t channel = item.first + i / states * LANES;
        const int count = std::min<int64_t>(LANES, item.past - channel);
        kept_states[i] = load(g.initial + row * plane + i % states * g.width + channel, count);
    }
    for (int64_t tile = 0; tile < item.tiles; ++tile) {
        const int64_t start = tile * TILE, stop = std::min<int64_t>(start + TILE, item.end);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t channel = item.first + block * LANES;
            const int count = std::min<int64_t>(LANES, item.past - channel);
            Vector* h = &kept_states[block * states];
            Vector* a = decays_of.data();
            for (int64_t n = 0; n < g.decays; ++n) a[n] = load(g.a + n * g.width + channel, count);
            if (g.kept)
                for (int64_t n = 0; n < states; ++n)
                    store(g.kept + ((row * ((g.frames + TILE - 1) / TILE) + tile) * states + n) * g.width + channel, h[n], count);
            const Vector bias = g.bias ? load(g.bias + channel, count) : Vector{};
            const Vector skip = g.d ? load(g.d + channel, count) : Vector{};
            for (int64_t i = start; i < stop; ++i) {
                const int64_t t = g.reverse ? item.end - 1 - i : i;
                if (i + AHEAD < item.end) prefetch(g, row, g.reverse ? t - AHEAD : t + AHEAD, channel);
                const Frame x(g, row, t, channel, count, bias);
                const float* b = g.b + row * g.b_batch + t * g.b_frame;
                const float* c = g.c + row * g.c_batch + t * g.c_frame;
                Vector y = x.u * skip;
                if (g.decays == 1) {
                    const Vector decay = exp2(x.step * a[0]);
                    for (int64_t n = 0; n < states; ++n) y += (h[n] = decay * h[n] + x.drive * b[n]) * c[n];
                } else {
                    for (int64_t n = 0; n < states; ++n) y += (h[n] = exp2(x.step * a[n]) * h[n] + x.drive * b[n]) * c[n];
                }
                if (g.z) {
                    const Vector z = load(g.z + row * g.z_batch + t * g.z_frame + channel, count);
                    y *= z * sigmoid(z);
                }
                store(g.y + (row * g.frames + t) * g.width + channel, y, count);
            }
        }
    }
    for (int64_t t = item.end; t < g.frames; ++t)
        std::fill_n(g.y + (row * g.frames + t) * g.width + item.first, item.past - item.first, 0.0f);
    for (int64_t i = 0; i < blocks * states; ++i) {
        const int64_t channel = item.first + i / states * LANES;
        const int count = std::min<int64_t>(LANES, item.past - channel);
        store(g.last + row * plane + i % states * g.width + channel, kept_states[i], count);
    }
}

// What the backward pass of one item holds: vectors over the channels of a block, or one for each of its blocks.
struct Room {
    std::vector<Vector> carry, a, grad_a, h, decay, grad_b, grad_c, grad_d, grad_bias;

    Room(int64_t blocks, int64_t states)
        : carry(blocks * states), a(states), grad_a(blocks * states), h((TILE + 1) * states), decay(TILE * states),
          grad_b(TILE * states), grad_c(TILE * states), grad_d(blocks), grad_bias(blocks) {}
};

void backward_block(const Arguments& g, const Item& item, Room& room, int64_t block, int64_t tile) {
    const int64_t states = g.states, row = item.row, channel = item.first + block * LANES;
    const int64_t start = tile * TILE, stop = std::min<int64_t>(start + TILE, item.end);
    const int count = std::min<int64_t>(LANES, item.past - channel);
    const Vector bias = g.bias ? load(g.bias + channel, count) : Vector{};
    const Vector skip = g.d ? load(g.d + channel, count) : Vector{};
    Vector* a = room.a.data();
    for (int64_t n = 0; n < states; ++n) a[n] = load(g.a + (g.decays == 1 ? 0 : n) * g.width + channel, count);
    for (int64_t n = 0; n < states; ++n)
        room.h[n] = load(g.kept + ((row * ((g.frames + TILE - 1) / TILE) + tile) * states + n) * g.width + channel, count);
    for (int64_t i = start; i < stop; ++i) {
        const int64_t t = g.reverse ? item.end - 1 - i : i;
        const Frame x(g, row, t, channel, count, bias);
        const float* b = g.b + row * g.b_batch + t * g.b_frame;
        Vector* h = &room.h[(i - start) * states];
        Vector* decay = &room.decay[(i - start) * states];
        for (int64_t n = 0; n < states; ++n) {
            decay[n] = exp2(x.step * a[n]);
            h[states + n] = decay[n] * h[n] + x.drive * b[n];
        }
    }
    Vector* carry = &room.carry[block * states];
    Vector* grad_a = &room.grad_a[block * states];
    for (int64_t i = stop - 1; i >= start; --i) {
        const int64_t t = g.reverse ? item.end - 1 - i : i, at = (row * g.frames + t) * g.width + channel;
        const Frame x(g, row, t, channel, count, bias);
        const float* b = g.b + row * g.b_batch + t * g.b_frame;
        const float* c = g.c + row * g.c_batch + t * g.c_frame;
        const Vector* h = &room.h[(i - start) * states];
        const Vector* decay = &room.decay[(i - start) * states];
        Vector grad = load(g.grad_y + at, count);
        if (g.z) {
            Vector y = x.u * skip;
            for (int64_t n = 0; n < states; ++n) y += h[states + n] * c[n];
            const Vector z = load(g.z + row * g.z_batch + t * g.z_frame + channel, count), gate = sigmoid(z);
            store(g.grad_z + at, grad * y * gate * (1.0f + z * (1.0f - gate)), count);
            grad *= z * gate;
        }
        room.grad_d[block] += grad * x.u;
        Vector grad_step{}, grad_drive{};
        Vector* grad_b = &room.grad_b[(i - start) * states];
        Vector* grad_c = &room.grad_c[(i - start) * states];
        for (int64_t n = 0; n < states; ++n) {
            const Vector grad_h = carry[n] + grad * c[n];
            grad_c[n] += grad * h[states + n];
            grad_b[n] += grad_h * x.drive;
            grad_drive += grad_h * b[n];
            carry[n] = grad_h * decay[n];
            const Vector exponent = carry[n] * h[n];
            grad_step += exponent * a[n];
            grad_a[n] += exponent * x.step;
        }
        grad_step = grad_step * LN2 + grad_drive * x.u;
        if (g.softplus) grad_step *= sigmoid(x.raw);
        room.grad_bias[block] += grad_step;
        store(g.grad_u + at, grad * skip + grad_drive * x.step, count);
        store(g.grad_delta + at, grad_step, count);
    }
}

void backward_item(const Arguments& g, const Item& item) {
    const int64_t states = g.states, row = item.row, plane = states * g.width;
    const int64_t blocks = (item.past - item.first + LANES - 1) / LANES;
    Room room(blocks, states);
    auto each = [&](auto work) {
        for (int64_t i = 0; i < blocks * states; ++i) {
            const int64_t channel = item.first + i / states * LANES;
            work(i, row * plane + i % states * g.width + channel, static_cast<int>(std::min<int64_t>(LANES, item.past - channel)));
        }
    };
    each([&](int64_t i, int64_t at, int count) { room.carry[i] = load(g.grad_last + at, count); });
    for (int64_t tile = item.tiles - 1; tile >= 0; --tile) {
        for (auto* sums : {&room.grad_b, &room.grad_c}) std::fill(sums->begin(), sums->end(), Vector{});
        for (int64_t block = 0; block < blocks; ++block) backward_block(g, item, room, block, tile);
        const int64_t start = tile * TILE, stop = std::min<int64_t>(start + TILE, item.end);
        for (int64_t i = start; i < stop; ++i) {
            const int64_t t = g.reverse ? item.end - 1 - i : i;
            const int64_t at = ((item.range * g.batch + row) * g.frames + t) * states;
            for (int64_t n = 0; n < states; ++n) {
                const Vector b = room.grad_b[(i - start) * states + n], c = room.grad_c[(i - start) * states + n];
                float sum_b = 0.0f, sum_c = 0.0f;
                for (int lane = 0; lane < LANES; ++lane) sum_b += b[lane], sum_c += c[lane];
                g.grad_b[at + n] = sum_b;
                g.grad_c[at + n] = sum_c;
            }
        }
    }
    each([&](int64_t i, int64_t at, int count) {
        store(g.grad_initial + at, room.carry[i], count);
        store(g.grad_a + at, room.grad_a[i], count);
    });
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channel = item.first + block * LANES;
        const int count = std::min<int64_t>(LANES, item.past - channel);
        store(g.grad_d + row * g.width + channel, room.grad_d[block], count);
        store(g.grad_bias + row * g.width + channel, room.grad_bias[block], count);
    }
}

}  // namespace

extern "C" {

void scan_forward(const Arguments* g) {
    share(g->batch * g->ranges, g->threads, [&](int64_t item) { forward_item(*g, Item(*g, item)); });
}

// Gradients past a row's end are left alone: they are zeros beforehand.
void scan_backward(const Arguments* g) {
    share(g->batch * g->ranges, g->threads, [&](int64_t item) { backward_item(*g, Item(*g, item)); });
}

// y = SiLU(bias + causal depthwise convolution of x), backwards in time if `reverse`. x: (batch, frames, width) with strides; tail:
// (batch, kernel - 1, width) dense, the frames before the first, or null for zeros; weight: (kernel, width); y: dense.
void depthwise_conv_silu(const float* x, const float* tail, const float* weight, const float* bias, float* y, int64_t x_batch,
                         int64_t x_frame, int64_t batch, int64_t frames, int64_t width, int64_t kernel, int64_t reverse,
                         int64_t threads) {
    constexpr int64_t FRAMES = 64;
    const int64_t pieces = (frames + FRAMES - 1) / FRAMES;
    share(batch * pieces, threads, [&](int64_t item) {
        const int64_t row = item / pieces, start = item % pieces * FRAMES, stop = std::min(start + FRAMES, frames);
        for (int64_t t = start; t < stop; ++t) {
            for (int64_t channel = 0; channel < width; channel += LANES) {
                const int count = std::min<int64_t>(LANES, width - channel);
                Vector sum = load(bias + channel, count);
                for (int64_t k = 0; k < kernel; ++k) {
                    const int64_t past = kernel - 1 - k, at = reverse ? t + past : t - past;
                    Vector value{};
                    if (at >= 0 && at < frames)
                        value = load(x + row * x_batch + at * x_frame + channel, count);
                    else if (tail && at < 0)
                        value = load(tail + (row * (kernel - 1) + at + kernel - 1) * width + channel, count);
                    else if (tail)
                        value = load(tail + (row * (kernel - 1) + at - frames) * width + channel, count);
                    sum += value * load(weight + k * width + channel, count);
                }
                store(y + (row * frames + t) * width + channel, sum * sigmoid(sum), count);
            }
        }
    });
}

// y = GELU(shift + convolution of waveforms), with weights of each row. wavs: (batch, samples) with a stride between rows; weight:
// (batch, kernel, width); shift: (batch, width); y: (batch, frames, width).
void waveform_conv_gelu(const float* wavs, const float* weight, const float* shift, float* y, int64_t wavs_batch, int64_t batch,
                        int64_t frames, int64_t width, int64_t kernel, int64_t stride, int64_t threads) {
    constexpr int64_t FRAMES = 64;
    const int64_t pieces = (frames + FRAMES - 1) / FRAMES;
    share(batch * pieces, threads, [&](int64_t item) {
        const int64_t row = item / pieces, start = item % pieces * FRAMES, stop = std::min(start + FRAMES, frames);
        std::vector<Vector> taps(kernel);
        for (int64_t channel = 0; channel < width; channel += LANES) {
            const int count = std::min<int64_t>(LANES, width - channel);
            for (int64_t k = 0; k < kernel; ++k) taps[k] = load(weight + (row * kernel + k) * width + channel, count);
            const Vector bias = load(shift + row * width + channel, count);
            for (int64_t t = start; t < stop; ++t) {
                const float* samples = wavs + row * wavs_batch + t * stride;
                Vector sum = bias;
                for (int64_t k = 0; k < kernel; ++k) sum += samples[k] * taps[k];
                store(y + (row * frames + t) * width + channel, gelu(sum), count);
            }
        }
    });
}
}
