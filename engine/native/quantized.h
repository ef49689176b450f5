// Products with weights of 8 or 4 bits: panels of small numbers, expanded group by group into words that matmul.h reads.
//
// A panel holds 32 columns of a matrix [K, N]. For each group of 128 rows (the last one shorter):
//
//     32 scales    bfloat16, one a column
//     blocks       of 32 rows: 32 x 32 numbers, in the order of the words that they become (engine/native/quantized.py)
//
// Numbers are exact in bfloat16, so the sums of a group are those of whole numbers times what the rows hold; then they are
// multiplied by the scales and added up, in float32. As there, a row's result does not depend on the rows beside it.
#pragma once
#include "matmul.h"

constexpr long GROUP = 128;

// `bits`: 8, 4, or 0 for weights of the model's own type.
template <class T> static inline long panel_bytes(int bits, long k) {
    const long rows = padded(k);
    return bits ? (rows + GROUP - 1) / GROUP * PANEL * 2 + rows * PANEL * bits / 8 : panel_words<T>(k) * 4;
}

// The numbers of pair `i` of a block's rows (two neighbours in K), columns 16 * half ..: as float32.
static inline void numbers_of(int bits, const char* block, long i, long half, vfloat& even, vfloat& odd) {
    vint low, high;
    if (bits == 8) {
        typedef uint16_t vhalf __attribute__((vector_size(32)));
        vhalf both;
        memcpy(&both, block + (2 * i + half) * 32, 32);
        const vint word = (vint)__builtin_convertvector(both, vuint);
        low = (word << 24) >> 24;
        high = (word << 16) >> 24;
    } else {
        const long at = 2 * i + half;
        const vuint word = *(const vuint_u*)(block + at / 4 * 64);
        low = (vint)((word >> (int)(at % 4 * 4)) & 15) - 8;
        high = (vint)((word >> (int)(at % 4 * 4 + 16)) & 15) - 8;
    }
    even = __builtin_convertvector(low, vfloat);
    odd = __builtin_convertvector(high, vfloat);
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

static inline void expand_block(int bits, const char* block, uint32_t* words, bf16*) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if (bits == 4) {  // a table of all sixteen, twice: the bit above a number says nothing
        alignas(64) static const uint16_t table[32] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
        const __m512i all_numbers = _mm512_load_si512(table);
        for (long v = 0; v < 8; v++, words += 4 * LANES) {
            const __m512i four = _mm512_loadu_si512(block + v * 64);
            _mm512_store_si512(words, _mm512_permutexvar_epi16(four, all_numbers));
            _mm512_store_si512(words + LANES, _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 4), all_numbers));
            _mm512_store_si512(words + 2 * LANES, _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 8), all_numbers));
            _mm512_store_si512(words + 3 * LANES, _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 12), all_numbers));
        }
        return;
    }
    for (long at = 0; at < 32; at++, block += 32, words += LANES) {
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)block)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(block + 16))));
        _mm512_store_si512(words, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
#else
    for (long i = 0; i < 16; i++)
        for (long half = 0; half < 2; half++) {
            vfloat even, odd;
            numbers_of(bits, block, i, half, even, odd);
            vuint low, high;
            memcpy(&low, &even, 64);
            memcpy(&high, &odd, 64);
            *(vuint_u*)(words + i * PANEL + half * LANES) = low >> 16 | (high & 0xffff0000u);
        }
#endif
}

// As matmul.h's, for a panel of numbers of `bits` bits, or of the model's own type if 0.
template <class T, class Done>
static inline void stripe_times_panel(
    const Rows<const T>& a, long rows, long k, int bits, const char* b, float* c, Ahead& ahead, Done done) {
    if (!bits) return stripe_times_panel<T>(a, rows, k, (const uint32_t*)b, c, ahead, done);
    alignas(64) uint32_t words[GROUP / IN_WORD<T> * PANEL];
    alignas(64) float part[PANEL * PANEL];
    for (long from = 0; from < k; from += GROUP) {
        const long width = std::min(GROUP, k - from);
        vfloat scale[2];
        for (int j = 0; j < 2; j++) load_row((const bf16*)b + j * LANES, scale[j]);
        b += PANEL * 2;
        for (long i = 0; i < width; i += 32, b += 4 * PANEL * bits) expand_block(bits, b, words + i / IN_WORD<T> * PANEL, (T*)nullptr);
        for (long r = 0; r < rows; r += PANEL) {
            const int here = (int)std::min<long>(PANEL, rows - r);
            times_panel(a.from(r, from), here, width, words, part, PANEL, false, ahead);
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
