// The products that a thread can do at most: of one register with another, nothing read and nothing written.
#pragma once
#include "matmul.h"

// Multiplications and additions done in `rounds` rounds by what times_panel multiplies T with; 0: not known here.
template <class T> static double products_of_registers(long rounds) {
    constexpr int sums = 12;  // enough for two a cycle that take six cycles
    float kept = 0;
#if defined(USE_AMX)
    if (sizeof(T) == 2) {
        for (long i = 0; i < rounds; i++) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        return 4.0 * rounds * 2 * 16 * 16 * 32;
    }
#endif
#if defined(__AVX512F__)
    __m512 sum[sums], a = _mm512_setzero_ps(), b = a;
    __asm__ volatile("" : "+v"(a), "+v"(b));  // numbers that the compiler does not know, nor that sums are equal
    for (auto& s : sum) {
        s = a;
        __asm__ volatile("" : "+v"(s));
    }
#if defined(__AVX512BF16__)
    if (sizeof(T) == 2) {
        for (long i = 0; i < rounds; i++)
#pragma GCC unroll 12
            for (int j = 0; j < sums; j++) sum[j] = _mm512_dpbf16_ps(sum[j], (__m512bh)a, (__m512bh)b);
        for (auto s : sum) kept += _mm512_cvtss_f32(s);
        __asm__ volatile("" : : "x"(kept));
        return (double)rounds * sums * LANES * 4;
    }
#endif
    for (long i = 0; i < rounds; i++)
#pragma GCC unroll 12
        for (int j = 0; j < sums; j++) sum[j] = _mm512_fmadd_ps(a, b, sum[j]);
    for (auto s : sum) kept += _mm512_cvtss_f32(s);
    __asm__ volatile("" : : "x"(kept));
    return (double)rounds * sums * LANES * 2;
#elif defined(__AVX2__) && defined(__FMA__)
    __m256 sum[sums], a = _mm256_setzero_ps(), b = a;
    __asm__ volatile("" : "+x"(a), "+x"(b));
    for (auto& s : sum) {
        s = a;
        __asm__ volatile("" : "+x"(s));
    }
    for (long i = 0; i < rounds; i++)
#pragma GCC unroll 12
        for (int j = 0; j < sums; j++) sum[j] = _mm256_fmadd_ps(a, b, sum[j]);
    for (auto s : sum) kept += _mm256_cvtss_f32(s);
    __asm__ volatile("" : : "x"(kept));
    return (double)rounds * sums * LANES;
#else
    (void)rounds, (void)kept;
    return 0;
#endif
}
