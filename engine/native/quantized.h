// Products with weights of 8 or 4 bits: panels of small numbers, expanded group by group into words that matmul.h reads.
//
// A panel holds 32 columns of a matrix [K, N]. For each group of 128, 64 or 32 rows (the last one shorter):
//
//     32 scales    bfloat16 or float32, one a column
//     blocks       of 32 rows: 32 x 32 numbers, in the order of the words that they become (engine/native/quantized.py)
//
// Numbers are exact in bfloat16, whole ones and E4M3, so the sums of a group are those of numbers times what the rows hold;
// then they are multiplied by the scales and added up, in float32. As there, a row's result does not depend on the rows
// beside it.
//
// `bits` says how a weight is kept, and is shared with Python (engine/kept.py): 0, of the model's own type, or
//
//     bits 0 .. 7     of a number: 8 or 4
//     bit 8           numbers are E4M3
//     bit 9           scales are float32
//     bits 16 ..      rows of a group; 0: 128
#pragma once
#include "matmul.h"

constexpr long GROUP = 128;  // the largest

static inline long number_bits(int bits) { return bits & 255; }
static inline bool are_floats(int bits) { return bits & 256; }
static inline long scale_bytes(int bits) { return bits & 512 ? 4 : 2; }
static inline long group_rows(int bits) { return bits >> 16 ? bits >> 16 : GROUP; }

template <class T> static inline long panel_bytes(int bits, long k) {
    if (!bits) return panel_words<T>(k) * 4;
    const long rows = padded(k), group = group_rows(bits);
    return (rows + group - 1) / group * PANEL * scale_bytes(bits) + rows * PANEL * number_bits(bits) / 8;
}

// The numbers of pair `i` of a block's rows (two neighbours in K), columns 16 * half ..: as float32.
static inline void numbers_of(int bits, const char* block, long i, long half, vfloat& even, vfloat& odd) {
    vint low, high;
    if (number_bits(bits) == 8) {
        const vuint pair = load_halves(block + (2 * i + half) * 32);
        if (are_floats(bits)) {
            even = of_e4m3(pair & 255u);
            odd = of_e4m3(pair >> 8);
            return;
        }
        const vint word = as_ints(pair);
        low = (word << 24) >> 24;
        high = (word << 16) >> 24;
    } else {
        const long at = 2 * i + half;
        const vuint word = load_words((const uint32_t*)(block + at / 4 * 64));
        low = as_ints((word >> (int)(at % 4 * 4)) & 15) - 8;
        high = as_ints((word >> (int)(at % 4 * 4 + 16)) & 15) - 8;
    }
    even = to_floats(low);
    odd = to_floats(high);
}

// A block of 32 rows as matmul.h has them.
static inline void expand_block(int bits, const char* block, uint32_t* words, float*) {
    for (long i = 0; i < 16; i++)
        for (long half = 0; half < 2; half++) {
            vfloat even, odd;
            numbers_of(bits, block, i, half, even, odd);
            store((float*)words + 2 * i * PANEL + half * LANES, even);
            store((float*)words + (2 * i + 1) * PANEL + half * LANES, odd);
        }
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// All numbers of 4 bits as bfloat16, twice: the bit above a number says nothing.
alignas(64) static const uint16_t BFLOATS[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
// Sixteen words of the numbers that lie `SHIFT` bits up.
template <int SHIFT> static inline __m512i of_four(__m512i four, __m512i all_numbers) {
    return _mm512_permutexvar_epi16(SHIFT ? _mm512_srli_epi16(four, SHIFT) : four, all_numbers);
}
#if defined(__AVX512VBMI__)
// The bytes of 128 magnitudes as bfloat16; the sign is added to the upper one.
struct Magnitudes {
    alignas(64) uint8_t lower[128], upper[128];
    explicit Magnitudes(bool floats) {
        for (int i = 0; i < 128; i++) {
            const float number = floats ? of_e4m3(all_words(i))[0] : (float)i;
            uint32_t bits;
            memcpy(&bits, &number, 4);
            lower[i] = (uint8_t)(bits >> 16), upper[i] = (uint8_t)(bits >> 24);
        }
    }
};
static const Magnitudes WHOLE_NUMBERS(false), E4M3_NUMBERS(true);
// Twice sixteen words of 64 numbers, whose magnitudes are `size`: of each 16 bytes the lower half, and the upper one.
template <bool LEAST>
static inline void of_magnitudes(const Magnitudes& table, __m512i size, __m512i number, __m512i& first, __m512i& second) {
    const uint8_t *lower = table.lower, *upper = table.upper;
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(lower), size, _mm512_load_si512(lower + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(upper), size, _mm512_load_si512(upper + 64));
    if (LEAST) high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(size), _mm512_set1_epi8(0x43));  // 128 is 0x4300
    const __m512i with_sign = _mm512_ternarylogic_epi32(high, number, _mm512_set1_epi8((char)0x80), 0xf8);  // a | (b & c)
    first = _mm512_unpacklo_epi8(low, with_sign);
    second = _mm512_unpackhi_epi8(low, with_sign);
}
// Of whole numbers from -127 on; with `LEAST` from -128 on.
template <bool LEAST = false> static inline void of_halves(__m512i number, __m512i& first, __m512i& second) {
    of_magnitudes<LEAST>(WHOLE_NUMBERS, _mm512_abs_epi8(number), number, first, second);
}
// The first 32 bytes, and the second.
template <bool FLOATS> static inline void of_eight(const char* bytes, __m512i& first, __m512i& second) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i number = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(bytes));
    if (FLOATS) of_magnitudes<false>(E4M3_NUMBERS, number, number, first, second);  // a look-up ignores the sign
    else of_halves<true>(number, first, second);
}
#else
template <bool FLOATS> static inline void of_eight(const char* bytes, __m512i& first, __m512i& second) {
    const auto numbers = [](const char* p) {
        const __m128i sixteen = _mm_loadu_si128((const __m128i*)p);
        if (FLOATS) return (__m512)of_e4m3((vuint)_mm512_cvtepu8_epi32(sixteen));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
    };
    first = (__m512i)_mm512_cvtne2ps_pbh(numbers(bytes + 16), numbers(bytes));
    second = (__m512i)_mm512_cvtne2ps_pbh(numbers(bytes + 48), numbers(bytes + 32));
}
#endif
template <bool FLOATS> static inline void expand_eight(const char* block, uint32_t* words) {
    for (long i = 0; i < 16; i++) {
        __m512i first, second;
        of_eight<FLOATS>(block + i * 64, first, second);
        _mm512_store_si512(words + i * PANEL, first);
        _mm512_store_si512(words + i * PANEL + LANES, second);
    }
}
#endif

static inline void expand_block(int bits, const char* block, uint32_t* words, bf16*) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if (number_bits(bits) == 4) {
        const __m512i all_numbers = _mm512_load_si512(BFLOATS);
        for (long v = 0; v < 8; v++, words += 4 * LANES) {
            const __m512i four = _mm512_loadu_si512(block + v * 64);
            _mm512_store_si512(words, of_four<0>(four, all_numbers));
            _mm512_store_si512(words + LANES, of_four<4>(four, all_numbers));
            _mm512_store_si512(words + 2 * LANES, of_four<8>(four, all_numbers));
            _mm512_store_si512(words + 3 * LANES, of_four<12>(four, all_numbers));
        }
        return;
    }
    if (are_floats(bits)) expand_eight<true>(block, words);
    else expand_eight<false>(block, words);
#else
    for (long i = 0; i < 16; i++)
        for (long half = 0; half < 2; half++) {
            vfloat even, odd;
            numbers_of(bits, block, i, half, even, odd);
            store_words(words + i * PANEL + half * LANES, bits_of(even) >> 16 | (bits_of(odd) & 0xffff0000u));
        }
#endif
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(USE_AMX)
// A few rows times a group, expanded in registers: to the last bit what times_panel makes of the expanded words.
template <int R>
static inline void few_rows_times(int bits, const Rows<const bf16>& a, long k, const char* b, float* c, Ahead& ahead) {
    __m512 acc[R][2];
    for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    const __m512i all_numbers = _mm512_load_si512(BFLOATS);
    for (long block = 0; block < k / 32; block++) {
        const bf16* x = a.data + block * a.step;
        const auto times = [&](long i, __m512i b0, __m512i b1) {
            for (int r = 0; r < R; r++) {
                int32_t pair;
                memcpy(&pair, x + r * a.row + i * 2, 4);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                acc[r][0] = _mm512_dpbf16_ps(acc[r][0], both, (__m512bh)b0);
                acc[r][1] = _mm512_dpbf16_ps(acc[r][1], both, (__m512bh)b1);
            }
        };
        const auto times_eight = [&](auto floats) {
            for (long i = 0; i < 16; i++, b += 64) {
                __m512i first, second;
                of_eight<decltype(floats)::value>(b, first, second);
                times(i, first, second);
            }
        };
        ahead.fetch();
        if (number_bits(bits) == 4)
            for (long v = 0; v < 8; v++, b += 64) {
                const __m512i four = _mm512_loadu_si512(b);
                times(2 * v, of_four<0>(four, all_numbers), of_four<4>(four, all_numbers));
                times(2 * v + 1, of_four<8>(four, all_numbers), of_four<12>(four, all_numbers));
            }
        else if (are_floats(bits)) times_eight(std::true_type());
        else times_eight(std::false_type());
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 2; j++) store(c + r * PANEL + j * LANES, (vfloat)acc[r][j]);
}

// False: they are too many. Up to 3 rows more than there are may be read, of a tile; what they give is nobody's.
static inline bool few_rows(int bits, const Rows<const bf16>& a, long rows, long k, const char* b, float* c, Ahead& ahead) {
    if (rows > 8) return false;
    if (rows > 4) few_rows_times<8>(bits, a, k, b, c, ahead);
    else if (rows > 2) few_rows_times<4>(bits, a, k, b, c, ahead);
    else if (rows == 2) few_rows_times<2>(bits, a, k, b, c, ahead);
    else few_rows_times<1>(bits, a, k, b, c, ahead);
    return true;
}
#else
static inline bool few_rows(int, const Rows<const bf16>&, long, long, const char*, float*, Ahead&) { return false; }
#endif
static inline bool few_rows(int, const Rows<const float>&, long, long, const char*, float*, Ahead&) { return false; }

// As matmul.h's, for a panel of numbers that are kept so.
template <class T, class Done>
static inline void stripe_times_panel(
    const Rows<const T>& a, long rows, long k, int bits, const char* b, float* c, Ahead& ahead, Done done) {
    if (!bits) return stripe_times_panel<T>(a, rows, k, (const uint32_t*)b, c, ahead, done);
    alignas(64) uint32_t words[GROUP / IN_WORD<T> * PANEL];
    alignas(64) float part[PANEL * PANEL];
    const long group = group_rows(bits), block_bytes = number_bits(bits) * PANEL * 32 / 8;
    for (long from = 0; from < k; from += group) {
        const long width = std::min(group, k - from);
        vfloat scale[2];
        for (int j = 0; j < 2; j++)
            if (scale_bytes(bits) == 4) scale[j] = load((const float*)b + j * LANES);
            else load_row((const bf16*)b + j * LANES, scale[j]);
        b += PANEL * scale_bytes(bits);
        const bool few = few_rows(bits, a.from(0, from), rows, width, b, part, ahead);
        if (!few)
            for (long i = 0; i < width; i += 32)
                expand_block(bits, b + i / 32 * block_bytes, words + i / IN_WORD<T> * PANEL, (T*)nullptr);
        b += width / 32 * block_bytes;
        for (long r = 0; r < rows; r += PANEL) {
            const int here = (int)std::min<long>(PANEL, rows - r);
            if (!few) times_panel(a.from(r, from), here, width, words, part, PANEL, false, ahead);
            for (int i = 0; i < here; i++)
                for (int j = 0; j < 2; j++) {
                    float* to = c + (r + i) * PANEL + j * LANES;
                    const vfloat sum = load(part + i * PANEL + j * LANES) * scale[j];
                    store(to, from ? load(to) + sum : sum);
                }
            if (from + width == k) done(r, here);
        }
    }
}
