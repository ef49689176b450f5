// Products of whole numbers, for keys and values of 8 bits beside bfloat16: what they are multiplied with becomes whole
// numbers of 16 bits, with a scale of its own. Sums are exact, in whatever order, and no number has to become a float.
//
// A panel is matmul.h's, of words that hold two numbers of 16 bits. With AMX there is bfloat16 for all: its tiles are more
// than what is saved here.
#pragma once
#include "matmul.h"

#if defined(USE_AMX)
template <class T> constexpr bool COUNTS = false;
#else
template <class T> constexpr bool COUNTS = sizeof(T) == 2;
#endif

constexpr float MOST_OF_16 = 32767.0f;
constexpr float LEAST_COUNTED = 1e-33f;  // what is smaller has no inverse

// Loaded once, not again for each row by compilers that take a load for nothing.
static inline vuint once(vuint v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

// sum + the products of both pairs in each word.
static inline vint add_pairs(vint sum, vuint a, vuint b) {
#if defined(__AVX512VNNI__)
    return (vint)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return (vint)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16((__m512i)a, (__m512i)b));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return sum + vint{(vint::Half)_mm256_madd_epi16((__m256i)a.low, (__m256i)b.low),
                      (vint::Half)_mm256_madd_epi16((__m256i)a.high, (__m256i)b.high)};
#else
    return sum + (as_ints(a << 16) >> 16) * (as_ints(b << 16) >> 16) + (as_ints(a) >> 16) * (as_ints(b) >> 16);
#endif
}

// Of the four bytes of each word the first and third, and the second and fourth, each with its sign in 16 bits.
static inline void two_and_two(vuint four, vuint& even, vuint& odd) {
#if defined(__AVX512BW__)
    even = (vuint)_mm512_srai_epi16(_mm512_slli_epi16((__m512i)four, 8), 8);
    odd = (vuint)_mm512_srai_epi16((__m512i)four, 8);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    even = {(vuint::Half)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)four.low, 8), 8),
            (vuint::Half)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)four.high, 8), 8)};
    odd = {(vuint::Half)_mm256_srai_epi16((__m256i)four.low, 8), (vuint::Half)_mm256_srai_epi16((__m256i)four.high, 8)};
#else
    const auto byte = [&](int up) { return as_words(as_ints(four << up) >> 24); };
    even = (byte(24) & 0xffffu) | byte(8) << 16;
    odd = (byte(16) & 0xffffu) | byte(0) << 16;
#endif
}

// Sixteen bytes of one token and of the next -> words of both; or 32 of them.
template <int WIDE> static inline void pair_whole(const int8_t* a, const int8_t* b, vuint* words) {
#if defined(__AVX512VBMI__)
    if constexpr (WIDE == 2) {
        alignas(64) static const uint8_t UPPER[64] = {
            0, 0, 0, 32, 0, 1, 0, 33, 0, 2,  0, 34, 0, 3,  0, 35, 0, 4,  0, 36, 0, 5,  0, 37, 0, 6,  0, 38, 0, 7,  0, 39,
            0, 8, 0, 40, 0, 9, 0, 41, 0, 10, 0, 42, 0, 11, 0, 43, 0, 12, 0, 44, 0, 13, 0, 45, 0, 14, 0, 46, 0, 15, 0, 47};
        const __m512i first = _mm512_load_si512(UPPER), second = _mm512_add_epi8(first, _mm512_set1_epi8(16));
        const __m512i both = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a)), _mm256_loadu_si256((const __m256i*)b), 1);
        words[0] = (vuint)_mm512_srai_epi16(_mm512_permutexvar_epi8(first, both), 8);
        words[1] = (vuint)_mm512_srai_epi16(_mm512_permutexvar_epi8(second, both), 8);
        return;
    }
#endif
    for (int j = 0; j < WIDE; j++)
        words[j] = (as_words(load_bytes(a + j * LANES)) & 0xffffu) | as_words(load_bytes(b + j * LANES)) << 16;
}

// Sixteen floats to the nearest whole numbers, which fit 16 bits.
static inline void store_whole(bf16* p, vfloat v) {
    store_halves(p, bits_of(v + all(12582912.0f)) & 0xffffu);  // adding it leaves them in the lowest bits
}

// `width` numbers as whole ones up to `most`, and what one of them is. Of each four the second and third change places, as
// `two_and_two` has them. NaN where one of them is no finite number.
static inline float whole_row(const bf16* from, long width, float most, bf16* to) {
    vfloat largest = all(0.0f), odd = all(0.0f);
    const auto at = [&](long i) {
        bf16 some[LANES] = {};
        memcpy((void*)some, from + i, std::min<long>(LANES, width - i) * sizeof(bf16));
        vfloat v;
        load_row(some, v);
        return v;
    };
    for (long i = 0; i < width; i += LANES) {
        const vfloat v = at(i);
        largest = vmax(largest, vmax(v, -v));
        odd += v - v;
    }
    const float limit = max_of(largest) + sum_of(odd);
    const bool none = limit < LEAST_COUNTED;
    const vfloat factor = all(none ? 0.0f : most / limit);
    for (long i = 0; i < width; i += LANES) {
        bf16 some[LANES];
        store_whole(some, at(i) * factor);
        for (long j = 0; j < LANES; j += 4) std::swap(some[j + 1], some[j + 2]);
        memcpy((void*)(to + i), some, sizeof some);
    }
    return none ? 0.0f : limit / most;
}

// sums[rows, 32] = a[rows, k] x panel. k is a multiple of 32.
template <int R>
static inline void rows_times_whole(const Rows<const bf16> a, long k, const uint32_t* panel, int32_t* sums) {
    constexpr int WIDE = ACROSS<bf16, R>;
    for (int first = 0; first < 2; first += WIDE) {
        const uint32_t* b = panel + first * LANES;
        vint acc[R][WIDE];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < WIDE; j++) acc[r][j] = all_ints(0);
        for (long block = 0; block < k / 32; block++, b += 16 * PANEL) {
            const bf16* x = a.data + block * a.step;
            for (long i = 0; i < 16; i++) {
                vuint words[WIDE];
                for (int j = 0; j < WIDE; j++) words[j] = once(load_words(b + i * PANEL + j * LANES));
                for (int r = 0; r < R; r++) {
                    uint32_t pair;
                    memcpy(&pair, x + r * a.row + i * 2, 4);
                    const vuint both = all_words(pair);
                    for (int j = 0; j < WIDE; j++) acc[r][j] = add_pairs(acc[r][j], both, words[j]);
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < WIDE; j++)
                store_words((uint32_t*)sums + r * PANEL + (first + j) * LANES, as_words(acc[r][j]));
    }
}

// `times` with the number of rows that a group has, and its first.
template <class Times> static inline void in_groups(int rows, Times times) {
    for (int r = 0, here; r < rows; r += here) {  // a group never crosses row 16
        const int left = std::min(rows - r, 16 - r % 16);
        here = left <= TOGETHER ? left : left <= 2 * TOGETHER ? (left + 1) / 2 : TOGETHER;
        switch (here) {
            case 8: times(std::integral_constant<int, TOGETHER>(), r); break;
            case 7: times(std::integral_constant<int, std::min(TOGETHER, 7)>(), r); break;
            case 6: times(std::integral_constant<int, 6>(), r); break;
            case 5: times(std::integral_constant<int, 5>(), r); break;
            case 4: times(std::integral_constant<int, 4>(), r); break;
            case 3: times(std::integral_constant<int, 3>(), r); break;
            case 2: times(std::integral_constant<int, 2>(), r); break;
            case 1: times(std::integral_constant<int, 1>(), r); break;
        }
    }
}

static inline void times_whole(const Rows<const bf16>& a, int rows, long k, const uint32_t* panel, int32_t* sums) {
    in_groups(rows, [&](auto count, int r) { rows_times_whole<count.value>(a.from(r, 0), k, panel, sums + r * PANEL); });
}

static inline vuint two_of(const Rows<const bf16>& a, long r, long column) {
    uint32_t pair;
    memcpy(&pair, a.at(r, column), 4);
    return all_words(pair);
}

// For a few rows keys need no panel: sums[R, 32] = a x 4 * `words` numbers of 32 keys, `fours` words of four each
// (rounding.h), added to what is there.
template <int R>
static inline void rows_times_fours(const Rows<const bf16> a, long words, const uint32_t* fours, int32_t* sums, bool add) {
    constexpr int WIDE = ACROSS<bf16, R>;
    for (int first = 0; first < 2; first += WIDE) {
        vint acc[R][WIDE];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < WIDE; j++) {
                const int32_t* from = sums + r * PANEL + (first + j) * LANES;
                acc[r][j] = add ? as_ints(load_words((const uint32_t*)from)) : all_ints(0);
            }
        for (long w = 0; w < words; w++) {
            vuint even[WIDE], odd[WIDE];
            for (int j = 0; j < WIDE; j++) two_and_two(load_words(fours + w * PANEL + (first + j) * LANES), even[j], odd[j]);
            for (int r = 0; r < R; r++) {
                const vuint x = two_of(a, r, 4 * w), y = two_of(a, r, 4 * w + 2);
                for (int j = 0; j < WIDE; j++) acc[r][j] = add_pairs(add_pairs(acc[r][j], x, even[j]), y, odd[j]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < WIDE; j++)
                store_words((uint32_t*)sums + r * PANEL + (first + j) * LANES, as_words(acc[r][j]));
    }
}

// Nor do values: sums[R, 32] = a x 32 columns of `tokens` values, from their byte `column` on. A row may be null: zeros.
template <int R, class T>
static inline void rows_times_values(
    const Rows<const bf16> a, const T* const* rows, long tokens, long column, int32_t* sums) {
    constexpr int WIDE = ACROSS<bf16, R>;
    const int8_t none[PANEL] = {};
    const auto at = [&](long t) { return rows[t] ? (const int8_t*)rows[t] + column : none; };
    for (int first = 0; first < 2; first += WIDE) {
        vint acc[R][WIDE];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < WIDE; j++) acc[r][j] = all_ints(0);
        for (long t = 0; t < tokens; t += 2) {
            vuint words[WIDE];
            pair_whole<WIDE>(at(t) + first * LANES, at(t + 1) + first * LANES, words);
            for (int r = 0; r < R; r++) {
                const vuint both = two_of(a, r, t);
                for (int j = 0; j < WIDE; j++) acc[r][j] = add_pairs(acc[r][j], both, words[j]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < WIDE; j++)
                store_words((uint32_t*)sums + r * PANEL + (first + j) * LANES, as_words(acc[r][j]));
    }
}
