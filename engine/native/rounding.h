// Keys and values of 8 bits (engine/kv_rounding.py): rounded when they are written. The scale of a key is multiplied into
// its scores, that of a value into its weights. Whole numbers beside bfloat16 are multiplied as such (whole.h); others are
// expanded when a tile is packed, exactly.
//
// A token and head has one row of bytes, 16 bits of scale behind the numbers, and up to 3 bytes at the end:
//
//     int8, fp8                  key numbers, scale, value numbers, scale
//     int8_values, fp8_values    key in the model's own type, value numbers, scale
//
// Numbers are whole, or E4M3, which has them up to 448 and fewer bits for each.
#pragma once
#include "quantized.h"
#include "whole.h"

enum Rounding { WIDE = 0, SMALL = 1, SMALL_VALUES = 2, FLOATS = 3, FLOAT_VALUES = 4 };  // shared with Python

constexpr long SCALE_BYTES = 2;
constexpr float LEAST_SCALE = 1.17549435e-38f;  // of normal numbers, in bfloat16 as in float32

static inline float round_to_bf16(float x) {
    bf16 rounded[LANES];
    store_row(rounded, all(x));
    return to_float(rounded[0]);
}

// The first `count` of LANES elements, zeros behind them.
template <class T> static inline vfloat load_some(const T* p, long count) {
    if (count >= LANES) {
        vfloat v;
        load_row(p, v);
        return v;
    }
    float lanes[LANES] = {};
    for (long i = 0; i < count; i++) lanes[i] = to_float(p[i]);
    return load(lanes);
}

// Of magnitudes up to 448, to the nearest, of two equally near ones the even: their bytes, as numbers with a sign.
static inline vint to_e4m3(vfloat v) {
    const vuint bits = bits_of(v), size = bits & 0x7fffffffu;
    const vfloat ulp = all(16384.0f);  // its last bit is the smallest number
    const vuint denormal = bits_of(bits_as_floats(size) + ulp) - bits_of(ulp);
    const vuint normal = ((size + 0x7ffffu + ((size >> 20) & 1u)) >> 20) - (120u << 3);
    const vint small = as_ints(size) < all_ints(121 << 23);
    const vuint number = bits_of(pick(small, bits_as_floats(denormal), bits_as_floats(normal))) | ((bits >> 24) & 128u);
    return as_ints(number << 24) >> 24;
}

// `width` elements -> their numbers and scale, to the bit as the module in Python has them.
template <bool FLOATS, class X> static inline void round_row(const X* from, long width, char* to) {
    constexpr float most_number = FLOATS ? 448.0f : 127.0f;
    vfloat most = all(0.0f), odd = all(0.0f);
    for (long i = 0; i < width; i += LANES) {
        const vfloat v = load_some(from + i, width - i);
        most = vmax(most, vmax(v, -v));
        odd += v - v;  // NaN where v is no finite number, which `most` need not show
    }
    float scale = round_to_bf16(max_of(most) / most_number + sum_of(odd));
    if (scale < LEAST_SCALE) scale = 1.0f;
    const vfloat by = all(scale), limit = all(most_number), magic = all(12582912.0f);  // adding it rounds to a whole number
    const auto numbers = [&](vfloat v) {
        if (FLOATS) return to_e4m3(vmin(vmax(v / by, -limit), limit));
        return to_ints(vmin(vmax((v / by + magic) - magic, -limit), limit));
    };
    long i = 0;
    for (; i + LANES <= width; i += LANES) store_bytes(to + i, numbers(load_some(from + i, LANES)));
    if (i < width) {
        int8_t rest[LANES];
        store_bytes(rest, numbers(load_some(from + i, width - i)));
        memcpy(to + i, rest, width - i);
    }
    bf16 kept[LANES];
    store_row(kept, by);
    memcpy(to + width, kept, SCALE_BYTES);
}
template <class X> static inline void round_row(bool floats, const X* from, long width, char* to) {
    if (floats) round_row<true>(from, width, to);
    else round_row<false>(from, width, to);
}

// The scale behind `width` numbers.
static inline float scale_of(const void* row, long width) {
    bf16 kept;
    memcpy(&kept, (const char*)row + width, SCALE_BYTES);
    return to_float(kept);
}

// Of sixteen times four bytes the `i`th ones.
template <bool FLOATS> static inline vfloat nth_of(vuint four, int i) {
    if (FLOATS) return of_e4m3((four >> (8 * i)) & 255u);
    return to_floats(as_ints(four << (24 - 8 * i)) >> 24);
}
static inline vuint two_words(vfloat even, vfloat odd) { return bits_of(even) >> 16 | (bits_of(odd) & 0xffff0000u); }

// Sixteen times four numbers of one token -> words of the token's column.
template <bool FLOATS> static inline void unfold(const uint32_t* fours, uint32_t* words, float*) {
    const vuint four = load_words(fours);
    for (int i = 0; i < 4; i++) store((float*)words + i * PANEL, nth_of<FLOATS>(four, i));
}
template <bool FLOATS> static inline void unfold(const uint32_t* fours, uint32_t* words, bf16*) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
    const __m512i pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const __m512i number = _mm512_shuffle_epi8(_mm512_loadu_si512(fours), pairs);
    __m512i first, second;
    if (FLOATS) of_magnitudes<false>(E4M3_NUMBERS, number, number, first, second);
    else of_halves(number, first, second);
    _mm512_storeu_si512(words, first);
    _mm512_storeu_si512(words + PANEL, second);
#else
    const vuint four = load_words(fours);
    for (int i = 0; i < 2; i++)
        store_words(words + i * PANEL, two_words(nth_of<FLOATS>(four, 2 * i), nth_of<FLOATS>(four, 2 * i + 1)));
#endif
}

// Of 32 keys the numbers from .. from + 64 of `width`, four in each word. A row may be null: zeros.
template <class T> static inline void fours_of(const T* const* rows, long from, long width, uint32_t* fours) {
    const long count = std::min(64L, width - from), words = count / 4;
    const uint32_t* at[PANEL];
    for (int i = 0; i < PANEL; i++) at[i] = rows[i] ? (const uint32_t*)((const char*)rows[i] + from) : nullptr;
    pack_columns(at, words, 16, fours);
    if (count % 4)
        for (int i = 0; i < PANEL; i++)
            if (at[i]) memcpy(&fours[words * PANEL + i], at[i] + words, count % 4);
}

// The numbers of 32 keys, `width` each and zeros up to `columns`, as a panel (matmul.h).
template <bool FLOATS, class T, bool COUNTED = COUNTS<T> && !FLOATS>
static inline void pack_small_keys(const T* const* rows, long width, long columns, uint32_t* out) {
    alignas(64) uint32_t fours[16 * PANEL];
    for (long from = 0; from < columns; from += 64) {
        fours_of(rows, from, width, fours);
        for (long w = 0; w < std::min(64L, columns - from) / 4; w++, out += 4 / IN_WORD<T> * PANEL)
            for (long half = 0; half < PANEL; half += LANES) {
                if (COUNTED) {
                    vuint even, odd;
                    two_and_two(load_words(fours + w * PANEL + half), even, odd);
                    store_words(out + half, even);
                    store_words(out + half + PANEL, odd);
                } else
                    unfold<FLOATS>(fours + w * PANEL + half, out + half, (T*)nullptr);
            }
    }
}

// A few rows' products with them, without a panel in between.
template <class T>
static inline void times_small_keys(
    const Rows<const bf16>& a, int rows, const T* const* keys, long width, long columns, int32_t* sums) {
    alignas(64) uint32_t fours[16 * PANEL];
    for (long from = 0; from < columns; from += 64) {
        fours_of(keys, from, width, fours);
        const long words = std::min(64L, columns - from) / 4;
        in_groups(rows, [&](auto count, int r) {
            rows_times_fours<count.value>(a.from(r, from), words, fours, sums + r * PANEL, from > 0);
        });
    }
}

// Sixteen bytes.
template <bool FLOATS> static inline vfloat numbers_at(const int8_t* p) {
    const vint bytes = load_bytes(p);
    if (FLOATS) return of_e4m3(as_words(bytes) & 255u);
    return to_floats(bytes);
}

// 32 numbers of a value, and of the next token's where a word holds two.
template <bool FLOATS> static inline void pair(const int8_t* a, const int8_t*, uint32_t* words, float*) {
    for (int i = 0; i < PANEL; i += LANES) store((float*)words + i, numbers_at<FLOATS>(a + i));
}
template <bool FLOATS> static inline void pair(const int8_t* a, const int8_t* b, uint32_t* words, bf16*) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
    alignas(64) static const uint8_t ORDER[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 16, 48, 17, 49, 18, 50, 19, 51, 4,  36, 5,  37, 6,  38,
        7,  39, 20, 52, 21, 53, 22, 54, 23, 55, 8,  40, 9,  41, 10, 42, 11, 43, 24, 56, 25, 57,
        26, 58, 27, 59, 12, 44, 13, 45, 14, 46, 15, 47, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i both = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a)), _mm256_loadu_si256((const __m256i*)b), 1);
    const __m512i number = _mm512_permutexvar_epi8(_mm512_load_si512(ORDER), both);
    __m512i first, second;
    if (FLOATS) of_magnitudes<false>(E4M3_NUMBERS, number, number, first, second);
    else of_halves(number, first, second);
    _mm512_storeu_si512(words, first);
    _mm512_storeu_si512(words + LANES, second);
#else
    for (int i = 0; i < PANEL; i += LANES)
        store_words(words + i, two_words(numbers_at<FLOATS>(a + i), numbers_at<FLOATS>(b + i)));
#endif
}

// The numbers of the values from .. to, `width` each, to panels of 32 columns, `panel` words apart. A row may be null.
template <bool FLOATS, class T, bool COUNTED = COUNTS<T> && !FLOATS>
static inline void pack_small_values(const T* const* rows, long from, long to, long width, uint32_t* out, long panel) {
    const int8_t none[PANEL] = {};
    const auto to_words = [](const int8_t* a, const int8_t* b, uint32_t* words) {
        if (COUNTED) {
            vuint both[2];
            pair_whole<2>(a, b, both);
            store_words(words, both[0]);
            store_words(words + LANES, both[1]);
        } else
            pair<FLOATS>(a, b, words, (T*)nullptr);
    };
    for (long t = from; t < to; t += IN_WORD<T>) {
        const int8_t *a = (const int8_t*)rows[t], *b = (const int8_t*)rows[t + IN_WORD<T> - 1];
        for (long j = 0; j < width; j += PANEL, a += a ? PANEL : 0, b += b ? PANEL : 0) {
            uint32_t* words = out + j / PANEL * panel + t / IN_WORD<T> * PANEL;
            const int8_t *first = a ? a : none, *second = b ? b : none;
            if (width - j >= PANEL) {
                to_words(first, second, words);
                continue;
            }
            int8_t rest[2][PANEL] = {};
            memcpy(rest[0], first, width - j);
            memcpy(rest[1], second, width - j);
            to_words(rest[0], rest[1], words);
        }
    }
}

// A key or value as it is, in the model's own type.
template <class T> static inline void keep_row(const T* from, long width, T* to) { memcpy((void*)to, from, width * sizeof(T)); }
static inline void keep_row(const float* from, long width, bf16* to) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) store_row(to + i, load(from + i));
    if (i == width) return;
    bf16 rest[LANES];
    store_row(rest, load_some(from + i, width - i));
    memcpy((void*)(to + i), rest, (width - i) * sizeof(bf16));
}
