// Products of a few rows with packed panels, the one inner loop of everything here.
//
// A panel holds 32 columns of a matrix [K, N]; its words lie as [K / 2][32] for bfloat16 (a word is two neighbours in K)
// and as [K][32] for float32. K is padded with zeros to a multiple of 32. This is the tile layout of AMX, and other
// instruction sets read it as well:
//
//     AMX           16 x 16 tiles, two by two
//     AVX512-BF16   dot products of pairs
//     AVX2          a word is shifted into two floats; where many rows share a panel, once for all of them
//     any other     a word is shifted into two floats; the compiler picks the vectors
//
// A row's result is a sum over K in one fixed order, whatever rows come with it: to the last bit it does not depend on
// the batch.
#pragma once
#include <type_traits>

#include "vectors.h"

constexpr int PANEL = 32;  // columns of a panel, rows of a block

constexpr long STRIPE = 512, STRIPE_BYTES = 1 << 20;  // rows that stay in the second cache with all of their columns

static inline long padded(long k) { return (k + 31) & ~31L; }

// Words of 4 bytes: two bfloat16 neighbours, or one float32.
template <class T> constexpr int IN_WORD = 4 / sizeof(T);
template <class T> static inline long panel_words(long k) { return padded(k) / IN_WORD<T> * PANEL; }

#if defined(__AMX_BF16__) && defined(__linux__)
#define USE_AMX
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static inline void begin_products() {
    static const TileConfig config;
    _tile_loadconfig(&config);
}
static inline void end_products() { _tile_release(); }
constexpr const char* ISA = "amx";
#else
static inline void begin_products() {}
static inline void end_products() {}
#if defined(__AVX512BF16__)
constexpr const char* ISA = "avx512-bf16";
#elif defined(__AVX512F__)
constexpr const char* ISA = "avx512";
#else
constexpr const char* ISA = "vectors";
#endif
#endif

// Rows as products read them. Column c of row r lies at data[r / 16 * lower + r % 16 * row + c / 32 * step + c % 32]:
// rows one after the other, or tiles of 16 rows and 32 columns, each contiguous, which caches like better.
template <class T> struct Rows {
    T* data;
    long row, step, lower;
    T* at(long r, long c) const { return data + r / 16 * lower + r % 16 * row + c / 32 * step + c % 32; }
    Rows from(long r, long c) const { return {at(r, c), row, step, lower}; }  // of a tile's first row and column
    // Sixteen floats or fewer, rounded, to columns c .. c + count.
    void put(long r, long c, vfloat v, long count = LANES) const {
        if (count == LANES && c % LANES == 0) return store_row(at(r, c), v);
        T rounded[LANES];
        store_row(rounded, v);
        for (long i = 0; i < count; i++) *at(r, c + i) = rounded[i];
    }
};
template <class T> static inline Rows<T> plain_rows(T* data, long width) { return {data, width, 32, 16 * width}; }
template <class T> static inline Rows<T> tiled_rows(T* data, long width) { return {data, 32, 512, 16 * width}; }

// What will be read next, fetched into the second cache a few lines at each step of a product.
struct Ahead {
    const char *at = nullptr, *end = nullptr;
    int lines = 0;  // a step of 32 in K
    void fetch() {
        for (int i = 0; i < lines && at < end; i++, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

#if defined(__AVX512F__) || !defined(__AVX2__)
constexpr int TOGETHER = 8;  // rows whose sums are in registers at once, of
template <class T, int R> constexpr int ACROSS = 2;  // vectors of columns
#else
constexpr int TOGETHER = 6;  // there are 16 registers, of half the width
template <class T, int R> constexpr int ACROSS = R * IN_WORD<T> <= 2 ? 2 : 1;
#endif

template <int R>
static inline void rows_times_panel(
    const Rows<const bf16> a, long k, const uint32_t* panel, float* c, long ldc, bool add, Ahead& ahead) {
    constexpr int WIDE = ACROSS<bf16, R>;
    for (int first = 0; first < 2; first += WIDE) {
        const uint32_t* b = panel + first * LANES;
        vfloat acc[R][WIDE];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < WIDE; j++) acc[r][j] = add ? load(c + r * ldc + (first + j) * LANES) : all(0.0f);
        for (long block = 0; block < k / 32; block++, b += 16 * PANEL) {
            const bf16* x = a.data + block * a.step;
            if (!first) ahead.fetch();
            for (long i = 0; i < 16; i++) {
#if defined(__AVX512BF16__)
                const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + i * PANEL);
                const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + i * PANEL + LANES);
                for (int r = 0; r < R; r++) {
                    int32_t pair;
                    memcpy(&pair, x + r * a.row + i * 2, 4);
                    const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                    acc[r][0] = (vfloat)_mm512_dpbf16_ps((__m512)acc[r][0], both, b0);
                    acc[r][1] = (vfloat)_mm512_dpbf16_ps((__m512)acc[r][1], both, b1);
                }
#else
                for (int j = 0; j < WIDE; j++) {
                    const vuint word = load_words(b + i * PANEL + j * LANES);
                    const vfloat even = bits_as_floats(word << 16), odd = bits_as_floats(word & 0xffff0000u);
                    for (int r = 0; r < R; r++) {
                        uint32_t pair;
                        memcpy(&pair, x + r * a.row + i * 2, 4);
                        const vuint both = all_words(pair);
                        acc[r][j] += bits_as_floats(both << 16) * even;
                        acc[r][j] += bits_as_floats(both & 0xffff0000u) * odd;
                    }
                }
#endif
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < WIDE; j++) store(c + r * ldc + (first + j) * LANES, acc[r][j]);
    }
}

template <int R>
static inline void rows_times_panel(
    const Rows<const float> a, long k, const uint32_t* words, float* c, long ldc, bool add, Ahead& ahead) {
    constexpr int WIDE = ACROSS<float, R>;
    for (int first = 0; first < 2; first += WIDE) {
        const float* b = (const float*)words + first * LANES;
        vfloat acc[R][WIDE];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < WIDE; j++) acc[r][j] = add ? load(c + r * ldc + (first + j) * LANES) : all(0.0f);
        for (long block = 0; block < k / 32; block++, b += 32 * PANEL) {
            const float* x = a.data + block * a.step;
            if (!first) ahead.fetch();
            for (long i = 0; i < 32; i++) {
                vfloat column[WIDE];
                for (int j = 0; j < WIDE; j++) column[j] = load(b + i * PANEL + j * LANES);
                for (int r = 0; r < R; r++) {
                    const vfloat one = all(x[r * a.row + i]);
                    for (int j = 0; j < WIDE; j++) acc[r][j] += one * column[j];
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < WIDE; j++) store(c + r * ldc + (first + j) * LANES, acc[r][j]);
    }
}

template <class T>
static inline void rows_in_groups(
    const Rows<const T>& a, int rows, long k, const uint32_t* b, float* c, long ldc, bool add, Ahead& ahead) {
    for (int r = 0, here; r < rows; r += here) {  // a group never crosses row 16
        const int left = std::min(rows - r, 16 - r % 16);
        here = left <= TOGETHER ? left : left <= 2 * TOGETHER ? (left + 1) / 2 : TOGETHER;
        const auto times = [&](auto count) {
            rows_times_panel<count.value>(a.from(r, 0), k, b, c + r * ldc, ldc, add, ahead);
        };
        switch (here) {
            case 8: times(std::integral_constant<int, TOGETHER>()); break;
            case 7: times(std::integral_constant<int, std::min(TOGETHER, 7)>()); break;
            case 6: times(std::integral_constant<int, 6>()); break;
            case 5: times(std::integral_constant<int, 5>()); break;
            case 4: times(std::integral_constant<int, 4>()); break;
            case 3: times(std::integral_constant<int, 3>()); break;
            case 2: times(std::integral_constant<int, 2>()); break;
            case 1: times(std::integral_constant<int, 1>()); break;
        }
    }
}

// Where bfloat16 is not multiplied, rows that share a panel have it expanded once, a piece of K at a time.
#if defined(__AVX512F__) || !defined(__AVX2__)
template <class T> constexpr bool EXPANDS = false;
#else
template <class T> constexpr bool EXPANDS = sizeof(T) == 2;
#endif
constexpr long EXPANDED = 128;  // in K
constexpr int FEW = 8;          // rows for which it is not worth it

static inline void expand_panel(const uint32_t* words, long k, float* out) {
    for (long i = 0; i < k / 2; i++)
        for (long j = 0; j < PANEL; j += LANES) {
            const vuint word = load_words(words + i * PANEL + j);
            store(out + 2 * i * PANEL + j, bits_as_floats(word << 16));
            store(out + (2 * i + 1) * PANEL + j, bits_as_floats(word & 0xffff0000u));
        }
}

// As times_panel, of an expanded panel: to the last bit what the words give.
static inline void times_expanded(
    const Rows<const bf16>& a, int rows, long k, const float* b, float* c, long ldc, bool add, Ahead& ahead) {
    alignas(64) float floats[PANEL * EXPANDED];
    for (int r = 0; r < rows; r++)
        for (long i = 0; i < k; i += LANES) {
            vfloat v;
            load_row(a.at(r, i), v);
            store(floats + r * k + i, v);
        }
    rows_in_groups(plain_rows((const float*)floats, k), rows, k, (const uint32_t*)b, c, ldc, add, ahead);
}

// c[rows, 32] = a[rows, k] x panel, or is added to. k is a multiple of 32, rows at most 32. With AMX whole tiles of
// 16 rows are read and written, so `a` and `c` must have them.
static inline void times_panel(
    const Rows<const float>& a, int rows, long k, const uint32_t* b, float* c, long ldc, bool add, Ahead& ahead) {
    rows_in_groups(a, rows, k, b, c, ldc, add, ahead);
}

static inline void times_panel(
    const Rows<const bf16>& a, int rows, long k, const uint32_t* b, float* c, long ldc, bool add, Ahead& ahead) {
#if defined(USE_AMX)
    const long a_bytes = a.row * 2, c_bytes = ldc * 4;
    const bf16* upper = a.data;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + LANES, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    if (rows <= 16) {
        for (long i = 0; i < k; i += 32, b += 16 * PANEL, upper += a.step) {
            ahead.fetch();
            _tile_loadd(6, b, 4 * PANEL);
            _tile_loadd(4, upper, a_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + LANES, 4 * PANEL);
            _tile_dpbf16ps(1, 4, 7);
        }
    } else {
        float* below = c + 16 * ldc;
        if (add) {
            _tile_loadd(2, below, c_bytes);
            _tile_loadd(3, below + LANES, c_bytes);
        } else {
            _tile_zero(2);
            _tile_zero(3);
        }
        const bf16* lower = upper + a.lower;
        for (long i = 0; i < k; i += 32, b += 16 * PANEL, upper += a.step, lower += a.step) {
            ahead.fetch();
            _tile_loadd(6, b, 4 * PANEL);
            _tile_loadd(4, upper, a_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + LANES, 4 * PANEL);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, lower, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, below, c_bytes);
        _tile_stored(3, below + LANES, c_bytes);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + LANES, c_bytes);
#else
    if (EXPANDS<bf16> && rows > FEW) {
        alignas(64) float panel[EXPANDED * PANEL];
        for (long from = 0; from < k; from += EXPANDED) {
            const long width = std::min(EXPANDED, k - from);
            expand_panel(b + from / 2 * PANEL, width, panel);
            times_expanded(a.from(0, from), rows, width, panel, c, ldc, add || from, ahead);
        }
        return;
    }
    rows_in_groups(a, rows, k, b, c, ldc, add, ahead);
#endif
}

// c[rows, 32] = a x panel for any number of rows, K in blocks that stay in the first cache with their rows. Where sums
// are kept in between changes no bit of them. `done(r, here)` after the last block of rows r .. r + here.
template <class T, class Done>
static inline void stripe_times_panel(
    const Rows<const T>& a, long rows, long k, const uint32_t* b, float* c, Ahead& ahead, Done done) {
    constexpr long most = EXPANDS<T> ? EXPANDED : 576 / (long)sizeof(T) / 32 * 32;
    alignas(64) float expanded[EXPANDS<T> ? EXPANDED * PANEL : 1];
    const long pieces = rows <= (TOGETHER == 8 ? PANEL : FEW / 2) ? 1 : (k + most - 1) / most, piece = padded((k + pieces - 1) / pieces);
    for (long from = 0; from < k; from += piece) {
        const long width = std::min(piece, k - from);
        const uint32_t* words = b + from / IN_WORD<T> * PANEL;
        if constexpr (EXPANDS<T>)
            if (rows > PANEL) expand_panel(words, width, expanded);
        for (long r = 0; r < rows; r += PANEL) {
            const int here = (int)std::min<long>(PANEL, rows - r);
            const Rows<const T> block = a.from(r, from);
            if constexpr (EXPANDS<T>) {
                if (rows > PANEL) times_expanded(block, here, width, expanded, c + r * PANEL, PANEL, from > 0, ahead);
                else times_panel(block, here, width, words, c + r * PANEL, PANEL, from > 0, ahead);
            } else
                times_panel(block, here, width, words, c + r * PANEL, PANEL, from > 0, ahead);
            if (from + width == k) done(r, here);
        }
    }
}

// out[word][32] = rows[32][word]: 32 rows, as words, become the columns of a panel. `rows[i]` may be null: zeros.
// `words` words a row, padded to `panel_rows`, a multiple of 16.
static inline void pack_columns(const uint32_t* const* rows, long words, long panel_rows, uint32_t* out) {
    long w = 0;
#if defined(__AVX512F__)
    for (; w < words; w += 16)
        for (int half = 0; half < 2; half++) {
            const __mmask16 mask = words - w < 16 ? (__mmask16)((1u << (words - w)) - 1) : 0xffff;
            __m512i r[16], t[16];
            for (int i = 0; i < 16; i++) {
                const uint32_t* row = rows[half * 16 + i];
                r[i] = row ? _mm512_maskz_loadu_epi32(mask, row + w) : _mm512_setzero_si512();
            }
            for (int i = 0; i < 8; i++) {
                t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
            }
            for (int i = 0; i < 4; i++) {
                r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
                r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
                r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
                r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
            }
            for (int i = 0; i < 4; i++) {  // r[4 * j + i]: words i, i + 4, i + 8, i + 12 of rows 4 * j ..
                const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x44);
                const __m512i b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xee);
                const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x44);
                const __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xee);
                uint32_t* column = out + (w + i) * PANEL + half * 16;
                _mm512_storeu_si512(column, _mm512_shuffle_i32x4(a, c, 0x88));
                _mm512_storeu_si512(column + 4 * PANEL, _mm512_shuffle_i32x4(a, c, 0xdd));
                _mm512_storeu_si512(column + 8 * PANEL, _mm512_shuffle_i32x4(b, d, 0x88));
                _mm512_storeu_si512(column + 12 * PANEL, _mm512_shuffle_i32x4(b, d, 0xdd));
            }
        }
#elif defined(__AVX2__)
    for (; w + 8 <= words; w += 8)
        for (int quarter = 0; quarter < 4; quarter++) {
            __m256i r[8], t[8];
            for (int i = 0; i < 8; i++) {
                const uint32_t* row = rows[quarter * 8 + i];
                r[i] = row ? _mm256_loadu_si256((const __m256i*)(row + w)) : _mm256_setzero_si256();
            }
            for (int i = 0; i < 4; i++) {
                t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
            }
            for (int i = 0; i < 2; i++) {
                r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
                r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
                r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
                r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
            }
            for (int i = 0; i < 4; i++) {  // r[4 * j + i]: words i and i + 4 of rows 4 * j ..
                __m256i* column = (__m256i*)(out + (w + i) * PANEL + quarter * 8);
                _mm256_storeu_si256(column, _mm256_permute2x128_si256(r[i], r[4 + i], 0x20));
                _mm256_storeu_si256(column + 4 * PANEL / 8, _mm256_permute2x128_si256(r[i], r[4 + i], 0x31));
            }
        }
#endif
    for (; w < words; w++)
        for (int i = 0; i < PANEL; i++) {
            uint32_t word = 0;  // rows of an odd width lie between words
            if (rows[i]) memcpy(&word, rows[i] + w, 4);
            out[w * PANEL + i] = word;
        }
    if (panel_rows > w) memset(out + w * PANEL, 0, (panel_rows - w) * PANEL * 4);
}
