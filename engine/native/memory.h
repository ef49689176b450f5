// Memory of the kernels' own: it grows to what was needed once, and stays.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

constexpr size_t LARGE_PAGE = 2 << 20;

// Large pages for memory that is about to be written for the first time; a wish, not a promise. Where they are granted,
// addresses are found faster and the processor's own prefetching does not end every 4 KiB.
static void wish_for_large_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t from = ((uintptr_t)data + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    const uintptr_t to = ((uintptr_t)data + bytes) / LARGE_PAGE * LARGE_PAGE;
    if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

template <class T> struct Buffer {  // zeroed when it grows
    T* data = nullptr;
    size_t items = 0;
    T* need(size_t count) {
        if (count > items) {
            free(data);
            const size_t bytes = (count * sizeof(T) + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
            if (posix_memalign((void**)&data, LARGE_PAGE, bytes)) abort();
            wish_for_large_pages(data, bytes);
            memset((void*)data, 0, bytes);
            items = bytes / sizeof(T);
        }
        return data;
    }
    ~Buffer() { free(data); }
};
