// RMS norms of rows for models whose other parts run elsewhere: sums and factors are float32, rounded once.
#pragma once
#include <cmath>

#include "matmul.h"
#include "team.h"

template <class T>
static void norm_rows(Team& team, long rows, long width, float epsilon, const float* weight, const T* x, T* out) {
    const auto one = [&](long row) {
        const T* from = x + row * width;
        const Rows<T> to = plain_rows(out, width);
        vfloat sum = all(0.0f), v;
        long i = 0;
        for (; i + LANES <= width; i += LANES) {
            load_row(from + i, v);
            sum += v * v;
        }
        float square = sum_of(sum);
        for (; i < width; i++) square += to_float(from[i]) * to_float(from[i]);
        const float factor = 1.0f / std::sqrt(square / width + epsilon);
        for (i = 0; i + LANES <= width; i += LANES) {
            load_row(from + i, v);
            to.put(row, i, v * all(factor) * load(weight + i));
        }
        for (; i < width; i++) to.put(row, i, all(to_float(from[i]) * factor * weight[i]), 1);
    };
    constexpr long few = 1 << 15;  // elements that are not worth another thread
    if (rows * width <= few) {
        for (long row = 0; row < rows; row++) one(row);
        return;
    }
    constexpr long together = 8;
    team.run([&](int thread) {
        for (long task = thread; task * together < rows; task = team.next())
            for (long row = task * together; row < std::min(rows, (task + 1) * together); row++) one(row);
    });
}
