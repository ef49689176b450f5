// A team of threads that runs one function at a time, with cheap barriers inside it.
//
// Thread 0 is the caller. Between runs the others spin shortly, then sleep. Inside a run they meet at barriers and
// take tasks from one counter, so a thread that the operating system takes away delays nobody else's tasks.
// A barrier spins first and yields its core after a while: the machine may have fewer cores to give than asked for.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <pthread.h>
#include <sched.h>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() { std::this_thread::yield(); }
#endif

// The calling thread on one processor for as long as this lives; -1: wherever it was. The caller is Python's, and the
// threads that it starts later would inherit what it is bound to, so the bond does not outlast a run.
class OnProcessor {
public:
#if defined(__linux__)
    explicit OnProcessor(int cpu) {
        if (cpu < 0 || sched_getaffinity(0, sizeof before_, &before_)) return;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        bound_ = !sched_setaffinity(0, sizeof one, &one);
    }
    ~OnProcessor() {
        if (bound_) sched_setaffinity(0, sizeof before_, &before_);
    }

private:
    cpu_set_t before_;
    bool bound_ = false;
#else
    explicit OnProcessor(int) {}
#endif
};

class Team {
public:
    // `cpus`: the processor of each thread, or empty: the operating system's choice.
    Team(int size, std::vector<int> cpus) : size_(size), cpus_(std::move(cpus)) {
        for (int i = 1; i < size; i++)
            threads_.emplace_back([this, i] {
                OnProcessor here(cpu_of(i));
                wait_for_work(i);
            });
    }
    ~Team() {
        {
            std::lock_guard<std::mutex> guard(mutex_);
            stopping_ = true;
            epoch_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return size_; }
    const std::vector<int>& cpus() const { return cpus_; }

    // Runs work(thread) on every thread; returns when all are done.
    void run(const std::function<void(int)>& work) {
        OnProcessor here(cpu_of(0));
        work_ = &work;
        next_.store(size_, std::memory_order_relaxed);
        if (size_ > 1) {
            {
                std::lock_guard<std::mutex> guard(mutex_);
                epoch_.fetch_add(1, std::memory_order_release);
            }
            wake_.notify_all();
        }
        work(0);
        barrier();
    }

    // The next task's number. A thread's first task has the thread's own number, so it is known beforehand; the others
    // come from here, counted anew after each barrier.
    int next() { return next_.fetch_add(1, std::memory_order_relaxed); }

    void barrier() {
        if (size_ == 1) {
            next_.store(size_, std::memory_order_relaxed);
            return;
        }
        const unsigned turn = turn_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(size_, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
            if (spins < 4000) relax();
            else sched_yield();
        }
    }

private:
    int cpu_of(int thread) const { return cpus_.empty() ? -1 : cpus_[thread % cpus_.size()]; }

    void wait_for_work(int thread) {
        unsigned seen = 0;
        while (true) {
            for (int spins = 0; spins < 2000 && epoch_.load(std::memory_order_acquire) == seen; spins++) relax();
            if (epoch_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
            }
            seen = epoch_.load(std::memory_order_acquire);
            if (stopping_) return;
            (*work_)(thread);
            barrier();
        }
    }

    const int size_;
    const std::vector<int> cpus_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stopping_ = false;
    const std::function<void(int)>* work_ = nullptr;
    std::atomic<unsigned> epoch_{0};
    alignas(64) std::atomic<int> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> turn_{0};
};
