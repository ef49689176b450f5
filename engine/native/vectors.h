// Sixteen numbers at once, on whatever the processor has: one register of AVX-512, two of AVX2, or what the compiler makes
// of it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;

#if defined(__AVX2__) && !defined(__AVX512F__)
// Compilers take vectors that are wider than a register apart number by number, so there are two.
template <class E> struct Two {
    typedef E Half __attribute__((vector_size(32)));
    Half low, high;
    E operator[](long i) const { return i < 8 ? low[i] : high[i - 8]; }
    friend Two operator+(Two a, Two b) { return {a.low + b.low, a.high + b.high}; }
    friend Two operator-(Two a, Two b) { return {a.low - b.low, a.high - b.high}; }
    friend Two operator*(Two a, Two b) { return {a.low * b.low, a.high * b.high}; }
    friend Two operator/(Two a, Two b) { return {a.low / b.low, a.high / b.high}; }
    friend Two operator|(Two a, Two b) { return {a.low | b.low, a.high | b.high}; }
    friend Two operator-(Two a) { return {-a.low, -a.high}; }
    friend Two operator+(Two a, E b) { return {a.low + b, a.high + b}; }
    friend Two operator-(Two a, E b) { return {a.low - b, a.high - b}; }
    friend Two operator&(Two a, E b) { return {a.low & b, a.high & b}; }
    friend Two operator<<(Two a, int b) { return {a.low << (E)b, a.high << (E)b}; }
    friend Two operator>>(Two a, int b) { return {a.low >> (E)b, a.high >> (E)b}; }
    friend Two<int32_t> operator<(Two a, Two b) { return {a.low < b.low, a.high < b.high}; }
    friend Two<int32_t> operator>(Two a, Two b) { return {a.low > b.low, a.high > b.high}; }
    friend Two<int32_t> operator>=(Two a, Two b) { return {a.low >= b.low, a.high >= b.high}; }
    Two& operator+=(Two b) { return *this = *this + b; }
};
typedef Two<float> vfloat;
typedef Two<int32_t> vint;
typedef Two<uint32_t> vuint;

static inline vfloat load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, vfloat v) { _mm256_storeu_ps(p, v.low), _mm256_storeu_ps(p + 8, v.high); }
static inline vfloat all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vint all_ints(int x) { return {(vint::Half)_mm256_set1_epi32(x), (vint::Half)_mm256_set1_epi32(x)}; }
static inline vuint all_words(uint32_t x) {
    return {(vuint::Half)_mm256_set1_epi32((int)x), (vuint::Half)_mm256_set1_epi32((int)x)};
}
static inline vuint load_words(const uint32_t* p) {
    return {(vuint::Half)_mm256_loadu_si256((const __m256i*)p), (vuint::Half)_mm256_loadu_si256((const __m256i*)(p + 8))};
}
static inline void store_words(uint32_t* p, vuint v) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)v.low), _mm256_storeu_si256((__m256i*)(p + 8), (__m256i)v.high);
}
static inline vuint load_halves(const void* p) {  // of words
    const __m128i* at = (const __m128i*)p;
    return {(vuint::Half)_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), (vuint::Half)_mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1))};
}
static inline void store_halves(void* p, vuint v) {
    const __m256i both = _mm256_packus_epi32((__m256i)v.low, (__m256i)v.high);
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
}
static inline vfloat to_floats(vint v) {
    return {__builtin_convertvector(v.low, vfloat::Half), __builtin_convertvector(v.high, vfloat::Half)};
}
static inline vint to_ints(vfloat v) {
    return {__builtin_convertvector(v.low, vint::Half), __builtin_convertvector(v.high, vint::Half)};
}
static inline vint load_bytes(const void* p) {  // with their signs
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {(vint::Half)_mm256_cvtepi8_epi32(bytes), (vint::Half)_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
static inline void store_bytes(void* p, vint v) {  // of numbers that fit
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)v.low, (__m256i)v.high), 0xd8);
    const __m128i low = _mm256_castsi256_si128(both), high = _mm256_extracti128_si256(both, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(low, high));
}
static inline vfloat bits_as_floats(vuint v) { return {(vfloat::Half)v.low, (vfloat::Half)v.high}; }
static inline vuint bits_of(vfloat v) { return {(vuint::Half)v.low, (vuint::Half)v.high}; }
static inline vint as_ints(vuint v) { return {(vint::Half)v.low, (vint::Half)v.high}; }
static inline vuint as_words(vint v) { return {(vuint::Half)v.low, (vuint::Half)v.high}; }
static inline vfloat pick(vint condition, vfloat a, vfloat b) {
    const auto half = [](vint::Half c, vfloat::Half x, vfloat::Half y) {
        return (vfloat::Half)_mm256_blendv_ps((__m256)y, (__m256)x, (__m256)c);
    };
    return {half(condition.low, a.low, b.low), half(condition.high, a.high, b.high)};
}
static inline vfloat vmax(vfloat a, vfloat b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
static inline vfloat vmin(vfloat a, vfloat b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
static inline float sum_of(vfloat v) {
    const __m256 eight = v.low + v.high;
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1), two = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float max_of(vfloat v) {
    const __m256 eight = _mm256_max_ps(v.low, v.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
typedef float vfloat __attribute__((vector_size(64)));
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint32_t vuint __attribute__((vector_size(64)));
typedef float vfloat_u __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vuint_u __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vhalves __attribute__((vector_size(32)));
typedef int8_t vbytes __attribute__((vector_size(16)));

static inline vfloat load(const float* p) { return *(const vfloat_u*)p; }
static inline void store(float* p, vfloat v) { *(vfloat_u*)p = v; }
static inline vfloat all(float x) { return vfloat{} + x; }
static inline vint all_ints(int x) { return vint{} + x; }
static inline vuint all_words(uint32_t x) { return vuint{} + x; }
static inline vuint load_words(const uint32_t* p) { return *(const vuint_u*)p; }
static inline void store_words(uint32_t* p, vuint v) { *(vuint_u*)p = v; }
static inline vuint load_halves(const void* p) {  // of words
    vhalves h;
    memcpy(&h, p, 32);
    return __builtin_convertvector(h, vuint);
}
static inline void store_halves(void* p, vuint v) {
    const vhalves h = __builtin_convertvector(v, vhalves);
    memcpy(p, &h, 32);
}
static inline vfloat to_floats(vint v) { return __builtin_convertvector(v, vfloat); }
static inline vint to_ints(vfloat v) { return __builtin_convertvector(v, vint); }
static inline vint load_bytes(const void* p) {  // with their signs
    vbytes bytes;
    memcpy(&bytes, p, LANES);
    return __builtin_convertvector(bytes, vint);
}
static inline void store_bytes(void* p, vint v) {  // of numbers that fit
    const vbytes bytes = __builtin_convertvector(v, vbytes);
    memcpy(p, &bytes, LANES);
}
static inline vfloat bits_as_floats(vuint v) { return (vfloat)v; }
static inline vuint bits_of(vfloat v) { return (vuint)v; }
static inline vint as_ints(vuint v) { return (vint)v; }
static inline vuint as_words(vint v) { return (vuint)v; }
static inline vfloat pick(vint condition, vfloat a, vfloat b) { return condition ? a : b; }
#if !defined(__AVX512F__)
static inline vfloat vmax(vfloat a, vfloat b) { return pick(a > b, a, b); }
static inline vfloat vmin(vfloat a, vfloat b) { return pick(a < b, a, b); }
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
#endif
#endif

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
// The first `count` lanes of v, minus infinity in the others.
static inline vfloat only(vfloat v, long count) {
    const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return pick(lane < all_ints((int)std::min<long>(count, LANES)), v, all(-INFINITY));
}
// All but the first `count` lanes of v, minus infinity in those.
static inline vfloat but(vfloat v, long count) {
    const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return pick(lane >= all_ints((int)std::max(0L, std::min<long>(count, LANES))), v, all(-INFINITY));
}
static inline vfloat inverse(vfloat v) { return all(1.0f) / v; }
static inline vfloat rough_inverse(vfloat v) { return inverse(v); }

constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the integer in the lowest bits
// p * 2^n, of n + TO_INTEGER. The result is a normal number.
static inline vfloat scaled(vfloat p, vfloat n) { return bits_as_floats(bits_of(p) + (bits_of(n) << 23)); }

static inline vfloat vexp(vfloat x) {
    const vint low = x < all(-87.0f);
    x = pick(x > all(88.0f), all(88.0f), pick(low, all(-87.0f), x));
    const vfloat shifted = x * all(1.44269504088896341f) + all(TO_INTEGER), n = shifted - all(TO_INTEGER);
    vfloat r = x - n * all(0.693359375f);
    r = r - n * all(-2.12194440e-4f);
    vfloat p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    return pick(low, all(0.0f), scaled(p, shifted));
}
template <bool FINE> static inline vfloat vexp2(vfloat x) {
    const vfloat shifted = x + all(TO_INTEGER), f = x - (shifted - all(TO_INTEGER));
    vfloat p;
    if constexpr (FINE) {
        p = all(1.540353039e-4f);
        p = p * f + all(1.333355815e-3f);
        p = p * f + all(9.618129107e-3f);
        p = p * f + all(5.550410866e-2f);
        p = p * f + all(2.402265069e-1f);
        p = p * f + all(6.931471806e-1f);
        p = p * f + all(1.0f);
    } else {
        p = all(9.570101081e-3f);
        p = p * f + all(5.591786498e-2f);
        p = p * f + all(2.402474489e-1f);
        p = p * f + all(6.931218142e-1f);
        p = p * f + all(1.0f);
    }
    return pick(x < all(-125.0f), all(0.0f), scaled(p, shifted));
}
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

static inline void load_row(const bf16* p, vfloat& v) { v = bits_as_floats(load_halves(p) << 16); }
static inline void load_row(const float* p, vfloat& v) { v = load(p); }

// Sixteen floats, rounded to nearest even.
static inline void store_row(bf16* p, vfloat v) {
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, 32);
#else
    const vuint u = bits_of(v);
    store_halves(p, (u + 0x7fff + ((u >> 16) & 1)) >> 16);
#endif
}
static inline void store_row(float* p, vfloat v) { store(p, v); }

// Numbers of 8 bits with 4 of exponent and 3 of mantissa (E4M3 without infinities), one in each word: exact, in bfloat16 too.
// NaN (127 and 255) comes out as 480: who keeps numbers so has none.
static inline vfloat of_e4m3(vuint number) {
    const vuint size = number & 127u;
    const vfloat normal = bits_as_floats((size << 20) + (120u << 23));
    const vfloat denormal = to_floats(as_ints(size)) * all(0.001953125f);
    const vfloat positive = pick(as_ints(size) < all_ints(8), denormal, normal);
    return bits_as_floats(bits_of(positive) | ((number & 128u) << 24));
}

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
