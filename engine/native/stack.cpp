// A whole decoder stack on CPU: what transformers' Llama-shaped models compute, one call a step.
//
// Per layer, with a barrier between any two:
//     norm -> q, k, v -> rotary, KV into the pool -> attention -> output added -> norm -> gate, up -> down added
//
// The residual stream and all sums are float32; what products read is rounded once to the model's type. Weights are
// packed once at load (matmul.h). Python owns every buffer that it names here; calls come from one thread at a time.
#include <cstdio>
#include <ctime>
#include <memory>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "attention.h"
#include "experts.h"
#include "memory.h"
#include "norm.h"
#include "peak.h"
#include "recurrent.h"

struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm, k_norm: null = none
    const void *qkv, *out, *gate_up, *down;                 // packed; gate and up panel by panel in turn
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;  // null = none; gate_up: as its panels
    int32_t qkv_bits, out_bits, gate_up_bits, down_bits;  // how they are kept (quantized.h)
};

struct Model {
    int32_t is_bf16, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, num_layers, rotary;
    int32_t head_bits;
    float epsilon, scale;
    const float *cos, *sin;  // [context limit, rotary / 2]
    const float* final_norm;
    const void* head;
    const void* embedding;  // [vocabulary, hidden]
    const Layer* layers;
};

struct Step {
    int32_t num_tokens, num_chunks, num_kept;
    const int64_t* token_ids;
    const int32_t* positions;
    const int32_t* kept;  // rows whose logits are wanted
    const Chunk* chunks;
    const int32_t* tables;
    void* pool;
    int64_t block_tokens;
    int64_t rounding;  // of the pool (rounding.h)
    float* logits;  // [num_kept, vocabulary]
    double* seconds;  // [NUM_PHASES], added to; null = nobody asks
    // For a trial, null = none: the stream that each layer is given [layers, num_tokens, hidden], and what it would have
    // been given: the embedding, then what the layer before made; last what the last layer made [layers + 1, ...].
    const float* given;
    float* made;
};

enum Phase { NORM, QKV, ROTARY, ATTENTION, OUT, GATE_UP, DOWN, HEAD, NUM_PHASES };

template <class T> struct Scratch {
    Buffer<float> x, qkv;
    Buffer<T> a, q, o, h;
    std::vector<AttentionScratch<T>> attention;
};

static std::unique_ptr<Team> team;

// Of the processor: what others have of it while this thread is to wait is nobody's phase. Barriers spin, so they count.
static double seconds_now() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

// Root of the mean square; the caller multiplies.
static inline float norm_factor(const float* x, long width, float epsilon) {
    vfloat sum = all(0.0f);
    long i = 0;
    for (; i + LANES <= width; i += LANES) sum += load(x + i) * load(x + i);
    float square = sum_of(sum);
    for (; i < width; i++) square += x[i] * x[i];
    return 1.0f / std::sqrt(square / width + epsilon);
}

template <class T>
static void norm(const float* x, const float* weight, long width, float epsilon, const Rows<T>& out, long row) {
    const vfloat factor = all(norm_factor(x, width, epsilon));
    long i = 0;
    for (; i + LANES <= width; i += LANES) out.put(row, i, load(x + i) * factor * load(weight + i));
    for (; i < width; i++) out.put(row, i, all(x[i]) * factor * all(weight[i]), 1);
}

struct Weight {
    const void* panels;
    long k, n;
    int bits;          // how they are kept
    int together = 1;  // panels that one task takes
    template <class T> long task_bytes() const { return panel_bytes<T>(bits, k) * together; }
    long tasks() const { return (n + PANEL * together - 1) / (PANEL * together); }
};

// Tasks are panels times stripes of rows; a stripe stays in the second cache with all of its columns. `work(panel, from,
// count, ahead)`. What the thread's next task reads is fetched meanwhile: at the end the first of `then`.
template <class T, class Work>
static void over_panels(int thread, long rows, const Weight& w, const Weight& then, Work work) {
    const long fit = std::max<long>(PANEL, std::min(STRIPE, STRIPE_BYTES / (padded(w.k) * (long)sizeof(T)) / PANEL * PANEL));
    long stripes = (rows + fit - 1) / fit;
    while (stripes * w.tasks() < 4 * team->size() && rows / (stripes + 1) >= 2 * PANEL) stripes++;
    const long stripe = (rows + stripes * PANEL - 1) / (stripes * PANEL) * PANEL, panels = w.tasks();
    const long bytes = w.template task_bytes<T>(), steps = (std::min(rows, stripe) + PANEL - 1) / PANEL * w.together;
    const long lines = (bytes / 64 + steps * (padded(w.k) / 32) - 1) / (steps * (padded(w.k) / 32));
    for (long task = thread, next; task < panels * stripes; task = next) {
        next = team->next();
        const long from = task / panels * stripe, count = std::min(rows - from, stripe);
        Ahead ahead;
        if (next < panels * stripes)
            ahead = {(const char*)w.panels + next % panels * bytes, nullptr, (int)lines};
        else if (then.panels)
            ahead = {(const char*)then.panels + thread * then.template task_bytes<T>(), nullptr, (int)lines};
        ahead.end = ahead.at ? ahead.at + (next < panels * stripes ? bytes : then.template task_bytes<T>()) : nullptr;
        if (count > 0) work(task % panels, from, count, ahead);
    }
    team->barrier();
}

// a x weight; `use(row, column, rows, block)` gets sums [rows, 32]; `block` is 32 floats a row.
template <class T, class Use>
static void product(
    int thread, const Rows<const T>& a, long rows, const Weight& w, const float* bias, const Weight& then, Use use) {
    alignas(64) float c[STRIPE * PANEL];
    over_panels<T>(thread, rows, w, then, [&](long panel, long from, long count, Ahead& ahead) {
        const char* b = (const char*)w.panels + panel * panel_bytes<T>(w.bits, w.k);
        stripe_times_panel<T>(a.from(from, 0), count, padded(w.k), w.bits, b, c, ahead, [&](long r, int here) {
            float* block = c + r * PANEL;
            if (bias)
                for (int i = 0; i < here; i++)
                    for (int j = 0; j < PANEL; j += LANES)
                        store(block + i * PANEL + j, load(block + i * PANEL + j) + load(bias + panel * PANEL + j));
            use(from + r, panel * PANEL, here, block);
        });
    });
}

static void rotate(float* x, const Model& m, const float* norm_weight, int32_t position) {
    if (norm_weight) {
        const float factor = norm_factor(x, m.head_dim, m.epsilon);
        for (long i = 0; i < m.head_dim; i++) x[i] = x[i] * factor * norm_weight[i];
    }
    const long half = m.rotary / 2;
    const float *cos = m.cos + position * half, *sin = m.sin + position * half;
    long i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vfloat low = load(x + i), high = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, low * c - high * s);
        store(x + half + i, high * c + low * s);
    }
    for (; i < half; i++) {
        const float low = x[i], high = x[i + half];
        x[i] = low * cos[i] - high * sin[i];
        x[i + half] = high * cos[i] + low * sin[i];
    }
}

template <class T> static void cast(const float* x, long count, T* out) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store_row(out + i, load(x + i));
    for (; i < count; i++) {
        T row[LANES];
        store_row(row, all(x[i]));
        out[i] = row[0];
    }
}

// silu(gate) * up: the panels of one weight come in turn, so a task has both.
template <class T>
static void gate_up(
    int thread, const Rows<const T>& a, long rows, const Weight& w, const float* bias, const Weight& then, const Rows<T>& out) {
    alignas(64) float gate[STRIPE * PANEL], up[STRIPE * PANEL];
    over_panels<T>(thread, rows, w, then, [&](long pair, long from, long count, Ahead& ahead) {
        const long bytes = panel_bytes<T>(w.bits, w.k);
        const char* b = (const char*)w.panels + 2 * pair * bytes;
        const Rows<const T> first = a.from(from, 0);
        stripe_times_panel<T>(first, count, padded(w.k), w.bits, b, gate, ahead, [](long, int) {});
        stripe_times_panel<T>(first, count, padded(w.k), w.bits, b + bytes, up, ahead, [&](long r, int here) {
            const float* b0 = bias ? bias + 2 * pair * PANEL : nullptr;
            for (long i = r; i < r + here; i++) {
                vfloat value[2];
                for (int j = 0; j < 2; j++) {
                    vfloat g = load(gate + i * PANEL + j * LANES), u = load(up + i * PANEL + j * LANES);
                    if (bias) g += load(b0 + j * LANES), u += load(b0 + PANEL + j * LANES);
                    value[j] = silu<sizeof(T) == 4>(g) * u;
                }
                store_rows(out.at(from + i, pair * PANEL), value[0], value[1]);
            }
        });
    });
}

template <class T> static void forward(const Model& m, const Step& s, Scratch<T>& scratch) {
    const long rows = s.num_tokens, whole = (rows + PANEL - 1) / PANEL * PANEL;
    const long hidden = m.hidden, d = m.head_dim;
    const long q_width = m.heads * d, kv_width = m.kv_heads * d;
    const long qkv_width = (q_width + 2 * kv_width + PANEL - 1) / PANEL * PANEL;
    float* x = scratch.x.need(whole * hidden);
    float* qkv = scratch.qkv.need(whole * qkv_width);
    T* q = scratch.q.need(whole * q_width);
    const Rows<T> a = tiled_rows(scratch.a.need(whole * padded(hidden)), padded(hidden));
    const Rows<T> o = tiled_rows(scratch.o.need(whole * padded(q_width)), padded(q_width));
    const Rows<T> h = tiled_rows(scratch.h.need(whole * padded(m.intermediate)), padded(m.intermediate));
    const auto read = [](const Rows<T>& r) { return Rows<const T>{r.data, r.row, r.step, r.lower}; };
    const Pool pool = pool_of<T>(s.pool, s.tables, s.block_tokens, m.kv_heads, d, 0, m.num_layers, (int)s.rounding);
    const Look look{0, 0, m.scale, 0.0f, nullptr};
    Attention<T> attention(s.chunks, s.num_chunks, pool, look, m.heads, team->size(), scratch.attention);
    std::vector<int32_t> chunk_of(rows, -1);
    for (int c = 0; c < s.num_chunks; c++)
        for (int t = 0; t < s.chunks[c].num_tokens; t++) chunk_of[s.chunks[c].first_row + t] = c;

    const auto add = [&](long r, long column, int here, const float* c) {
        const long width = std::min<long>(PANEL, hidden - column);
        for (int i = 0; i < here; i++) {
            float* to = x + (r + i) * hidden + column;
            if (width == PANEL)
                for (long j = 0; j < PANEL; j += LANES) store(to + j, load(to + j) + load(c + i * PANEL + j));
            else
                for (long j = 0; j < width; j++) to[j] += c[i * PANEL + j];
        }
    };
    const auto tap = [&](long r, long l) {
        const long at = (l * rows + r) * hidden;
        memcpy(s.made + at, x + r * hidden, hidden * 4);
        if (l < m.num_layers) memcpy(x + r * hidden, s.given + at, hidden * 4);
    };
    double since = s.seconds ? seconds_now() : 0;
    const auto ended = [&](int thread, Phase phase) {
        if (!s.seconds || thread) return;
        const double now = seconds_now();
        s.seconds[phase] += now - since;
        since = now;
    };

    team->run([&](int thread) {
        begin_products();
        const Weight head{m.head, hidden, m.vocabulary, m.head_bits};
        for (int r = thread; r < rows; r = team->next()) {
            const T* row = (const T*)m.embedding + s.token_ids[r] * hidden;
            for (long i = 0; i < hidden; i++) x[r * hidden + i] = to_float(row[i]);
            if (s.given) tap(r, 0);
            norm(x + r * hidden, m.layers[0].input_norm, hidden, m.epsilon, a, r);
        }
        team->barrier();
        ended(thread, NORM);
        for (int l = 0; l < m.num_layers; l++) {
            const Layer& layer = m.layers[l];
            const long up_width = 2 * ((m.intermediate + PANEL - 1) / PANEL * PANEL);
            const auto qkv_of = [&](const Layer& of) {
                return Weight{of.qkv, hidden, q_width + 2 * kv_width, of.qkv_bits};
            };
            const Weight to_qkv = qkv_of(layer), to_out{layer.out, q_width, hidden, layer.out_bits};
            const Weight to_gate_up{layer.gate_up, hidden, up_width, layer.gate_up_bits, 2};
            const Weight to_down{layer.down, m.intermediate, hidden, layer.down_bits};
            const Weight after = l + 1 < m.num_layers ? qkv_of(m.layers[l + 1]) : head;
            if (l) {
                for (int r = thread; r < rows; r = team->next()) {
                    if (s.given) tap(r, l);
                    norm(x + r * hidden, layer.input_norm, hidden, m.epsilon, a, r);
                }
                team->barrier();
                ended(thread, NORM);
            }
            product<T>(thread, read(a), rows, to_qkv, layer.qkv_bias, to_out,
                       [&](long r, long column, int here, const float* c) {
                           for (int i = 0; i < here; i++)
                               memcpy(qkv + (r + i) * qkv_width + column, c + i * PANEL, PANEL * 4);
                       });
            ended(thread, QKV);
            for (int r = thread; r < rows; r = team->next()) {
                float* row = qkv + r * qkv_width;
                const int32_t position = s.positions[r];
                for (long head = 0; head < m.heads; head++) rotate(row + head * d, m, layer.q_norm, position);
                cast(row, q_width, q + r * q_width);
                if (chunk_of[r] < 0) continue;
                const Chunk& c = s.chunks[chunk_of[r]];
                const long place = c.start + r - c.first_row;  // a token's position says how it is rotated, not where it lies
                for (int head = 0; head < m.kv_heads; head++) {
                    float* key = row + q_width + head * d;
                    rotate(key, m, layer.k_norm, position);
                    write_token<T>(pool, c, l, head, place, key, key + kv_width);
                }
            }
            team->barrier();
            ended(thread, ROTARY);
            attention.run(*team, thread, l, q, q_width, o);
            ended(thread, ATTENTION);
            product<T>(thread, read(o), rows, to_out, layer.out_bias, to_gate_up, add);
            ended(thread, OUT);
            for (int r = thread; r < rows; r = team->next())
                norm(x + r * hidden, layer.post_norm, hidden, m.epsilon, a, r);
            team->barrier();
            ended(thread, NORM);
            gate_up<T>(thread, read(a), rows, to_gate_up, layer.gate_up_bias, to_down, h);
            ended(thread, GATE_UP);
            product<T>(thread, read(h), rows, to_down, layer.down_bias, after, add);
            ended(thread, DOWN);
        }
        if (s.given) {
            for (int r = thread; r < rows; r = team->next()) tap(r, m.num_layers);
            team->barrier();
        }
        for (int r = thread; r < s.num_kept; r = team->next())
            norm(x + s.kept[r] * hidden, m.final_norm, hidden, m.epsilon, a, r);
        team->barrier();
        ended(thread, NORM);
        product<T>(thread, read(a), s.num_kept, head, nullptr, Weight{},
                   [&](long r, long column, int here, const float* c) {
                       const long width = std::min<long>(PANEL, m.vocabulary - column);
                       for (int i = 0; i < here; i++)
                           memcpy(s.logits + (r + i) * m.vocabulary + column, c + i * PANEL, width * 4);
                   });
        ended(thread, HEAD);
        end_products();
    });
}

template <class T> static void pack(int thread, const T* weight, long n, long k, long row_step, uint32_t* out, long panel_step) {
    const long words = panel_words<T>(k), used = k / IN_WORD<T>;
    for (long panel = thread; panel < (n + PANEL - 1) / PANEL; panel = team->next()) {
        const uint32_t* rows[PANEL] = {};
        std::vector<T> tail(PANEL * (used + 1) * IN_WORD<T>, T{});
        for (long i = 0; i < PANEL && panel * PANEL + i < n; i++) {
            const T* row = weight + (panel * PANEL + i) * row_step;
            if (k % IN_WORD<T>) {
                T* copy = &tail[i * (used + 1) * IN_WORD<T>];
                memcpy((void*)copy, row, k * sizeof(T));
                row = copy;
            }
            rows[i] = (const uint32_t*)row;
        }
        const long whole = (k + IN_WORD<T> - 1) / IN_WORD<T>;
        pack_columns(rows, whole, words / PANEL, out + panel * panel_step);
    }
}

extern "C" {

const char* diptych_isa() { return ISA; }

// 0, or -1 when the operating system refuses what this build needs. `cpus` [count]: one for each thread; 0: no matter.
int diptych_start(int threads, const int32_t* cpus, int count) {
#if defined(USE_AMX)
    constexpr int request_permission = 0x1023, tile_data = 18;  // arch_prctl(2), ARCH_REQ_XCOMP_PERM
    if (syscall(SYS_arch_prctl, request_permission, tile_data)) return -1;
#endif
    const std::vector<int> wanted(cpus, cpus + count);
    if (!team || team->size() != threads || team->cpus() != wanted) team.reset(new Team(threads, wanted));
    return 0;
}

int64_t diptych_packed_bytes(int is_bf16, int64_t n, int64_t k) {
    return (n + PANEL - 1) / PANEL * (is_bf16 ? panel_words<bf16>(k) : panel_words<float>(k)) * 4;
}

// weight [n, k], rows `row_step` items apart; panels go to every `stride`-th place, so that two weights can alternate.
void diptych_pack(int is_bf16, const void* weight, int64_t n, int64_t k, int64_t row_step, void* out, int64_t stride) {
    team->run([&](int thread) {
        if (is_bf16) pack(thread, (const bf16*)weight, n, k, row_step, (uint32_t*)out, stride * panel_words<bf16>(k));
        else pack(thread, (const float*)weight, n, k, row_step, (uint32_t*)out, stride * panel_words<float>(k));
    });
}

void diptych_forward(const Model* model, const Step* step) {
    static Scratch<bf16> half;
    static Scratch<float> full;
    if (model->is_bf16) forward(*model, *step, half);
    else forward(*model, *step, full);
}

// One layer's attention for models whose other parts run elsewhere. q [T, heads, head_dim]; k, v [T, kv_heads, head_dim];
// out as q. Of a latent pool (`values` > 0) k is all there is, and out is [T, heads, values].
void diptych_attention(
    int is_bf16, const Step* s, const Look* look, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t values,
    int32_t num_layers, int32_t layer, const void* q, const void* k, const void* v, void* out) {
    const auto run = [&](auto* zero) {
        using T = std::remove_pointer_t<decltype(zero)>;
        const Pool pool =
            pool_of<T>(s->pool, s->tables, s->block_tokens, kv_heads, head_dim, values, num_layers, (int)s->rounding);
        static std::vector<AttentionScratch<T>> scratch;
        Attention<T> attention(s->chunks, s->num_chunks, pool, *look, heads, team->size(), scratch);
        team->run([&](int thread) {
            begin_products();
            for (int c = thread; c < s->num_chunks; c = team->next()) {
                const Chunk& chunk = s->chunks[c];
                for (long t = 0; t < chunk.num_tokens; t++)
                    for (int head = 0; head < kv_heads; head++) {
                        const long from = ((chunk.first_row + t) * kv_heads + head) * head_dim;
                        const T *key = (const T*)k + from, *value = values ? nullptr : (const T*)v + from;
                        write_token<T>(pool, chunk, layer, head, chunk.start + t, key, value);
                    }
            }
            team->barrier();
            const Rows<T> rows = plain_rows((T*)out, heads * pool.value_dim);
            attention.run(*team, thread, layer, (const T*)q, (long)heads * head_dim, rows);
            end_products();
        });
    };
    if (is_bf16) run((bf16*)nullptr);
    else run((float*)nullptr);
}

// A mixture's experts (experts.h). x, out [rows, hidden]; chosen, weights [rows, choices]. Where the gate is torch's:
// `stage` UP fills middle [rows * choices, columns], DOWN reads it with `inner` columns.
void diptych_experts(
    const Experts* e, int32_t stage, int64_t rows, int64_t choices, const int64_t* chosen, const float* weights,
    const void* x, void* middle, void* out) {
    static Mixture<bf16> half;
    static Mixture<float> full;
    const Routed routed{rows, choices, chosen, weights};
    if (e->is_bf16) half.run(*team, *e, (Stage)stage, routed, (const bf16*)x, (bf16*)middle, (bf16*)out);
    else full.run(*team, *e, (Stage)stage, routed, (const float*)x, (float*)middle, (float*)out);
}

// x, out [rows, width]; a row's root mean square becomes 1, times `weight`.
void diptych_norm(int is_bf16, int64_t rows, int64_t width, float epsilon, const float* weight, const void* x, void* out) {
    if (is_bf16) norm_rows(*team, rows, width, epsilon, weight, (const bf16*)x, (bf16*)out);
    else norm_rows(*team, rows, width, epsilon, weight, (const float*)x, (float*)out);
}

// Recurrent layers of models whose other parts run elsewhere (recurrent.h): a step's packed row, states in their slots.
void diptych_state_space(int is_bf16, const States* s, const StateSpace* m) {
    if (is_bf16) state_space<bf16>(*team, *s, *m);
    else state_space<float>(*team, *s, *m);
}

void diptych_delta_rule(int is_bf16, const States* s, const DeltaRule* m) {
    if (is_bf16) delta_rule<bf16>(*team, *s, *m);
    else delta_rule<float>(*team, *s, *m);
}

void diptych_selective_scan(int is_bf16, const States* s, const SelectiveScan* m) {
    if (is_bf16) selective_scan<bf16>(*team, *s, *m);
    else selective_scan<float>(*team, *s, *m);
}

void diptych_convolution(int is_bf16, const States* s, const Convolution* m) {
    if (is_bf16) convolution<bf16>(*team, *s, *m);
    else convolution<float>(*team, *s, *m);
}

void diptych_large_pages(void* data, int64_t bytes) { wish_for_large_pages(data, bytes); }

// Reads all of `data` once: what memory gives at best, the ceiling of decoding one sequence.
double diptych_read(const void* data, int64_t bytes) {
    std::vector<double> sums(team->size() * 16);
    const long piece = 1 << 16;
    team->run([&](int thread) {
        vfloat a = all(0), b = all(0), c = all(0), d = all(0);
        for (long i = thread; i < bytes / piece; i = team->next()) {
            const float* p = (const float*)((const char*)data + i * piece);
            for (long j = 0; j < piece / 4; j += 64) {
                a += load(p + j), b += load(p + j + 16), c += load(p + j + 32), d += load(p + j + 48);
            }
        }
        sums[thread * 16] = sum_of(a + b + c + d);
    });
    return sums[0];
}

// `rounds` of products of registers on every thread (peak.h): how many operations they were, all together.
double diptych_products(int is_bf16, int64_t rounds) {
    std::vector<double> done(team->size() * 16);
    team->run([&](int thread) {
        begin_products();
        done[thread * 16] = is_bf16 ? products_of_registers<bf16>(rounds) : products_of_registers<float>(rounds);
        end_products();
    });
    double sum = 0;
    for (int thread = 0; thread < team->size(); thread++) sum += done[thread * 16];
    return sum;
}
}
