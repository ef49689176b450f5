// The experts of a mixture on CPU: each row goes through the few that its router chose.
//
// A row and one of its choices make a pair. Per call, with a barrier between any two steps:
//     pairs sorted by expert, rows copied -> gate and up -> down, weighted -> each row's pairs added, in order of choice
//
// An expert's panels are read once for all of its rows, and experts that nobody chose are not read. What a row gets is a
// sum in one fixed order, whatever rows come with it. Sums are float32; what products read is rounded once.
#pragma once
#include <vector>

#include "memory.h"
#include "quantized.h"
#include "team.h"

struct Experts {
    int32_t is_bf16, count, hidden, inner;
    int32_t columns;  // of the first product where the gate is torch's (stages UP and DOWN)
    int32_t bits;     // of quantized weights (quantized.h); 0: of the type
    // Of the gate: g = min(gate, limit); (up within +-limit, + plus) * g * sigmoid(alpha * g + cube * g^3)
    float alpha, limit, plus, cube;
    const void *up, *down;  // packed, one expert after the other; gate and up panel by panel in turn unless torch gates
    const float *up_bias, *down_bias;  // [count, columns as their panels have them]; null = none
    int64_t* load;  // [count]: rows that each has had, added to
};

struct Routed {
    int64_t rows, choices;
    const int64_t* chosen;  // [rows, choices]; a number that is no expert's adds nothing
    const float* weights;
};

enum class Stage { WHOLE, UP, DOWN };

template <class T> class Mixture {
public:
    void run(Team& team, const Experts& e, Stage stage, const Routed& routed, const T* x, T* middle, T* out) {
        sort(e, routed, stage != Stage::DOWN);
        const long hidden = padded(e.hidden), inner = padded(e.inner);
        const Rows<T> a = tiled_rows(a_.need(stage == Stage::DOWN ? 0 : places_ * hidden), hidden);
        const Rows<T> h = tiled_rows(h_.need(stage == Stage::UP ? 0 : places_ * inner), inner);
        float* y = y_.need(stage == Stage::UP ? 0 : places_ * hidden);
        team.run([&](int thread) {
            begin_products();
            const Rows<T>& read = stage == Stage::DOWN ? h : a;
            const long width = stage == Stage::DOWN ? e.inner : e.hidden;
            for (long i = thread; i < (long)order_.size(); i = team.next()) {
                const long row = stage == Stage::DOWN ? order_[i] : order_[i] / routed.choices;
                copy((stage == Stage::DOWN ? middle : x) + row * width, width, read, place_[order_[i]]);
            }
            team.barrier();
            if (stage == Stage::WHOLE) gate_up(team, thread, e, a, h);
            if (stage == Stage::UP) up(team, thread, e, a, middle);
            if (stage != Stage::UP) {
                down(team, thread, e, routed, h, y);
                for (long row = thread; row < routed.rows; row = team.next())
                    combine(e, routed, row, y, plain_rows(out, (long)e.hidden));
                team.barrier();
            }
            end_products();
        });
    }

private:
    struct Part {  // of one expert
        long expert, rows, place, first;  // where its rows lie; its first pair in order_
        long stripes, stripe;
    };
    struct Panels {
        const char* data;
        int bits;
        long k, tasks, together;  // tasks of a stripe; panels that one takes
        long task_bytes() const { return panel_bytes<T>(bits, k) * together; }
        long expert_bytes() const { return tasks * task_bytes(); }
    };
    struct Task {
        const Part* part;
        long number;  // within the part
    };

    Buffer<T> a_, h_;
    Buffer<float> y_;
    std::vector<Part> parts_;
    std::vector<long> order_, place_, starts_;  // pairs by expert; where a pair's row lies, or -1; scratch
    long places_ = 0;

    // An expert's rows begin with a tile.
    void sort(const Experts& e, const Routed& routed, bool count) {
        const long pairs = routed.rows * routed.choices;
        starts_.assign(e.count + 1, 0);
        const auto valid = [&](long pair) { return routed.chosen[pair] >= 0 && routed.chosen[pair] < e.count; };
        for (long pair = 0; pair < pairs; pair++)
            if (valid(pair)) starts_[routed.chosen[pair] + 1]++;
        parts_.clear();
        places_ = 0;
        const long fit = std::max<long>(
            PANEL, std::min(STRIPE, STRIPE_BYTES / (padded(e.hidden) * (long)sizeof(T)) / PANEL * PANEL));
        for (long expert = 0; expert < e.count; expert++) {
            const long rows = starts_[expert + 1];
            if (rows) {
                const long stripes = (rows + fit - 1) / fit;
                const long stripe = (rows + stripes * PANEL - 1) / (stripes * PANEL) * PANEL;
                parts_.push_back({expert, rows, places_, starts_[expert], (rows + stripe - 1) / stripe, stripe});
                places_ += (rows + 15) / 16 * 16;
                if (count && e.load) e.load[expert] += rows;
            }
            starts_[expert + 1] += starts_[expert];
        }
        order_.resize(starts_[e.count]);
        place_.assign(pairs, -1);
        for (long pair = 0; pair < pairs; pair++)
            if (valid(pair)) order_[starts_[routed.chosen[pair]]++] = pair;
        for (const Part& part : parts_)
            for (long i = 0; i < part.rows; i++) place_[order_[part.first + i]] = part.place + i;
    }

    static void copy(const T* row, long width, const Rows<T>& to, long place) {
        long c = 0;
        for (; c + 32 <= width; c += 32) memcpy((void*)to.at(place, c), row + c, 32 * sizeof(T));
        if (c == width) return;
        memset((void*)to.at(place, c), 0, 32 * sizeof(T));
        memcpy((void*)to.at(place, c), row + c, (width - c) * sizeof(T));
    }

    // Tasks are panels times stripes, expert after expert. `work(part, panels, panel, from, count, ahead)`; what the
    // thread's next task reads is fetched meanwhile.
    template <class Work> void over_parts(Team& team, int thread, const Panels& w, Work work) {
        size_t at = 0;
        long before = 0;
        const auto find = [&](long task) -> Task {  // numbers only grow
            while (at < parts_.size() && task >= before + parts_[at].stripes * w.tasks)
                before += parts_[at++].stripes * w.tasks;
            return at < parts_.size() ? Task{&parts_[at], task - before} : Task{nullptr, 0};
        };
        const auto panels_of = [&](const Task& t) {
            return w.data + t.part->expert * w.expert_bytes() + t.number % w.tasks * w.task_bytes();
        };
        for (Task task = find(thread), next; task.part; task = next) {
            next = find(team.next());
            const Part& part = *task.part;
            const long from = task.number / w.tasks * part.stripe, count = std::min(part.rows - from, part.stripe);
            Ahead ahead;
            if (next.part) {
                const long steps = (count + PANEL - 1) / PANEL * w.together * (padded(w.k) / 32);
                const char* soon = panels_of(next);
                ahead = {soon, soon + w.task_bytes(), (int)((w.task_bytes() / 64 + steps - 1) / steps)};
            }
            work(part, panels_of(task), task.number % w.tasks, from, count, ahead);
        }
        team.barrier();
    }

    static Rows<const T> rows_of(const Rows<T>& all_rows, long place) {
        const Rows<T> r = all_rows.from(place, 0);
        return {r.data, r.row, r.step, r.lower};
    }

    void gate_up(Team& team, int thread, const Experts& e, const Rows<T>& a, const Rows<T>& h) {
        const long pairs = padded(e.inner) / PANEL;
        alignas(64) float gate[STRIPE * PANEL], up[STRIPE * PANEL];
        const Panels w{(const char*)e.up, e.bits, e.hidden, pairs, 2};
        over_parts(team, thread, w, [&](const Part& part, const char* b, long pair, long from, long count, Ahead& ahead) {
            const Rows<const T> first = rows_of(a, part.place + from);
            const float* bias = e.up_bias ? e.up_bias + (part.expert * pairs + pair) * 2 * PANEL : nullptr;
            stripe_times_panel<T>(first, count, padded(e.hidden), e.bits, b, gate, ahead, [](long, int) {});
            stripe_times_panel<T>(first, count, padded(e.hidden), e.bits, b + panel_bytes<T>(e.bits, e.hidden), up, ahead, [&](long r, int here) {
                for (long i = r; i < r + here; i++) {
                    vfloat value[2];
                    for (int j = 0; j < 2; j++) {
                        vfloat g = load(gate + i * PANEL + j * LANES), u = load(up + i * PANEL + j * LANES);
                        if (bias) g += load(bias + j * LANES), u += load(bias + PANEL + j * LANES);
                        value[j] = gated(e, g, u);
                    }
                    store_rows(h.at(part.place + from + i, pair * PANEL), value[0], value[1]);
                }
            });
        });
    }

    static vfloat gated(const Experts& e, vfloat gate, vfloat up) {
        constexpr bool fine = sizeof(T) == 4;
        if (e.limit < INFINITY) {
            gate = vmin(gate, all(e.limit));
            up = vmax(vmin(up, all(e.limit)), all(-e.limit));
        }
        constexpr float to_base_2 = -1.44269504088896341f;
        vfloat slope = all(to_base_2 * e.alpha);
        if (e.cube != 0.0f) slope += all(to_base_2 * e.cube) * gate * gate;
        const vfloat d = vexp2<fine>(vmin(gate * slope, all(126.0f))) + all(1.0f);
        return gate * (fine ? inverse(d) : rough_inverse(d)) * (up + all(e.plus));
    }

    void up(Team& team, int thread, const Experts& e, const Rows<T>& a, T* middle) {
        alignas(64) float c[STRIPE * PANEL];
        const Rows<T> to = plain_rows(middle, (long)e.columns);
        const Panels w{(const char*)e.up, e.bits, e.hidden, padded(e.columns) / PANEL, 1};
        over_parts(team, thread, w, [&](const Part& part, const char* b, long panel, long from, long count, Ahead& ahead) {
            const float* bias = e.up_bias ? e.up_bias + (part.expert * w.tasks + panel) * PANEL : nullptr;
            stripe_times_panel<T>(rows_of(a, part.place + from), count, padded(e.hidden), e.bits, b, c, ahead, [&](long r, int here) {
                for (long i = r; i < r + here; i++)
                    for (long j = 0; j < PANEL; j += LANES) {
                        const long column = panel * PANEL + j, there = std::min<long>(LANES, e.columns - column);
                        const vfloat sum = load(c + i * PANEL + j);
                        if (there > 0) to.put(order_[part.first + from + i], column, bias ? sum + load(bias + j) : sum, there);
                    }
            });
        });
    }

    void down(Team& team, int thread, const Experts& e, const Routed& routed, const Rows<T>& h, float* y) {
        alignas(64) float c[STRIPE * PANEL];
        const Panels w{(const char*)e.down, e.bits, e.inner, padded(e.hidden) / PANEL, 1};
        over_parts(team, thread, w, [&](const Part& part, const char* b, long panel, long from, long count, Ahead& ahead) {
            const float* bias = e.down_bias ? e.down_bias + (part.expert * w.tasks + panel) * PANEL : nullptr;
            stripe_times_panel<T>(rows_of(h, part.place + from), count, padded(e.inner), e.bits, b, c, ahead, [&](long r, int here) {
                for (long i = r; i < r + here; i++) {
                    const vfloat weight = all(routed.weights[order_[part.first + from + i]]);
                    float* to = y + (part.place + from + i) * padded(e.hidden) + panel * PANEL;
                    for (long j = 0; j < PANEL; j += LANES) {
                        const vfloat sum = load(c + i * PANEL + j);
                        store(to + j, (bias ? sum + load(bias + j) : sum) * weight);
                    }
                }
            });
        });
    }

    void combine(const Experts& e, const Routed& routed, long row, const float* y, const Rows<T>& out) const {
        const long* places = place_.data() + row * routed.choices;
        for (long c = 0; c < e.hidden; c += LANES) {
            vfloat sum = all(0.0f);
            for (long i = 0; i < routed.choices; i++)
                if (places[i] >= 0) sum += load(y + places[i] * padded(e.hidden) + c);
            out.put(row, c, sum, std::min<long>(LANES, e.hidden - c));
        }
    }
};
