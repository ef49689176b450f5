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
#include <sched.h>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() { std::this_thread::yield(); }
#endif

class Team {
public:
    explicit Team(int size) : size_(size) {
        for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { wait_for_work(i); });
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

    // Runs work(thread) on every thread; returns when all are done.
    void run(const std::function<void(int)>& work) {
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
