// Paged attention over a pool [block][layer][k|v][kv_head][slot][head_dim], without gathering the context.
//
// 1. A task is one key/value head and some rows of one sequence: a row is one token of one query head. The heads that
//    share a key head stand side by side, so a block of keys is packed once for all of them.
// 2. It walks the context in tiles of TILE tokens, packs their keys and values into panels that stay in cache, and
//    folds each tile into its rows' running maximum, sum and output (Milakov and Gimelshein 2018; Dao 2022).
// 3. Every PART tokens the running result is folded into the total. A sequence with few rows has its parts computed as
//    tasks of their own, by several threads, and folded in the same order: the split changes no bit.
//
// Tiles and parts lie at fixed places of the context, and what a mask hides adds exact zeros: a row's result depends
// on its own sequence alone.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "matmul.h"
#include "team.h"

constexpr int TILE = 256;
constexpr int PART = 1024;
constexpr int ROWS_PER_TASK = 256;
constexpr int SCORES = PANEL * PANEL + LANES;  // of a panel of keys; not whole pages apart, which caches dislike

struct Chunk {  // of one sequence in the packed row; layout shared with Python
    int32_t first_row, num_tokens, start, table_at;
};

struct Pool {
    void* base;
    const int32_t* tables;
    long block_tokens, kv_heads, head_dim, block_items, layer_items;
};

template <class T> static inline T* slot_of(const Pool& p, const Chunk& c, int layer, int kv, int head, long token) {
    const long block = p.tables[c.table_at + token / p.block_tokens];
    return (T*)p.base + block * p.block_items + layer * p.layer_items +
           ((kv * p.kv_heads + head) * p.block_tokens + token % p.block_tokens) * p.head_dim;
}

struct Task {
    int chunk, head, first_token, num_tokens;  // tokens within the chunk
    int part;                                  // -1: all of them
    long partial;                              // where the part's result goes
};

struct Fold {  // the parts of one sequence and head
    int chunk, head, parts;
    long partial;
};

// Running results of the rows of one task or part: output, maximum, sum.
struct Running {
    std::vector<float> out, max, sum;
    void begin(long rows, long width) {
        out.assign(rows * width, 0.0f);
        max.assign(rows, -INFINITY);
        sum.assign(rows, 0.0f);
    }
};

// total <- total with part, one row. `exponent`: of two, for one of score.
static inline void fold(
    float* out, float& max, float& sum, const float* part, float part_max, float part_sum, long width, float exponent) {
    const float m = std::max(max, part_max);
    if (m == -INFINITY) return;
    const vfloat ours = vexp2<true>(all((max - m) * exponent)), theirs = vexp2<true>(all((part_max - m) * exponent));
    sum = sum * ours[0] + part_sum * theirs[0];
    max = m;
    for (long d = 0; d < width; d += LANES) store(out + d, load(out + d) * ours + load(part + d) * theirs);
}

template <class T> struct AttentionScratch {  // of one thread
    std::vector<T> q, p;
    std::vector<uint32_t> keys, values;
    std::vector<float> scores;
    Running part, total;
};

template <class T> class Attention {
public:
    Attention(const Chunk* chunks, int count, const Pool& pool, int heads, int threads)
        : chunks_(chunks), pool_(pool), heads_(heads), group_(heads / pool.kv_heads), width_(padded(pool.head_dim)) {
        scratch_.resize(threads);
        for (int c = 0; c < count; c++) plan(c);
        // Long tasks first, so that the last ones to finish are short.
        std::stable_sort(tasks_.begin(), tasks_.end(), [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
        partials_.resize(num_partials_ * group_rows() * (width_ + 2));
    }

    // q and out: [T, heads * head_dim]. Called by every thread; ends with a barrier. `scale` is above 0.
    void run(Team& team, int thread, int layer, float scale, const T* q, long ldq, const Rows<T>& out) {
        auto& s = scratch_[thread];
        const float exponent = scale * 1.44269504088896341f;
        for (int i = thread; i < (int)tasks_.size(); i = team.next()) {
            // Blocks are scattered, so the processor foresees nothing: what comes next is asked for now.
            if (i < team.size()) fetch(tasks_[i], layer);
            if (i + team.size() < (int)tasks_.size()) fetch(tasks_[i + team.size()], layer);
            compute(tasks_[i], s, layer, exponent, q, ldq, out);
        }
        team.barrier();
        if (folds_.empty()) return;
        for (int i = thread; i < (int)folds_.size(); i = team.next()) finish(folds_[i], s, exponent, out);
        team.barrier();
    }

private:
    long group_rows() const { return group_; }

    // The first tile of a task, towards the cache.
    void fetch(const Task& task, int layer) const {
        const Chunk& c = chunks_[task.chunk];
        const long from = task.part < 0 ? 0 : (long)task.part * PART;
        const long to = std::min<long>(c.start + task.first_token, from + TILE);  // new tokens are in the cache already
        for (long t = from; t < to;) {
            const long run = std::min(to - t, pool_.block_tokens - t % pool_.block_tokens);
            for (int half = 0; half < 2; half++) {
                const char* at = (const char*)slot_of<T>(pool_, c, layer, half, task.head, t);
                for (long byte = 0; byte < run * pool_.head_dim * (long)sizeof(T); byte += 64)
                    __builtin_prefetch(at + byte, 0, 2);
            }
            t += run;
        }
    }

    double cost(const Task& t) const {
        const Chunk& c = chunks_[t.chunk];
        const double context = t.part < 0 ? c.start + t.first_token + t.num_tokens : PART;
        return context * (64 + t.num_tokens * group_);
    }

    void plan(int index) {
        const Chunk& c = chunks_[index];
        const int parts = (c.start + c.num_tokens + PART - 1) / PART;
        const int tokens = (int)std::max<long>(1, ROWS_PER_TASK / group_);
        for (int head = 0; head < pool_.kv_heads; head++) {
            if (c.num_tokens == 1 && parts > 1) {
                folds_.push_back({index, head, parts, num_partials_});
                for (int part = 0; part < parts; part++) tasks_.push_back({index, head, 0, 1, part, num_partials_++});
            } else {
                for (int t = 0; t < c.num_tokens; t += tokens)
                    tasks_.push_back({index, head, t, std::min(tokens, c.num_tokens - t), -1, 0});
            }
        }
    }

    float* partial(long index) { return partials_.data() + index * group_rows() * (width_ + 2); }

    void compute(
        const Task& task, AttentionScratch<T>& s, int layer, float exponent, const T* q, long ldq, const Rows<T>& out) {
        const Chunk& c = chunks_[task.chunk];
        const long rows = (long)task.num_tokens * group_, d = pool_.head_dim;
        const long whole = (rows + LANES - 1) / LANES * LANES;  // whole tiles
        s.q.assign(whole * width_, T{});
        for (long r = 0; r < rows; r++) {
            const long token = c.first_row + task.first_token + r / group_, head = task.head * group_ + r % group_;
            memcpy(&s.q[r * width_], q + token * ldq + head * d, d * sizeof(T));
        }
        const long first = c.start + task.first_token, last = first + task.num_tokens;  // positions of the rows
        const long from = task.part < 0 ? 0 : (long)task.part * PART;
        const long to = task.part < 0 ? last : std::min(last, from + PART);
        for (long begin = from; begin < to; begin += PART) {
            s.part.begin(whole, width_);
            for (long tile = begin; tile < std::min(to, begin + PART); tile += TILE)
                walk(c, task, s, layer, exponent, rows, first, tile, std::min<long>(TILE, to - tile));
            if (begin == from) {
                std::swap(s.total, s.part);
                continue;
            }
            for (long r = 0; r < rows; r++)
                fold(&s.total.out[r * width_], s.total.max[r], s.total.sum[r], &s.part.out[r * width_], s.part.max[r],
                     s.part.sum[r], width_, exponent);
        }
        if (task.part >= 0) {
            float* p = partial(task.partial);
            memcpy(p, s.total.out.data(), rows * width_ * 4);
            memcpy(p + rows * width_, s.total.max.data(), rows * 4);
            memcpy(p + rows * (width_ + 1), s.total.sum.data(), rows * 4);
            return;
        }
        for (long r = 0; r < rows; r++) {
            const long token = c.first_row + task.first_token + r / group_, head = task.head * group_ + r % group_;
            write(&s.total.out[r * width_], s.total.sum[r], out, token, head * d);
        }
    }

    void finish(const Fold& f, AttentionScratch<T>& s, float exponent, const Rows<T>& out) {
        const long rows = group_;
        s.total.begin(rows, width_);
        for (long r = 0; r < rows; r++) {
            const float* first = partial(f.partial);
            float* o = &s.total.out[r * width_];
            float m = first[rows * width_ + r], l = first[rows * (width_ + 1) + r];
            memcpy(o, first + r * width_, width_ * 4);
            for (int part = 1; part < f.parts; part++) {
                const float* p = partial(f.partial + part);
                fold(o, m, l, p + r * width_, p[rows * width_ + r], p[rows * (width_ + 1) + r], width_, exponent);
            }
            write(o, l, out, chunks_[f.chunk].first_row, (f.head * group_ + r) * pool_.head_dim);
        }
    }

    void write(const float* o, float sum, const Rows<T>& out, long row, long column) const {
        const vfloat factor = all(1.0f / sum);
        for (long d = 0; d < pool_.head_dim; d += LANES)
            out.put(row, column + d, load(o + d) * factor, std::min<long>(LANES, pool_.head_dim - d));
    }

    // One tile of the context, for all rows of the task.
    void walk(
        const Chunk& c, const Task& task, AttentionScratch<T>& s, int layer, float exponent, long rows, long first,
        long tile, long tokens) {
        const long d = pool_.head_dim, panels = (tokens + PANEL - 1) / PANEL, columns = panels * PANEL;
        const long key_words = panel_words<T>(width_), value_words = columns / IN_WORD<T> * PANEL;
        s.keys.resize(TILE / PANEL * key_words);
        s.values.resize(width_ / PANEL * (TILE / IN_WORD<T>) * PANEL);
        s.scores.resize(TILE / PANEL * SCORES);
        s.p.resize(PANEL * TILE);
        const T *key_rows[TILE], *value_rows[TILE];
        const long to_values = pool_.kv_heads * pool_.block_tokens * d;
        for (long t = 0; t < columns;) {  // a run of slots in one block, or what is missing at the end
            const long slot = (tile + t) % pool_.block_tokens;
            const long run = t < tokens ? std::min(tokens - t, pool_.block_tokens - slot) : columns - t;
            const T* at = t < tokens ? slot_of<T>(pool_, c, layer, 0, task.head, tile + t) : nullptr;
            for (long i = 0; i < run; i++, t++) {
                key_rows[t] = at ? at + i * d : nullptr;
                value_rows[t] = at ? at + to_values + i * d : nullptr;
            }
        }
        for (long j = 0; j < panels; j++)
            pack_columns((const uint32_t* const*)key_rows + j * PANEL, d / IN_WORD<T>, width_ / IN_WORD<T>,
                         &s.keys[j * key_words]);
        pack_values(value_rows, columns, s.values.data(), value_words);
        const Rows<const T> weights = plain_rows((const T*)s.p.data(), TILE);
        Ahead none;
        for (long r = 0; r < rows; r += PANEL) {
            const int here = (int)std::min<long>(PANEL, rows - r);
            const int shape = here <= 16 ? 16 : 32;
            // Panels that no row of the block may see yet would add exact zeros.
            const long seen = std::min(columns, padded(first + (r + here - 1) / group_ - tile + 1));
            if (seen <= 0) continue;
            const Rows<const T> queries = plain_rows((const T*)&s.q[r * width_], width_);
            for (long j = 0; j < seen / PANEL; j++)
                times_panel(queries, here, width_, &s.keys[j * key_words], &s.scores[j * SCORES], PANEL, false, none);
            for (int i = 0; i < here; i++)
                soften(s, i, r + i, exponent, std::min(seen, first + (r + i) / group_ - tile + 1), seen);
            if (here < shape) memset((void*)&s.p[here * TILE], 0, (shape - here) * TILE * sizeof(T));
            for (long j = 0; j < width_ / PANEL; j++)
                times_panel(weights, here, seen, &s.values[j * value_words], &s.part.out[r * width_ + j * PANEL], width_, true,
                            none);
        }
    }

    void pack_values(const bf16* const* rows, long columns, uint32_t* out, long panel) const {
        const long d = pool_.head_dim;
        alignas(64) static const bf16 none[512] = {};
#if defined(__AVX512BW__)
        alignas(64) static const uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
#endif
        for (long t = 0; t < columns; t += 2) {
            const uint16_t* a = (const uint16_t*)(rows[t] ? rows[t] : none);
            const uint16_t* b = (const uint16_t*)(rows[t + 1] ? rows[t + 1] : none);
            for (long j = 0; j < width_; j += PANEL) {
                uint32_t* words = out + j / PANEL * panel + t / 2 * PANEL;
                if (j + PANEL <= d) {
#if defined(__AVX512BW__)
                    const __m512i x = _mm512_loadu_si512(a + j), y = _mm512_loadu_si512(b + j);
                    _mm512_storeu_si512(words, _mm512_permutex2var_epi16(x, first, y));
                    _mm512_storeu_si512(words + LANES, _mm512_permutex2var_epi16(x, second, y));
#else
                    for (int i = 0; i < PANEL; i++) words[i] = a[j + i] | (uint32_t)b[j + i] << 16;
#endif
                } else
                    for (int i = 0; i < PANEL; i++) words[i] = j + i < d ? a[j + i] | (uint32_t)b[j + i] << 16 : 0;
            }
        }
    }

    void pack_values(const float* const* rows, long columns, uint32_t* out, long panel) const {
        const long d = pool_.head_dim;
        for (long t = 0; t < columns; t++)
            for (long j = 0; j < width_; j += PANEL) {
                uint32_t* words = out + j / PANEL * panel + t * PANEL;
                const long count = rows[t] ? std::min<long>(PANEL, d - j) : 0;
                if (count > 0) memcpy(words, rows[t] + j, count * 4);
                if (count < PANEL) memset(words + std::max(0L, count), 0, (PANEL - std::max(0L, count)) * 4);
            }
    }

    // Scores of row `i` -> weights in s.p; the running result of row `r` is scaled to the new maximum.
    // `visible`: how many of the tile's tokens the row may see; none if below 1, at most `columns`.
    void soften(AttentionScratch<T>& s, int i, long r, float exponent, long visible, long columns) {
        float* const scores = &s.scores[i * PANEL];
        T* p = &s.p[(long)i * TILE];
        if (visible <= 0) {
            memset((void*)p, 0, columns * sizeof(T));
            return;
        }
        constexpr bool fine = sizeof(T) == 4;
        const long panels = (visible + PANEL - 1) / PANEL, end = panels * PANEL;
        if (visible < end) {
            float* last = scores + (panels - 1) * SCORES;
            store(last, only(load(last), visible - (end - PANEL)));
            store(last + LANES, only(load(last + LANES), visible - (end - LANES)));
        }
        vfloat most = load(scores), other = load(scores + LANES);
        for (long j = 1; j < panels; j++) {
            most = vmax(most, load(scores + j * SCORES));
            other = vmax(other, load(scores + j * SCORES + LANES));
        }
        const float old = s.part.max[r], max = std::max(old, max_of(vmax(most, other)));
        const vfloat factor = all(exponent), shift = all(-max * exponent);
        vfloat sum = all(0.0f), more = all(0.0f);
        for (long j = 0; j < panels; j++) {
            const vfloat e = vexp2<fine>(load(scores + j * SCORES) * factor + shift);
            const vfloat f = vexp2<fine>(load(scores + j * SCORES + LANES) * factor + shift);
            sum += e;
            more += f;
            store_rows(p + j * PANEL, e, f);
        }
        if (end < columns) memset((void*)(p + end), 0, (columns - end) * sizeof(T));
        s.part.max[r] = max;
        const float keep = old == max ? 1.0f : vexp2<true>(all((old - max) * exponent))[0];
        s.part.sum[r] = s.part.sum[r] * keep + sum_of(sum + more);
        if (old != max)
            for (long d = 0; d < width_; d += LANES) {
                float* o = &s.part.out[r * width_ + d];
                store(o, load(o) * all(keep));
            }
    }

    const Chunk* chunks_;
    const Pool pool_;
    const long heads_, group_, width_;
    std::vector<Task> tasks_;
    std::vector<Fold> folds_;
    long num_partials_ = 0;
    std::vector<float> partials_;
    std::vector<AttentionScratch<T>> scratch_;
};
