// Recurrent layers on CPU: the tokens of each sequence one after the other, from the state in one slot to that in another.
//
// A token is computed in one way, to the last bit, whatever comes with it in a step and wherever a prompt is cut. A block of a head's state stays in the first cache while the tokens of a run pass; blocks are tasks.
#pragma once
#include <cmath>

#include "matmul.h"
#include "team.h"

struct Run {  // tokens of one sequence in the packed row. No source: begins with zeros; a snapshot is taken at most once
    int32_t first, tokens, source, target, snapshot_after, snapshot;
};

struct States {  // of one kind, of one layer: at `offset` in each slot
    const Run* runs;
    int64_t num_runs;
    char* pool;
    int64_t slot_bytes, offset;
    template <class T> T* at(int32_t slot) const { return (T*)(pool + slot * slot_bytes + offset); }
};

constexpr long NEAR = 8192;  // floats of a block, at most
constexpr long MOST_TAPS = 8;

template <class Work> static void share(Team& team, long tasks, long work_of_all, const Work& work) {
    constexpr long few = 1 << 16;  // elements that are not worth another thread
    if (work_of_all <= few) {
        for (long i = 0; i < tasks; i++) work(i);
        return;
    }
    team.run([&](int thread) {
        for (long i = thread; i < tasks; i = team.next()) work(i);
    });
}

static inline long tokens_of(const States& s) {
    long tokens = 0;
    for (long i = 0; i < s.num_runs; i++) tokens += s.runs[i].tokens;
    return tokens;
}

struct Block {  // rows of floats: a token reads them at `from` and leaves them at `to`
    const float* from;
    float* to;
    long from_step, to_step;
};

// `step(token, block)` for each token of a run; `at`: where the block begins in a slot's state, whose rows are `row`
// apart. The first token reads the slot, the last writes the other one.
template <class Step>
static inline void walk(const States& s, const Run& run, long at, long rows, long row, long width, const Step& step) {
    alignas(64) float near[NEAR];
    Block block{near, near, width, width};
    if (run.source < 0) memset(near, 0, rows * width * sizeof(float));
    else block.from = s.at<float>(run.source) + at, block.from_step = row;
    for (long t = 0; t < run.tokens; t++) {
        if (t + 1 == run.tokens) block.to = s.at<float>(run.target) + at, block.to_step = row;
        step(run.first + t, block);
        if (run.snapshot >= 0 && t + 1 == run.snapshot_after)
            for (long r = 0; r < rows; r++)
                memcpy(s.at<float>(run.snapshot) + at + r * row, block.to + r * block.to_step, width * sizeof(float));
        block.from = near, block.from_step = width;
    }
}

// Mamba 2. Of each head a state [width, size]: it decays by exp(a * dt), dt * x times b is added, and c reads it.
struct StateSpace {
    int32_t heads, groups, width, size;  // heads of a group share b and c
    int32_t softplus;  // of dt
    float least, most;  // of dt, after it
    const void *x, *b, *c, *dt;  // [T, heads, width], [T, groups, size] twice, [T, heads]
    int64_t x_step, b_step, c_step, dt_step;  // elements from token to token
    const float *a, *d, *dt_bias;  // [heads]; d and dt_bias: null = none
    float* out;  // [T, heads, width]
};

template <class T> static void state_space(Team& team, const States& s, const StateSpace& m) {
    constexpr long most_size = 256, fits = 4096;
    const long size = m.size, vectors = size / LANES;
    long rows = std::min<long>(m.width, std::max<long>(1, fits / size));
    while (rows > 8 && rows % 2 == 0 && s.num_runs * m.heads * (m.width / rows) < 4 * team.size()) rows /= 2;
    const long blocks = (m.width + rows - 1) / rows;
    const long elements = tokens_of(s) * m.heads * m.width * size;
    share(team, s.num_runs * m.heads * blocks, elements, [&](long task) {
        const Run& run = s.runs[task / (m.heads * blocks)];
        const long head = task / blocks % m.heads, group = head / (m.heads / m.groups);
        const long first = task % blocks * rows, here = std::min(rows, m.width - first);
        const float d = m.d ? m.d[head] : 0.0f;
        walk(s, run, (head * m.width + first) * size, here, size, size, [&](long token, const Block& block) {
            float dt = to_float(((const T*)m.dt)[token * m.dt_step + head]) + (m.dt_bias ? m.dt_bias[head] : 0.0f);
            if (m.softplus && dt <= 20.0f) dt = std::log1p(std::exp(dt));
            dt = std::min(std::max(dt, m.least), m.most);
            const vfloat keep = all(std::exp(dt * m.a[head]));
            const T* x = (const T*)m.x + token * m.x_step + head * m.width + first;
            vfloat b[most_size / LANES], c[most_size / LANES];
            for (long i = 0; i < vectors; i++) {
                load_row((const T*)m.b + token * m.b_step + group * size + i * LANES, b[i]);
                load_row((const T*)m.c + token * m.c_step + group * size + i * LANES, c[i]);
            }
            float* out = m.out + (token * m.heads + head) * m.width + first;
            for (long r = 0; r < here; r++) {
                const float value = to_float(x[r]);
                const vfloat push = all(value * dt);
                vfloat sum = all(0.0f);
                for (long i = 0; i < vectors; i++) {
                    const vfloat v = load(block.from + r * block.from_step + i * LANES) * keep + push * b[i];
                    store(block.to + r * block.to_step + i * LANES, v);
                    sum += v * c[i];
                }
                out[r] = sum_of(sum) + d * value;
            }
        });
    });
}

// The gated delta rule. Of each head a state [keys, values]: it decays, what it holds for the key is corrected towards
// the value by the share beta, and the query reads it.
struct DeltaRule {
    int32_t heads, key_heads, keys, values;  // heads / key_heads of them have a key and a query in common
    int32_t decays;  // of a head and token: 1, or one for each of the keys
    int32_t normalize;  // keys and queries to length 1
    float scale;  // of queries
    const void *q, *k, *v;  // [T, key_heads, keys] twice, [T, heads, values]
    int64_t q_step, k_step, v_step;
    const float *decay, *beta;  // [T, heads, decays], as logarithms; [T, heads]
    void* out;  // [T, heads, values]
};

template <class T> static inline void unit(const T* from, long count, bool normalize, float scale, float* to) {
    vfloat square = all(0.0f), v;
    for (long i = 0; i < count; i += LANES) {
        load_row(from + i, v);
        square += v * v;
        store(to + i, v);
    }
    const float factor = normalize ? scale / std::sqrt(sum_of(square) + 1e-6f) : scale;
    for (long i = 0; i < count; i += LANES) store(to + i, load(to + i) * all(factor));
}

template <class T, int WIDE> static void delta_rule_of(Team& team, const States& s, const DeltaRule& m) {
    constexpr long most_keys = 256;
    const long keys = m.keys, width = WIDE * LANES, blocks = m.values / width;
    const long elements = tokens_of(s) * m.heads * keys * m.values;
    share(team, s.num_runs * m.heads * blocks, elements, [&](long task) {
        const Run& run = s.runs[task / (m.heads * blocks)];
        const long head = task / blocks % m.heads, key_head = head / (m.heads / m.key_heads);
        const long first = task % blocks * width;
        walk(s, run, head * keys * m.values + first, keys, m.values, width, [&](long token, const Block& block) {
            alignas(64) float q[most_keys], k[most_keys], keep[most_keys];
            unit((const T*)m.q + token * m.q_step + key_head * keys, keys, m.normalize, m.scale, q);
            unit((const T*)m.k + token * m.k_step + key_head * keys, keys, m.normalize, 1.0f, k);
            const float* decay = m.decay + (token * m.heads + head) * m.decays;
            for (long i = 0; i < keys; i += LANES)
                store(keep + i, m.decays == 1 ? all(std::exp(decay[0])) : vexp(load(decay + i)));
            vfloat held[2][WIDE], change[WIDE], answer[2][WIDE];  // sums of even and of odd keys
            for (int j = 0; j < WIDE; j++) held[0][j] = held[1][j] = answer[0][j] = answer[1][j] = all(0.0f);
            for (long i = 0; i < keys; i += 2)
                for (int odd = 0; odd < 2; odd++)
                    for (int j = 0; j < WIDE; j++)
                        held[odd][j] += load(block.from + (i + odd) * block.from_step + j * LANES) *
                                        all(keep[i + odd] * k[i + odd]);
            const vfloat beta = all(m.beta[token * m.heads + head]);
            for (int j = 0; j < WIDE; j++) {
                vfloat v;
                load_row((const T*)m.v + token * m.v_step + head * m.values + first + j * LANES, v);
                change[j] = (v - (held[0][j] + held[1][j])) * beta;
            }
            for (long i = 0; i < keys; i += 2)
                for (int odd = 0; odd < 2; odd++) {
                    const vfloat kept = all(keep[i + odd]), key = all(k[i + odd]), query = all(q[i + odd]);
                    for (int j = 0; j < WIDE; j++) {
                        const vfloat v =
                            load(block.from + (i + odd) * block.from_step + j * LANES) * kept + key * change[j];
                        store(block.to + (i + odd) * block.to_step + j * LANES, v);
                        answer[odd][j] += v * query;
                    }
                }
            T* out = (T*)m.out + (token * m.heads + head) * m.values + first;
            for (int j = 0; j < WIDE; j++) store_row(out + j * LANES, answer[0][j] + answer[1][j]);
        });
    });
}

template <class T> static void delta_rule(Team& team, const States& s, const DeltaRule& m) {
    if (m.values % (2 * LANES) == 0) delta_rule_of<T, 2>(team, s, m);
    else delta_rule_of<T, 1>(team, s, m);
}

// Mamba 1. Of each channel a state [size]: each of its numbers decays by its own exp(a * dt), dt * x times b is added,
// and c reads it.
struct SelectiveScan {
    int32_t channels, size;
    const void *x, *b, *c;  // [T, channels], [T, size] twice
    int64_t x_step, b_step, c_step;
    const float *dt, *a, *d;  // [T, channels], [channels, size], [channels] or null
    float* out;  // [T, channels]
};

template <class T> static void selective_scan(Team& team, const States& s, const SelectiveScan& m) {
    constexpr long together = 64, most_size = 64;
    const long size = m.size, vectors = size / LANES, blocks = (m.channels + together - 1) / together;
    const long elements = tokens_of(s) * m.channels * size * 4;  // an exponential each
    share(team, s.num_runs * blocks, elements, [&](long task) {
        const Run& run = s.runs[task / blocks];
        const long first = task % blocks * together, here = std::min(together, m.channels - first);
        walk(s, run, first * size, here, size, size, [&](long token, const Block& block) {
            vfloat b[most_size / LANES], c[most_size / LANES];
            for (long i = 0; i < vectors; i++) {
                load_row((const T*)m.b + token * m.b_step + i * LANES, b[i]);
                load_row((const T*)m.c + token * m.c_step + i * LANES, c[i]);
            }
            const long row = token * m.channels + first;
            for (long r = 0; r < here; r++) {
                const float value = to_float(((const T*)m.x)[token * m.x_step + first + r]), dt = m.dt[row + r];
                const vfloat push = all(value * dt);
                vfloat sum = all(0.0f);
                for (long i = 0; i < vectors; i++) {
                    const vfloat keep = vexp(load(m.a + (first + r) * size + i * LANES) * all(dt));
                    const vfloat v = load(block.from + r * block.from_step + i * LANES) * keep + push * b[i];
                    store(block.to + r * block.to_step + i * LANES, v);
                    sum += v * c[i];
                }
                m.out[row + r] = sum_of(sum) + (m.d ? m.d[first + r] : 0.0f) * value;
            }
        });
    });
}

// A causal convolution of each channel by itself. Of each channel the state holds its last `columns` inputs.
struct Convolution {
    int32_t channels, taps, columns, silu;
    const float *weight, *bias;  // [taps, channels], the newest token's last; [channels] or null
    const void* x;  // [T, channels]
    int64_t x_step;
    void* out;  // [T, channels]
};

template <class T> static void convolution(Team& team, const States& s, const Convolution& m) {
    constexpr long together = 8;  // vectors of channels
    const long vectors = m.channels / LANES, blocks = (vectors + together - 1) / together;
    const long elements = tokens_of(s) * m.channels * m.taps;
    share(team, s.num_runs * blocks, elements, [&](long task) {
        const Run& run = s.runs[task / blocks];
        const long columns = m.columns, before = m.taps - 1;
        const T* const x = (const T*)m.x + run.first * m.x_step;
        for (long i = task % blocks * together; i < std::min(vectors, (task % blocks + 1) * together); i++) {
            const long c = i * LANES;
            T old[LANES * MOST_TAPS];
            if (run.source < 0) memset((void*)old, 0, sizeof old);
            else memcpy((void*)old, s.at<T>(run.source) + c * columns, LANES * columns * sizeof(T));
            vfloat weight[MOST_TAPS], seen[MOST_TAPS];
            for (long j = 0; j < m.taps; j++) weight[j] = load(m.weight + j * m.channels + c);
            for (long j = 0; j < before; j++) {
                float lanes[LANES];
                for (long lane = 0; lane < LANES; lane++) lanes[lane] = to_float(old[lane * columns + columns - before + j]);
                seen[j] = load(lanes);
            }
            const vfloat bias = m.bias ? load(m.bias + c) : all(0.0f);
            for (long t = 0; t < run.tokens; t++) {
                load_row(x + t * m.x_step + c, seen[before]);
                vfloat sum = bias;
                for (long j = 0; j < m.taps; j++) sum += weight[j] * seen[j];
                if (m.silu) sum = silu<sizeof(T) == 4>(sum);
                store_row((T*)m.out + (run.first + t) * m.channels + c, sum);
                for (long j = 0; j < before; j++) seen[j] = seen[j + 1];
            }
            const auto keep = [&](int32_t slot, long tokens) {
                T* const to = s.at<T>(slot) + c * columns;
                for (long lane = 0; lane < LANES; lane++)
                    for (long j = 0; j < columns; j++) {
                        const long t = tokens - columns + j;
                        to[lane * columns + j] = t < 0 ? old[lane * columns + columns + t] : x[t * m.x_step + c + lane];
                    }
            };
            keep(run.target, run.tokens);
            if (run.snapshot >= 0 && run.snapshot_after) keep(run.snapshot, run.snapshot_after);
        }
    });
}
