// Keys and values of 8 bits (engine/kv_rounding.py): rounded when they are written, expanded where they are packed.
//
// A token and head has one row of bytes, 16 bits of scale behind the numbers, and up to 3 bytes at the end:
//
//     int8           key numbers, scale, value numbers, scale
//     int8_values    key in the model's own type, value numbers, scale
#pragma once
#include "matmul.h"

enum Rounding { WIDE = 0, SMALL = 1, SMALL_VALUES = 2 };  // shared with Python

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

// `width` elements -> their numbers and scale, to the bit as the module in Python has them.
template <class X> static inline void round_row(const X* from, long width, char* to) {
    vfloat most = all(0.0f), odd = all(0.0f);
    for (long i = 0; i < width; i += LANES) {
        const vfloat v = load_some(from + i, width - i);
        most = vmax(most, vmax(v, -v));
        odd += v - v;  // NaN where v is no finite number, which `most` need not show
    }
    float scale = round_to_bf16(max_of(most) / 127.0f + sum_of(odd));
    if (scale < LEAST_SCALE) scale = 1.0f;
    const vfloat by = all(scale), limit = all(127.0f), magic = all(12582912.0f);  // adding it rounds to a whole number
    const auto numbers = [&](vfloat v) {
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

// And back, in the model's type; `to` has room for whole vectors.
template <class T> static inline void expand_row(const char* from, long width, T* to) {
    bf16 kept;
    memcpy(&kept, from + width, SCALE_BYTES);
    const vfloat scale = all(to_float(kept));
    const auto expanded = [&](long i, long count) {
        int8_t numbers[LANES] = {};
        memcpy(numbers, from + i, count);
        return to_floats(load_bytes(numbers)) * scale;
    };
    long i = 0;
    for (; i + PANEL <= width; i += PANEL) store_rows(to + i, expanded(i, LANES), expanded(i + LANES, LANES));
    for (; i + LANES <= width; i += LANES) store_row(to + i, expanded(i, LANES));
    if (i < width) store_row(to + i, expanded(i, width - i));
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
