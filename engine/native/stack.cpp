// A whole decoder stack on CPU: what transformers' Llama-shaped models compute, one call a step.
//
// Per layer, with a barrier between any two:
//     norm -> q, k, v -> rotary, KV into the pool -> attention -> output added -> norm -> gate, up -> down added
//
// The residual stream and all sums are float32; what products read is rounded once to the model's type. Weights are
// packed once at load (matmul.h). Python owns every buffer that it names here; calls come from one thread at a time.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sys/mman.h>
#if defined(__linux__) && defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "attention.h"

struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm, k_norm: null = none
    const void *qkv, *out, *gate_up, *down;                 // packed; gate and up panel by panel in turn
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;  // null = none; gate_up: as its panels
};

struct Model {
    int32_t is_bf16, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, num_layers, rotary;
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
    float* logits;  // [num_kept, vocabulary]
};

template <class T> struct Buffer {  // zeroed when it grows, 64-byte aligned, on huge pages where they pay
    T* data = nullptr;
    size_t items = 0;
    T* need(size_t count) {
        if (count > items) {
            free(data);
            const size_t bytes = (count * sizeof(T) + (2 << 20)) / 4096 * 4096;
            if (posix_memalign((void**)&data, 4096, bytes)) abort();
            memset((void*)data, 0, bytes);
            items = count;
        }
        return data;
    }
    ~Buffer() { free(data); }
};

template <class T> struct Scratch {
    Buffer<float> x, qkv;
    Buffer<T> a, q, o, h;
};

static std::unique_ptr<Team> team;

template <class T> static void norm(const float* x, const float* weight, long width, float epsilon, T* out) {
    vfloat sum = all(0.0f);
    long i = 0;
    for (; i + LANES <= width; i += LANES) sum += load(x + i) * load(x + i);
    float square = sum_of(sum);
    for (; i < width; i++) square += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(square / width + epsilon);
    for (i = 0; i + LANES <= width; i += LANES) store_row(out + i, load(x + i) * all(factor) * load(weight + i));
    for (; i < width; i++) {
        T row[LANES];
        store_row(row, all(x[i] * factor * weight[i]));
        out[i] = row[0];
    }
}

// Tasks: panels of the weight, and blocks of rows when there are many. `use(row, column, rows, block)` gets sums
// [rows, 32]; `block` is 32 floats a row.
constexpr int ROW_BLOCK = 128;
template <class T, class Use>
static void product(const T* a, long lda, int rows, const void* weight, long k, long n, const float* bias, Use use) {
    const long words = panel_words<T>(k), panels = (n + PANEL - 1) / PANEL, blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    alignas(64) float c[PANEL * PANEL];
    for (long task; (task = team->next()) < panels * blocks;) {
        const long panel = task / blocks, from = task % blocks * ROW_BLOCK, to = std::min<long>(rows, from + ROW_BLOCK);
        const uint32_t* b = (const uint32_t*)weight + panel * words;
        for (long r = from; r < to; r += PANEL) {
            const int here = (int)std::min<long>(PANEL, to - r);
            times_panel(a + r * lda, lda, here, padded(k), b, c, PANEL, false);
            if (bias)
                for (int i = 0; i < here; i++)
                    for (int j = 0; j < PANEL; j += LANES)
                        store(c + i * PANEL + j, load(c + i * PANEL + j) + load(bias + panel * PANEL + j));
            use(r, panel * PANEL, here, c);
        }
    }
    team->barrier();
}

template <class T> static void rotate(float* x, const Model& m, const float* norm_weight, int32_t position) {
    if (norm_weight) norm(x, norm_weight, m.head_dim, m.epsilon, x);
    const long half = m.rotary / 2;
    const float *cos = m.cos + position * half, *sin = m.sin + position * half;
    for (long i = 0; i < half; i++) {
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
static void gate_up(const T* a, long lda, int rows, const Model& m, const Layer& layer, T* out, long ldo) {
    const long words = panel_words<T>(m.hidden), pairs = (m.intermediate + PANEL - 1) / PANEL;
    const long blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    alignas(64) float gate[PANEL * PANEL], up[PANEL * PANEL];
    for (long task; (task = team->next()) < pairs * blocks;) {
        const long pair = task / blocks, from = task % blocks * ROW_BLOCK, to = std::min<long>(rows, from + ROW_BLOCK);
        const uint32_t* b = (const uint32_t*)layer.gate_up + 2 * pair * words;
        const float* bias = layer.gate_up_bias ? layer.gate_up_bias + 2 * pair * PANEL : nullptr;
        for (long r = from; r < to; r += PANEL) {
            const int here = (int)std::min<long>(PANEL, to - r);
            times_panel(a + r * lda, lda, here, padded(m.hidden), b, gate, PANEL, false);
            times_panel(a + r * lda, lda, here, padded(m.hidden), b + words, up, PANEL, false);
            for (int i = 0; i < here; i++)
                for (int j = 0; j < PANEL; j += LANES) {
                    vfloat g = load(gate + i * PANEL + j), u = load(up + i * PANEL + j);
                    if (bias) g += load(bias + j), u += load(bias + PANEL + j);
                    store_row(out + (r + i) * ldo + pair * PANEL + j, g * inverse(all(1.0f) + vexp(-g)) * u);
                }
        }
    }
    team->barrier();
}

template <class T> static void forward(const Model& m, const Step& s, Scratch<T>& scratch) {
    const long rows = s.num_tokens, whole = (rows + PANEL - 1) / PANEL * PANEL;
    const long hidden = m.hidden, wide = padded(hidden), d = m.head_dim;
    const long q_width = m.heads * d, kv_width = m.kv_heads * d, o_wide = padded(q_width), i_wide = padded(m.intermediate);
    const long qkv_width = (q_width + 2 * kv_width + PANEL - 1) / PANEL * PANEL;
    float* x = scratch.x.need(whole * hidden);
    float* qkv = scratch.qkv.need(whole * qkv_width);
    T* a = scratch.a.need(whole * wide);
    T* q = scratch.q.need(whole * q_width);
    T* o = scratch.o.need(whole * o_wide);
    T* h = scratch.h.need(whole * i_wide);
    const long layer_items = 2 * kv_width * s.block_tokens;
    const Pool pool{s.pool, s.tables, s.block_tokens, m.kv_heads, d, layer_items * m.num_layers, layer_items};
    Attention<T> attention(s.chunks, s.num_chunks, pool, m.heads, team->size());
    std::vector<int32_t> chunk_of(rows, -1);
    for (int c = 0; c < s.num_chunks; c++)
        for (int t = 0; t < s.chunks[c].num_tokens; t++) chunk_of[s.chunks[c].first_row + t] = c;

    const auto add = [&](long r, long column, int here, const float* c) {
        const long width = std::min<long>(PANEL, hidden - column);
        for (int i = 0; i < here; i++) {
            float* to = x + (r + i) * hidden + column;
            for (long j = 0; j < width; j++) to[j] += c[i * PANEL + j];
        }
    };

    team->run([&](int thread) {
        begin_products();
        for (int r; (r = team->next()) < rows;) {
            const T* row = (const T*)m.embedding + s.token_ids[r] * hidden;
            for (long i = 0; i < hidden; i++) x[r * hidden + i] = to_float(row[i]);
            norm(x + r * hidden, m.layers[0].input_norm, hidden, m.epsilon, a + r * wide);
        }
        team->barrier();
        for (int l = 0; l < m.num_layers; l++) {
            const Layer& layer = m.layers[l];
            if (l) {
                for (int r; (r = team->next()) < rows;)
                    norm(x + r * hidden, layer.input_norm, hidden, m.epsilon, a + r * wide);
                team->barrier();
            }
            product(a, wide, rows, layer.qkv, hidden, q_width + 2 * kv_width, layer.qkv_bias,
                    [&](long r, long column, int here, const float* c) {
                        for (int i = 0; i < here; i++)
                            memcpy(qkv + (r + i) * qkv_width + column, c + i * PANEL, PANEL * 4);
                    });
            for (int r; (r = team->next()) < rows;) {
                float* row = qkv + r * qkv_width;
                const int32_t position = s.positions[r];
                for (long head = 0; head < m.heads; head++) rotate<T>(row + head * d, m, layer.q_norm, position);
                cast(row, q_width, q + r * q_width);
                if (chunk_of[r] < 0) continue;
                const Chunk& c = s.chunks[chunk_of[r]];
                for (int head = 0; head < m.kv_heads; head++) {
                    float* key = row + q_width + head * d;
                    rotate<T>(key, m, layer.k_norm, position);
                    cast(key, d, slot_of<T>(pool, c, l, 0, head, position));
                    cast(key + kv_width, d, slot_of<T>(pool, c, l, 1, head, position));
                }
            }
            team->barrier();
            attention.run(*team, thread, l, m.scale, q, q_width, o, o_wide);
            product(o, o_wide, rows, layer.out, q_width, hidden, layer.out_bias, add);
            for (int r; (r = team->next()) < rows;)
                norm(x + r * hidden, layer.post_norm, hidden, m.epsilon, a + r * wide);
            team->barrier();
            gate_up<T>(a, wide, rows, m, layer, h, i_wide);
            product(h, i_wide, rows, layer.down, m.intermediate, hidden, layer.down_bias, add);
        }
        for (int r; (r = team->next()) < s.num_kept;)
            norm(x + s.kept[r] * hidden, m.final_norm, hidden, m.epsilon, a + r * wide);
        team->barrier();
        product(a, wide, s.num_kept, m.head, hidden, m.vocabulary, nullptr,
                [&](long r, long column, int here, const float* c) {
                    const long width = std::min<long>(PANEL, m.vocabulary - column);
                    for (int i = 0; i < here; i++)
                        memcpy(s.logits + (r + i) * m.vocabulary + column, c + i * PANEL, width * 4);
                });
        end_products();
    });
}

template <class T> static void pack(const T* weight, long n, long k, long row_step, uint32_t* out, long panel_step) {
    const long words = panel_words<T>(k), used = k / IN_WORD<T>;
    for (int panel; (panel = team->next()) < (n + PANEL - 1) / PANEL;) {
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

// 0, or -1 when the operating system refuses what this build needs.
int diptych_start(int threads) {
#if defined(__linux__) && defined(__AMX_BF16__)
    constexpr int request_permission = 0x1023, tile_data = 18;  // arch_prctl(2), ARCH_REQ_XCOMP_PERM
    if (syscall(SYS_arch_prctl, request_permission, tile_data)) return -1;
#endif
    if (!team || team->size() != threads) team.reset(new Team(threads));
    return 0;
}

int64_t diptych_packed_bytes(int is_bf16, int64_t n, int64_t k) {
    return (n + PANEL - 1) / PANEL * (is_bf16 ? panel_words<bf16>(k) : panel_words<float>(k)) * 4;
}

// weight [n, k], rows `row_step` items apart; panels go to every `stride`-th place, so that two weights can alternate.
void diptych_pack(int is_bf16, const void* weight, int64_t n, int64_t k, int64_t row_step, void* out, int64_t stride) {
    team->run([&](int) {
        if (is_bf16) pack((const bf16*)weight, n, k, row_step, (uint32_t*)out, stride * panel_words<bf16>(k));
        else pack((const float*)weight, n, k, row_step, (uint32_t*)out, stride * panel_words<float>(k));
    });
}

void diptych_forward(const Model* model, const Step* step) {
    static Scratch<bf16> half;
    static Scratch<float> full;
    if (model->is_bf16) forward(*model, *step, half);
    else forward(*model, *step, full);
}

// One layer's attention for models whose other parts run elsewhere. q, out [T, heads, head_dim]; k, v [T, kv_heads,
// head_dim]; `pool` begins at the layer, `block_items` apart.
void diptych_attention(
    int is_bf16, const Step* s, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t num_layers, int32_t layer,
    float scale, const void* q, const void* k, const void* v, void* out) {
    const long layer_items = 2L * kv_heads * head_dim * s->block_tokens;
    const Pool pool{s->pool, s->tables, s->block_tokens, kv_heads, head_dim, layer_items * num_layers, layer_items};
    const auto run = [&](auto* zero) {
        using T = std::remove_pointer_t<decltype(zero)>;
        Attention<T> attention(s->chunks, s->num_chunks, pool, heads, team->size());
        team->run([&](int thread) {
            begin_products();
            for (int c; (c = team->next()) < s->num_chunks;) {
                const Chunk& chunk = s->chunks[c];
                for (long t = 0; t < chunk.num_tokens; t++)
                    for (int head = 0; head < kv_heads; head++) {
                        const long from = ((chunk.first_row + t) * kv_heads + head) * head_dim;
                        const long bytes = head_dim * sizeof(T);
                        memcpy((void*)slot_of<T>(pool, chunk, layer, 0, head, chunk.start + t), (const T*)k + from, bytes);
                        memcpy((void*)slot_of<T>(pool, chunk, layer, 1, head, chunk.start + t), (const T*)v + from, bytes);
                    }
            }
            team->barrier();
            const long width = (long)heads * head_dim;
            attention.run(*team, thread, layer, scale, (const T*)q, width, (T*)out, width);
            end_products();
        });
    };
    if (is_bf16) run((bf16*)nullptr);
    else run((float*)nullptr);
}

// Large pages for memory that is about to be written for the first time; a wish, not a promise.
void diptych_large_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 2 << 20, from = ((uintptr_t)data + page - 1) / page * page;
    const uintptr_t to = ((uintptr_t)data + bytes) / page * page;
    if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// Reads all of `data` once: what memory gives at best, the ceiling of decoding one sequence.
double diptych_read(const void* data, int64_t bytes) {
    std::vector<double> sums(team->size() * 16);
    const long piece = 1 << 16;
    team->run([&](int thread) {
        vfloat a = all(0), b = all(0), c = all(0), d = all(0);
        for (long i; (i = team->next()) < bytes / piece;) {
            const float* p = (const float*)((const char*)data + i * piece);
            for (long j = 0; j < piece / 4; j += 64) {
                a += load(p + j), b += load(p + j + 16), c += load(p + j + 32), d += load(p + j + 48);
            }
        }
        sums[thread * 16] = sum_of(a + b + c + d);
    });
    return sums[0];
}
}
