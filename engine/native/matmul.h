// Products of a few rows with packed panels, the one inner loop of everything here.
//
// A panel holds 32 columns of a matrix [K, N]; its words lie as [K / 2][32] for bfloat16 (a word is two neighbours in K)
// and as [K][32] for float32. K is padded with zeros to a multiple of 32. This is the tile layout of AMX, and other
// instruction sets read it as well:
//
//     AMX           16 x 16 tiles, two by two
//     AVX512-BF16   dot products of pairs
//     any other     a word is shifted into two floats; the compiler picks the vectors
//
// A row's result is a sum over K in one fixed order, whatever rows come with it: to the last bit it does not depend on
// the batch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

constexpr int PANEL = 32;  // columns of a panel, rows of a block
constexpr int LANES = 16;

typedef float vfloat __attribute__((vector_size(64)));
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint32_t vuint __attribute__((vector_size(64)));
typedef float vfloat_u __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vuint_u __attribute__((vector_size(64), aligned(4)));

static inline vfloat load(const float* p) { return *(const vfloat_u*)p; }
static inline void store(float* p, vfloat v) { *(vfloat_u*)p = v; }
static inline vfloat all(float x) { return vfloat{} + x; }
#if defined(__AVX512F__)
static inline vfloat vmax(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vfloat vmin(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps((__m512)a, (__m512)b); }
// The first `count` lanes of v, minus infinity in the others.
static inline vfloat only(vfloat v, long count) {
    const __mmask16 mask = count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
    return (vfloat)_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, (__m512)v);
}
// All but the first `count` lanes of v, minus infinity in those.
static inline vfloat but(vfloat v, long count) {
    const __mmask16 mask = count >= LANES ? 0 : count <= 0 ? 0xffff : (__mmask16)(0xffffu << count);
    return (vfloat)_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, (__m512)v);
}
static inline vfloat pick(vint condition, vfloat a, vfloat b) { return condition ? a : b; }
static inline vfloat rough_inverse(vfloat v) { return (vfloat)_mm512_rcp14_ps((__m512)v); }
static inline float sum_of(vfloat v) { return _mm512_reduce_add_ps((__m512)v); }
static inline float max_of(vfloat v) { return _mm512_reduce_max_ps((__m512)v); }
// 1 / v by Newton's method from the processor's 14 bits.
static inline vfloat inverse(vfloat v) {
    const vfloat r = (vfloat)_mm512_rcp14_ps((__m512)v);
    return r + r * (all(1.0f) - v * r);
}
// e^x; relative error below 2e-7. Range reduction and the Cephes polynomial. 0 below -87: denormal numbers are slow.
static inline vfloat vexp(vfloat v) {
    const __m512 low = _mm512_set1_ps(-87.0f);
    const __mmask16 enough = _mm512_cmp_ps_mask((__m512)v, low, _CMP_GE_OQ);
    const __m512 x = _mm512_min_ps(_mm512_max_ps((__m512)v, low), _mm512_set1_ps(88.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return (vfloat)_mm512_maskz_scalef_ps(enough, p, n);
}
// 2^x for x < 127. 0 below -125. Relative error below 2e-7 if `FINE`, else 3e-6: for what is rounded to bfloat16 anyway.
template <bool FINE> static inline vfloat vexp2(vfloat v) {
    const __m512 x = (__m512)v;
    const __mmask16 enough = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.0f), _CMP_GE_OQ);
    const __m512 n = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, n);
    __m512 p;
    if constexpr (FINE) {
        p = _mm512_set1_ps(1.540353039e-4f);
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.333355815e-3f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618129107e-3f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550410866e-2f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402265069e-1f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931471806e-1f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    } else {
        p = _mm512_set1_ps(9.570101081e-3f);
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.591786498e-2f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402474489e-1f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931218142e-1f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    }
    return (vfloat)_mm512_maskz_scalef_ps(enough, p, n);
}
#else
static inline vfloat pick(vint condition, vfloat a, vfloat b) { return condition ? a : b; }
static inline vfloat vmax(vfloat a, vfloat b) { return pick(a > b, a, b); }
static inline vfloat vmin(vfloat a, vfloat b) { return pick(a < b, a, b); }
static inline vfloat only(vfloat v, long count) {
    const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return pick(lane < (int)std::min<long>(count, LANES), v, all(-INFINITY));
}
static inline vfloat but(vfloat v, long count) {
    const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return pick(lane >= (int)std::max(0L, std::min<long>(count, LANES)), v, all(-INFINITY));
}
static inline vfloat inverse(vfloat v) { return all(1.0f) / v; }
static inline vfloat rough_inverse(vfloat v) { return inverse(v); }
static inline float sum_of(vfloat v) {
    float s[16];
    memcpy(s, &v, 64);
    for (int w = 8; w; w >>= 1)
        for (int i = 0; i < w; i++) s[i] += s[i + w];
    return s[0];
}
static inline float max_of(vfloat v) {
    float s[16];
    memcpy(s, &v, 64);
    for (int w = 8; w; w >>= 1)
        for (int i = 0; i < w; i++) s[i] = s[i] > s[i + w] ? s[i] : s[i + w];
    return s[0];
}

static inline vfloat vexp(vfloat x) {
    const vint low = x < all(-87.0f);
    x = pick(x > all(88.0f), all(88.0f), pick(low, all(-87.0f), x));
    const vfloat magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vfloat n = (x * all(1.44269504088896341f) + magic) - magic;
    vfloat r = x - n * all(0.693359375f);
    r = r - n * all(-2.12194440e-4f);
    vfloat p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    const vint scale = (__builtin_convertvector(n, vint) + 127) << 23;
    vfloat s;
    memcpy(&s, &scale, 64);
    return pick(low, all(0.0f), p * s);
}
template <bool FINE> static inline vfloat vexp2(vfloat v) { return vexp(v * all(0.693147180559945f)); }
#endif

template <bool FINE> static inline vfloat silu(vfloat x) {
    const vfloat e = vexp2<FINE>(vmin(x * all(-1.44269504088896341f), all(126.0f))) + all(1.0f);
    return x * (FINE ? inverse(e) : rough_inverse(e));
}

// Error below 2e-7. Near zero by the Cephes polynomial, where the other way would cancel.
static inline vfloat vtanh(vfloat x) {
    const vfloat square = x * x;
    vfloat p = all(-5.70498872745e-3f);
    p = p * square + all(2.06390887954e-2f);
    p = p * square + all(-5.37397155531e-2f);
    p = p * square + all(1.33314422036e-1f);
    p = p * square + all(-3.33332819422e-1f);
    const vfloat far = all(1.0f) - all(2.0f) / (vexp(x + x) + all(1.0f));
    return pick(square < all(0.390625f), p * square * x + x, far);
}

struct bf16 {
    uint16_t bits;
};

static inline float to_float(bf16 x) {
    const uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline float to_float(float x) { return x; }

static inline void load_row(const bf16* p, vfloat& v) {
    typedef uint16_t vhalf __attribute__((vector_size(32)));
    vhalf h;
    memcpy(&h, p, 32);
    const vuint u = __builtin_convertvector(h, vuint) << 16;
    memcpy(&v, &u, 64);
}
static inline void load_row(const float* p, vfloat& v) { v = load(p); }

// Sixteen floats, rounded to nearest even.
static inline void store_row(bf16* p, vfloat v) {
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, 32);
#else
    typedef uint16_t vhalf __attribute__((vector_size(32)));
    vuint u;
    memcpy(&u, &v, 64);
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const vhalf h = __builtin_convertvector(u, vhalf);
    memcpy(p, &h, 32);
#endif
}
static inline void store_row(float* p, vfloat v) { store(p, v); }

// Thirty-two floats, as above, in one piece: a tile read soon after finds it whole.
static inline void store_rows(bf16* p, vfloat low, vfloat high) {
#if defined(__AVX512BF16__)
    const __m512bh h = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    memcpy(p, &h, 64);
#else
    store_row(p, low);
    store_row(p + LANES, high);
#endif
}
static inline void store_rows(float* p, vfloat low, vfloat high) {
    store(p, low);
    store(p + LANES, high);
}

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

template <int R>
static inline void rows_times_panel(
    const Rows<const bf16> a, long k, const uint32_t* b, float* c, long ldc, bool add, Ahead& ahead) {
    vfloat acc[R][2];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 2; j++) acc[r][j] = add ? load(c + r * ldc + j * LANES) : all(0.0f);
    for (long block = 0; block < k / 32; block++, b += 16 * PANEL) {
        const bf16* x = a.data + block * a.step;
        ahead.fetch();
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
            for (int j = 0; j < 2; j++) {
                const vuint word = *(const vuint_u*)(b + i * PANEL + j * LANES);
                const vuint even_bits = word << 16, odd_bits = word & 0xffff0000u;
                vfloat even, odd;
                memcpy(&even, &even_bits, 64);
                memcpy(&odd, &odd_bits, 64);
                for (int r = 0; r < R; r++) {
                    acc[r][j] += to_float(x[r * a.row + i * 2]) * even;
                    acc[r][j] += to_float(x[r * a.row + i * 2 + 1]) * odd;
                }
            }
#endif
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 2; j++) store(c + r * ldc + j * LANES, acc[r][j]);
}

template <int R>
static inline void rows_times_panel(
    const Rows<const float> a, long k, const uint32_t* words, float* c, long ldc, bool add, Ahead& ahead) {
    const float* b = (const float*)words;
    vfloat acc[R][2];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 2; j++) acc[r][j] = add ? load(c + r * ldc + j * LANES) : all(0.0f);
    for (long block = 0; block < k / 32; block++, b += 32 * PANEL) {
        const float* x = a.data + block * a.step;
        ahead.fetch();
        for (long i = 0; i < 32; i++) {
            const vfloat b0 = load(b + i * PANEL), b1 = load(b + i * PANEL + LANES);
            for (int r = 0; r < R; r++) {
                const vfloat one = all(x[r * a.row + i]);
                acc[r][0] += one * b0;
                acc[r][1] += one * b1;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 2; j++) store(c + r * ldc + j * LANES, acc[r][j]);
}

template <class T>
static inline void rows_in_groups(
    const Rows<const T>& a, int rows, long k, const uint32_t* b, float* c, long ldc, bool add, Ahead& ahead) {
    int r = 0;  // a group never crosses row 16
    for (; r + 8 <= rows; r += 8) rows_times_panel<8>(a.from(r, 0), k, b, c + r * ldc, ldc, add, ahead);
    for (; r + 4 <= rows; r += 4) rows_times_panel<4>(a.from(r, 0), k, b, c + r * ldc, ldc, add, ahead);
    switch (rows - r) {
        case 3: return rows_times_panel<3>(a.from(r, 0), k, b, c + r * ldc, ldc, add, ahead);
        case 2: return rows_times_panel<2>(a.from(r, 0), k, b, c + r * ldc, ldc, add, ahead);
        case 1: return rows_times_panel<1>(a.from(r, 0), k, b, c + r * ldc, ldc, add, ahead);
    }
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
    rows_in_groups(a, rows, k, b, c, ldc, add, ahead);
#endif
}

// c[rows, 32] = a x panel for any number of rows, K in blocks that stay in the first cache with their rows. Where sums
// are kept in between changes no bit of them. `done(r, here)` after the last block of rows r .. r + here.
template <class T, class Done>
static inline void stripe_times_panel(
    const Rows<const T>& a, long rows, long k, const uint32_t* b, float* c, Ahead& ahead, Done done) {
    constexpr long most = 576 / (long)sizeof(T) / 32 * 32;
    const long pieces = rows <= PANEL ? 1 : (k + most - 1) / most, piece = padded((k + pieces - 1) / pieces);
    for (long from = 0; from < k; from += piece) {
        const long width = std::min(piece, k - from);
        for (long r = 0; r < rows; r += PANEL) {
            const int here = (int)std::min<long>(PANEL, rows - r);
            times_panel(a.from(r, from), here, width, b + from / IN_WORD<T> * PANEL, c + r * PANEL, PANEL, from > 0, ahead);
            if (from + width == k) done(r, here);
        }
    }
}

// out[word][32] = rows[32][word]: 32 rows, as words, become the columns of a panel. `rows[i]` may be null: zeros.
// `words` words a row, padded to `panel_rows`.
static inline void pack_columns(const uint32_t* const* rows, long words, long panel_rows, uint32_t* out) {
    long w = 0;
#if defined(__AVX512F__)
    for (; w + 16 <= words; w += 16)
        for (int half = 0; half < 2; half++) {
            __m512i r[16], t[16];
            for (int i = 0; i < 16; i++) {
                const uint32_t* row = rows[half * 16 + i];
                r[i] = row ? _mm512_loadu_si512(row + w) : _mm512_setzero_si512();
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
#endif
    for (; w < words; w++)
        for (int i = 0; i < PANEL; i++) {
            uint32_t word = 0;  // rows of an odd width lie between words
            if (rows[i]) memcpy(&word, rows[i] + w, 4);
            out[w * PANEL + i] = word;
        }
    if (panel_rows > words) memset(out + words * PANEL, 0, (panel_rows - words) * PANEL * 4);
}
