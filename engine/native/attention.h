// Paged attention over a pool [block][layer][k|v][kv_head][slot][head_dim], without gathering the context. In a latent
// pool there are keys only, and the first `value_dim` elements of a key are its value. In a rounded pool (rounding.h) a
// token's value stands behind its key: [block][layer][kv_head][slot][row].
//
// 1. A task is one key/value head and some rows of one sequence: a row is one token of one query head. The heads that
//    share a key head stand side by side, so a block of keys is packed once for all of them.
// 2. It walks the context, from the first token that any of its rows looks at, in tiles of TILE tokens, packs their keys
//    and values into panels that stay in cache, and folds each tile into its rows' running maximum, sum and output
//    (Milakov and Gimelshein 2018; Dao 2022).
// 3. Every PART tokens the running result is folded into the total. A sequence with few rows has its parts computed as
//    tasks of their own, by several threads, and folded in the same order: the split changes no bit.
//
// Tiles and parts lie at fixed places of the context, and what a mask hides adds exact zeros: a row's result depends
// on its own sequence alone. What no row looks at is not read: its blocks may be gone.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "matmul.h"
#include "rounding.h"
#include "team.h"

constexpr int TILE = 256;
constexpr int PART = 1024;
constexpr int ROWS_PER_TASK = 256;
constexpr int WIDEST = 1024;  // elements of a key; library.py has it as well
constexpr int SCORES = PANEL * PANEL + LANES;  // of a panel of keys; not whole pages apart, which caches dislike

struct Chunk {  // of one sequence in the packed row; layout shared with Python
    int32_t first_row, num_tokens, start, table_at;
};

struct Pool {
    char* base;
    const int32_t* tables;
    long block_tokens, kv_heads, head_dim, value_dim, block_bytes, layer_bytes;
    long token_bytes;  // from a token's key to the next one's
    long to_values;    // bytes from a key to its value
    int rounding;
    bool apart() const { return to_values && !rounding; }  // values have a plane of their own
    bool small_keys() const { return rounding == SMALL || rounding == FLOATS; }
    bool small_values() const { return rounding != WIDE; }
    bool floats() const { return rounding >= FLOATS; }
};

// `values`: 0, or the elements of a latent key that are its value.
template <class T>
static inline Pool pool_of(
    void* base, const int32_t* tables, long block_tokens, long kv_heads, long head_dim, long values, long layers,
    int rounding) {
    const long wide = head_dim * (long)sizeof(T), small = head_dim + SCALE_BYTES;
    const long key = rounding == SMALL || rounding == FLOATS ? small : wide, token = rounding ? (key + small + 3) / 4 * 4 : wide;
    const long plane = kv_heads * block_tokens * token, layer = values || rounding ? plane : 2 * plane;
    return {(char*)base, tables, block_tokens, kv_heads, head_dim, values ? values : head_dim, layer * layers, layer,
            token, values ? 0 : rounding ? key : plane, rounding};
}

// What a layer does; layout shared with Python. At most one of `window` and `chunk` is above 0.
struct Look {
    int32_t window, chunk;  // a token looks at the last `window` tokens, or at those of its own chunk
    float scale;            // above 0
    float softcap;          // score -> softcap * tanh(score / softcap); 0: none
    const float* sinks;     // [heads]: a score of each head that has no value; null: none

    // The first token that one at `position` looks at.
    long first(long position) const {
        if (window) return std::max(0L, position - window + 1);
        return chunk ? position / chunk * chunk : 0;
    }
    // Scores are kept as products give them, or capped; to powers of two they come by this factor.
    float exponent() const { return (softcap > 0 ? 1.0f : scale) * 1.44269504088896341f; }
};

// The key of a token; its value lies p.to_values behind it.
static inline char* slot_of(const Pool& p, const Chunk& c, int layer, int head, long token) {
    const long block = p.tables[c.table_at + token / p.block_tokens];
    return p.base + block * p.block_bytes + layer * p.layer_bytes +
           (head * p.block_tokens + token % p.block_tokens) * p.token_bytes;
}

// Writes a key and its value, which are T or float, to a pool of T. Latent: there is no value.
template <class T, class X>
static inline void write_token(const Pool& p, const Chunk& c, int layer, int head, long token, const X* key, const X* value) {
    char* to = slot_of(p, c, layer, head, token);
    if (p.small_keys()) round_row(p.floats(), key, p.head_dim, to);
    else keep_row(key, p.head_dim, (T*)to);
    if (!value) return;
    if (p.small_values()) round_row(p.floats(), value, p.head_dim, to + p.to_values);
    else keep_row(value, p.head_dim, (T*)(to + p.to_values));
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
    float key_scales[TILE], value_scales[TILE];  // of a rounded pool's tile
    std::vector<float> q_scales;                 // of rows of whole numbers (whole.h)
    float p_scales[PANEL];                       // of their weights in a tile
    std::vector<float> scores;
    Running part, total;
};

template <class T> class Attention {
public:
    // `scratch` is kept from step to step.
    Attention(
        const Chunk* chunks, int count, const Pool& pool, const Look& look, int heads, int threads,
        std::vector<AttentionScratch<T>>& scratch)
        : chunks_(chunks), pool_(pool), look_(look), group_(heads / pool.kv_heads), key_width_(padded(pool.head_dim)),
          width_(padded(pool.value_dim)), exponent_(look.exponent()), scratch_(scratch) {
        scratch_.resize(threads);
        for (int c = 0; c < count; c++) plan(c);
        // Long tasks first, so that the last ones to finish are short.
        std::stable_sort(tasks_.begin(), tasks_.end(), [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
        partials_.resize(num_partials_ * group_rows() * (width_ + 2));
    }

    // q: [T, heads * head_dim], out: [T, heads * value_dim]. Called by every thread; ends with a barrier.
    void run(Team& team, int thread, int layer, const T* q, long ldq, const Rows<T>& out) {
        auto& s = scratch_[thread];
        for (int i = thread; i < (int)tasks_.size(); i = team.next()) {
            // Blocks are scattered, so the processor foresees nothing: what comes next is asked for now.
            if (i < team.size()) fetch(tasks_[i], layer);
            if (i + team.size() < (int)tasks_.size()) fetch(tasks_[i + team.size()], layer);
            compute(tasks_[i], s, layer, q, ldq, out);
        }
        team.barrier();
        if (folds_.empty()) return;
        for (int i = thread; i < (int)folds_.size(); i = team.next()) finish(folds_[i], s, out);
        team.barrier();
    }

private:
    long group_rows() const { return group_; }
    // Products with whole numbers (whole.h).
    bool counts_keys() const { return COUNTS<T> && pool_.small_keys() && !pool_.floats(); }
    bool counts_values() const { return COUNTS<T> && pool_.small_values() && !pool_.floats(); }

    // The first tile of a task, towards the cache.
    void fetch(const Task& task, int layer) const {
        const Chunk& c = chunks_[task.chunk];
        const long from = begin_of(task);
        const long to = std::min<long>(c.start + task.first_token, from + TILE);  // new tokens are in the cache already
        for (long t = from; t < to;) {
            const long run = std::min(to - t, pool_.block_tokens - t % pool_.block_tokens);
            for (int half = 0; half < (pool_.apart() ? 2 : 1); half++) {
                const char* at = slot_of(pool_, c, layer, task.head, t) + half * pool_.to_values;
                for (long byte = 0; byte < run * pool_.token_bytes; byte += 64)
                    __builtin_prefetch(at + byte, 0, 2);
            }
            t += run;
        }
    }

    // The first token that a row of the task looks at.
    long begin_of(const Task& t) const {
        const long first = look_.first(chunks_[t.chunk].start + t.first_token);
        return t.part < 0 ? first : std::max(first, (long)t.part * PART);
    }

    double cost(const Task& t) const {
        const Chunk& c = chunks_[t.chunk];
        const double context = t.part < 0 ? c.start + t.first_token + t.num_tokens - begin_of(t) : PART;
        return context * (64 + t.num_tokens * group_);
    }

    void plan(int index) {
        const Chunk& c = chunks_[index];
        const int first_part = look_.first(c.start) / PART;
        const int parts = (c.start + c.num_tokens + PART - 1) / PART - first_part;
        const int tokens = (int)std::max<long>(1, ROWS_PER_TASK / group_);
        for (int head = 0; head < pool_.kv_heads; head++) {
            if (c.num_tokens == 1 && parts > 1) {
                folds_.push_back({index, head, parts, num_partials_});
                for (int part = first_part; part < first_part + parts; part++)
                    tasks_.push_back({index, head, 0, 1, part, num_partials_++});
            } else {
                for (int t = 0; t < c.num_tokens; t += tokens)
                    tasks_.push_back({index, head, t, std::min(tokens, c.num_tokens - t), -1, 0});
            }
        }
    }

    float* partial(long index) { return partials_.data() + index * group_rows() * (width_ + 2); }

    void compute(
        const Task& task, AttentionScratch<T>& s, int layer, const T* q, long ldq, const Rows<T>& out) {
        const Chunk& c = chunks_[task.chunk];
        const long rows = (long)task.num_tokens * group_, d = pool_.head_dim;
        const long whole = (rows + LANES - 1) / LANES * LANES;  // whole tiles
        s.q.assign(whole * key_width_, T{});
        if (counts_keys()) s.q_scales.resize(rows);
        for (long r = 0; r < rows; r++) {
            const long token = c.first_row + task.first_token + r / group_, head = task.head * group_ + r % group_;
            const T* from = q + token * ldq + head * d;
            if constexpr (COUNTS<T>)
                if (counts_keys()) {
                    s.q_scales[r] = whole_row(from, d, d > 512 ? 16383.0f : MOST_OF_16, &s.q[r * key_width_]);
                    continue;
                }
            memcpy((void*)&s.q[r * key_width_], from, d * sizeof(T));
        }
        const long first = c.start + task.first_token, last = first + task.num_tokens;  // positions of the rows
        const long from = begin_of(task) / TILE * TILE;
        const long to = task.part < 0 ? last : std::min(last, (task.part + 1L) * PART);
        for (long begin = from, end; begin < to; begin = end) {
            end = begin / PART * PART + PART;
            s.part.begin(whole, width_);
            for (long tile = begin; tile < std::min(to, end); tile += TILE)
                walk(c, task, s, layer, rows, first, tile, std::min<long>(TILE, to - tile));
            if (begin == from) {
                std::swap(s.total, s.part);
                continue;
            }
            for (long r = 0; r < rows; r++)
                fold(&s.total.out[r * width_], s.total.max[r], s.total.sum[r], &s.part.out[r * width_], s.part.max[r],
                     s.part.sum[r], width_, exponent_);
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
            write(&s.total.out[r * width_], s.total.max[r], s.total.sum[r], out, token, head);
        }
    }

    void finish(const Fold& f, AttentionScratch<T>& s, const Rows<T>& out) {
        const long rows = group_;
        s.total.begin(rows, width_);
        for (long r = 0; r < rows; r++) {
            const float* first = partial(f.partial);
            float* o = &s.total.out[r * width_];
            float m = first[rows * width_ + r], l = first[rows * (width_ + 1) + r];
            memcpy(o, first + r * width_, width_ * 4);
            for (int part = 1; part < f.parts; part++) {
                const float* p = partial(f.partial + part);
                fold(o, m, l, p + r * width_, p[rows * width_ + r], p[rows * (width_ + 1) + r], width_, exponent_);
            }
            write(o, m, l, out, chunks_[f.chunk].first_row, f.head * group_ + r);
        }
    }

    // The sink of a head is one more score, at last.
    void write(const float* o, float max, float sum, const Rows<T>& out, long row, long head) const {
        float inverse = 1.0f / sum;
        if (look_.sinks) {
            const float ours = max * exponent_, sink = look_.sinks[head] * 1.44269504088896341f;
            const float most = std::max(ours, sink), keep = vexp2<true>(all(ours - most))[0];
            inverse = keep / (sum * keep + vexp2<true>(all(sink - most))[0]);
        }
        const vfloat factor = all(inverse);
        const long d = pool_.value_dim;
        for (long i = 0; i < d; i += LANES)
            out.put(row, head * d + i, load(o + i) * factor, std::min<long>(LANES, d - i));
    }

    // One tile of the context, for all rows of the task.
    void walk(
        const Chunk& c, const Task& task, AttentionScratch<T>& s, int layer, long rows, long first, long tile,
        long tokens) {
        const long panels = (tokens + PANEL - 1) / PANEL, columns = panels * PANEL;
        const long key_words = panel_words<T>(key_width_), value_words = columns / IN_WORD<T> * PANEL;
        s.keys.resize(TILE / PANEL * key_words);
        s.values.resize(width_ / PANEL * (TILE / IN_WORD<T>) * PANEL);
        s.scores.resize(TILE / PANEL * SCORES);
        s.p.resize(PANEL * TILE);
        const T *key_rows[TILE], *value_rows[TILE];
        const long unseen = std::max(0L, look_.first(first) - tile), whole = unseen / PANEL * PANEL;
        for (long t = whole; t < unseen; t++) key_rows[t] = value_rows[t] = nullptr;
        for (long t = unseen; t < columns;) {  // a run of slots in one block, or what is missing at the end
            const long slot = (tile + t) % pool_.block_tokens;
            const long run = t < tokens ? std::min(tokens - t, pool_.block_tokens - slot) : columns - t;
            const char* at = t < tokens ? slot_of(pool_, c, layer, task.head, tile + t) : nullptr;
            for (long i = 0; i < run; i++, t++) {
                key_rows[t] = at ? (const T*)(at + i * pool_.token_bytes) : nullptr;
                value_rows[t] = at ? (const T*)(at + i * pool_.token_bytes + pool_.to_values) : nullptr;
            }
        }
        const bool keys_as_they_are = counts_keys() && few(rows), values_as_they_are = counts_values() && few(rows);
        for (long j = whole; j < columns; j += PANEL) {
            if (pool_.small_keys()) {
                const auto pack = pool_.floats() ? pack_small_keys<true, T> : pack_small_keys<false, T>;
                if (!keys_as_they_are) pack(key_rows + j, pool_.head_dim, key_width_, &s.keys[j / PANEL * key_words]);
                find_scales(key_rows + j, s.key_scales + j);
            } else
                pack_keys(key_rows + j, &s.keys[j / PANEL * key_words]);
            if (pool_.small_values()) {
                const auto pack = pool_.floats() ? pack_small_values<true, T> : pack_small_values<false, T>;
                if (!values_as_they_are) pack(value_rows, j, j + PANEL, pool_.value_dim, s.values.data(), value_words);
                find_scales(value_rows + j, s.value_scales + j);
            } else
                pack_values(value_rows, j, j + PANEL, s.values.data(), value_words);
        }
        const Rows<const T> weights = plain_rows((const T*)s.p.data(), TILE);
        Ahead none;
        for (long r = 0; r < rows; r += PANEL) {
            const int here = (int)std::min<long>(PANEL, rows - r);
            const int shape = here <= 16 ? 16 : 32;
            // Panels that no row of the block looks at would add exact zeros.
            const long begin = std::max(0L, look_.first(first + r / group_) - tile) / PANEL * PANEL;
            const long end = std::min(columns, padded(first + (r + here - 1) / group_ - tile + 1));
            if (begin >= end) continue;
            const Rows<const T> queries = plain_rows((const T*)&s.q[r * key_width_], key_width_);
            if (counts_keys())
                count_scores(s, queries, here, key_rows, rows, begin, end);
            else
                for (long j = begin / PANEL; j < end / PANEL; j++)
                    times_panel(queries, here, key_width_, &s.keys[j * key_words], &s.scores[j * SCORES], PANEL, false, none);
            for (int i = 0; i < here; i++) {
                const long position = first + (r + i) / group_;
                soften(s, i, r + i, look_.first(position) - tile, std::min(end, position - tile + 1), begin, end);
            }
            if (here < shape) memset((void*)&s.p[here * TILE], 0, (shape - here) * TILE * sizeof(T));
            if (counts_values()) {
                count_values(s, weights, r, here, value_rows, value_words, rows, begin, end);
                continue;
            }
            for (long j = 0; j < width_ / PANEL; j++)
                times_panel(weights.from(0, begin), here, end - begin, &s.values[j * value_words + begin / IN_WORD<T> * PANEL],
                            &s.part.out[r * width_ + j * PANEL], width_, true, none);
        }
    }

    // For a few rows panels would be most of the work: they read keys and values as they are.
    bool few(long rows) const { return rows <= TOGETHER && pool_.head_dim % PANEL == 0; }

    // Scores of the tile's tokens begin .. end, as whole numbers.
    __attribute__((noinline)) void count_scores(
        AttentionScratch<T>& s, const Rows<const T>& queries, int here, const T* const* keys, long rows, long begin,
        long end) const {
        if constexpr (COUNTS<T>)
            for (long j = begin / PANEL; j < end / PANEL; j++) {
                int32_t* sums = (int32_t*)&s.scores[j * SCORES];
                if (few(rows)) times_small_keys(queries, here, keys + j * PANEL, pool_.head_dim, key_width_, sums);
                else times_whole(queries, here, key_width_, &s.keys[j * panel_words<T>(key_width_)], sums);
            }
    }

    // Weighted values of the tile's tokens begin .. end, added to the result of rows r .. r + here.
    __attribute__((noinline)) void count_values(
        AttentionScratch<T>& s, const Rows<const T>& weights, long r, int here, const T* const* values, long panel,
        long rows, long begin, long end) const {
        if constexpr (COUNTS<T>) {
            alignas(64) int32_t sums[PANEL * PANEL];
            for (long j = 0; j < width_ / PANEL; j++) {
                if (few(rows))
                    in_groups(here, [&](auto count, int g) {
                        rows_times_values<count.value>(
                            weights.from(g, begin), values + begin, end - begin, j * PANEL, sums + g * PANEL);
                    });
                else times_whole(weights.from(0, begin), here, end - begin, &s.values[j * panel + begin / 2 * PANEL], sums);
                for (int i = 0; i < here; i++)
                    for (long k = 0; k < PANEL; k += LANES) {
                        float* o = &s.part.out[(r + i) * width_ + j * PANEL + k];
                        store(o, load(o) + counted(sums + i * PANEL + k) * all(s.p_scales[i]));
                    }
            }
        }
    }

    static vfloat counted(const void* sums) { return to_floats(as_ints(load_words((const uint32_t*)sums))); }

    // Of a panel.
    void find_scales(const T* const* rows, float* scales) const {
        for (int i = 0; i < PANEL; i++) scales[i] = rows[i] ? scale_of(rows[i], pool_.head_dim) : 0.0f;
    }

    void pack_keys(const T* const* rows, uint32_t* out) const {
        const long d = pool_.head_dim, words = d / IN_WORD<T>;
        pack_columns((const uint32_t* const*)rows, words, key_width_ / IN_WORD<T>, out);
        if (d % IN_WORD<T>)  // half a word
            for (int i = 0; i < PANEL; i++) {
                uint16_t last = 0;
                if (rows[i]) memcpy(&last, rows[i] + d - 1, 2);
                out[words * PANEL + i] = last;
            }
    }

    // Rows from .. to of the tile; what is before them is not read.
    void pack_values(const bf16* const* rows, long from, long to, uint32_t* out, long panel) const {
        const long d = pool_.value_dim;
        alignas(64) static const bf16 none[WIDEST] = {};
#if defined(__AVX512BW__)
        alignas(64) static const uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
#endif
        for (long t = from; t < to; t += 2) {
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
                    for (int i = 0; i < PANEL; i += LANES)
                        store_words(words + i, load_halves(a + j + i) | load_halves(b + j + i) << 16);
#endif
                } else
                    for (int i = 0; i < PANEL; i++) words[i] = j + i < d ? a[j + i] | (uint32_t)b[j + i] << 16 : 0;
            }
        }
    }

    void pack_values(const float* const* rows, long from, long to, uint32_t* out, long panel) const {
        const long d = pool_.value_dim;
        for (long t = from; t < to; t++)
            for (long j = 0; j < width_; j += PANEL) {
                uint32_t* words = out + j / PANEL * panel + t * PANEL;
                const long count = rows[t] ? std::min<long>(PANEL, d - j) : 0;
                if (count > 0) memcpy(words, rows[t] + j, count * 4);
                if (count < PANEL) memset(words + std::max(0L, count), 0, (PANEL - std::max(0L, count)) * 4);
            }
    }

    // Scores of row `i` -> weights in s.p; the running result of row `r` is scaled to the new maximum. The row looks at
    // the tile's tokens low .. high, if there are any; others get weight zero, in columns from .. to.
    void soften(AttentionScratch<T>& s, int i, long r, long low, long high, long from, long to) {
        float* const scores = &s.scores[i * PANEL];
        T* p = &s.p[(long)i * TILE];
        s.p_scales[i] = 0.0f;
        if (low >= high || high <= 0) {
            memset((void*)(p + from), 0, (to - from) * sizeof(T));
            return;
        }
        constexpr bool fine = sizeof(T) == 4;
        const long begin = std::max(0L, low) / PANEL, panels = (high + PANEL - 1) / PANEL, end = panels * PANEL;
        if (pool_.small_keys()) {
            const vfloat ours = all(counts_keys() ? s.q_scales[r] : 1.0f);
            for (long j = begin; j < panels; j++)
                for (long k = 0; k < PANEL; k += LANES) {
                    float* at = scores + j * SCORES + k;
                    const vfloat scale = load(s.key_scales + j * PANEL + k);
                    store(at, counts_keys() ? counted(at) * (scale * ours) : load(at) * scale);
                }
        }
        if (look_.softcap > 0) {
            const vfloat inner = all(look_.scale / look_.softcap), outer = all(look_.softcap);
            for (long j = begin; j < panels; j++)
                for (float* at = scores + j * SCORES; at < scores + j * SCORES + PANEL; at += LANES)
                    store(at, vtanh(load(at) * inner) * outer);
        }
        if (high < end) {
            float* last = scores + (panels - 1) * SCORES;
            store(last, only(load(last), high - (end - PANEL)));
            store(last + LANES, only(load(last + LANES), high - (end - LANES)));
        }
        if (low > begin * PANEL) {
            float* first = scores + begin * SCORES;
            store(first, but(load(first), low - begin * PANEL));
            store(first + LANES, but(load(first + LANES), low - begin * PANEL - LANES));
        }
        vfloat most = load(scores + begin * SCORES), other = load(scores + begin * SCORES + LANES);
        for (long j = begin + 1; j < panels; j++) {
            most = vmax(most, load(scores + j * SCORES));
            other = vmax(other, load(scores + j * SCORES + LANES));
        }
        const float old = s.part.max[r], max = std::max(old, max_of(vmax(most, other)));
        const vfloat factor = all(exponent_), shift = all(-max * exponent_);
        vfloat sum = all(0.0f), more = all(0.0f), largest = all(0.0f), odd = all(0.0f);
        for (long j = begin; j < panels; j++) {
            vfloat e = vexp2<fine>(load(scores + j * SCORES) * factor + shift);
            vfloat f = vexp2<fine>(load(scores + j * SCORES + LANES) * factor + shift);
            sum += e;
            more += f;
            if (pool_.small_values()) {
                const float* scales = s.value_scales + j * PANEL;
                e = e * load(scales);
                f = f * load(scales + LANES);
            }
            if (counts_values()) {
                store(scores + j * SCORES, e);
                store(scores + j * SCORES + LANES, f);
                largest = vmax(largest, vmax(e, f));
                odd += (e - e) + (f - f);  // NaN where a scale is, which `largest` need not show
            } else
                store_rows(p + j * PANEL, e, f);
        }
        if constexpr (COUNTS<T>)
            if (counts_values()) count_weights(s, i, max_of(largest) + sum_of(odd), begin, panels);
        if (from < begin * PANEL) memset((void*)(p + from), 0, (begin * PANEL - from) * sizeof(T));
        if (end < to) memset((void*)(p + end), 0, (to - end) * sizeof(T));
        s.part.max[r] = max;
        const float keep = old == max ? 1.0f : vexp2<true>(all((old - max) * exponent_))[0];
        s.part.sum[r] = s.part.sum[r] * keep + sum_of(sum + more);
        if (old != max)
            for (long d = 0; d < width_; d += LANES) {
                float* o = &s.part.out[r * width_ + d];
                store(o, load(o) * all(keep));
            }
    }

    // The weights of a row, which stand in place of its scores, as whole numbers.
    __attribute__((noinline)) void count_weights(AttentionScratch<T>& s, int i, float largest, long begin, long end) const {
        const bool none = largest < LEAST_COUNTED;
        const vfloat factor = all(none ? 0.0f : MOST_OF_16 / largest);
        for (long j = begin; j < end; j++)
            for (long k = 0; k < PANEL; k += LANES)
                store_whole(&s.p[(long)i * TILE + j * PANEL + k], load(&s.scores[i * PANEL + j * SCORES + k]) * factor);
        s.p_scales[i] = none ? 0.0f : largest / MOST_OF_16;
    }

    const Chunk* chunks_;
    const Pool pool_;
    const Look look_;
    const long group_, key_width_, width_;
    const float exponent_;
    std::vector<Task> tasks_;
    std::vector<Fold> folds_;
    long num_partials_ = 0;
    std::vector<float> partials_;
    std::vector<AttentionScratch<T>>& scratch_;
};
