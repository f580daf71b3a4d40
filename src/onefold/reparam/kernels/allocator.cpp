// Memory for the maps that the kernels write: kept when freed, for the next map of about that size.
//
// A map is tens of megabytes, which the C library asks the kernel for anew every time, page by page and zeroed. Here a
// block that was given back waits for the next taker. All blocks together, in use and waiting, never come to more than
// than the most that was in use at once.
#include <map>
#include <mutex>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "vector.h"

namespace {

constexpr size_t PAGE = size_t(2) << 20;  // a large page: one entry of the processor's table, and one fault

struct Pool {
    std::mutex lock;
    std::multimap<size_t, void*> waiting;
    size_t in_use = 0, kept = 0, most = 0;

    void* take(size_t size) {
        std::lock_guard<std::mutex> held(lock);
        in_use += size, most = std::max(most, in_use);
        const auto found = waiting.lower_bound(size);
        if (found != waiting.end() && found->first == size) {
            void* block = found->second;
            kept -= size, waiting.erase(found);
            return block;
        }
        while (!waiting.empty() && in_use + kept > most) drop();
        void* block = nullptr;
        if (posix_memalign(&block, PAGE, size)) {
            while (!waiting.empty()) drop();
            if (posix_memalign(&block, PAGE, size)) return in_use -= size, nullptr;
        }
#ifdef __linux__
        madvise(block, size, MADV_HUGEPAGE);
#endif
        return block;
    }

    void give(void* block, size_t size) {
        std::lock_guard<std::mutex> held(lock);
        in_use -= size, kept += size;
        waiting.emplace(size, block);
    }

    void drop() {
        const auto largest = std::prev(waiting.end());
        kept -= largest->first, std::free(largest->second);
        waiting.erase(largest);
    }
};

Pool& pool() {
    static Pool* one = new Pool;  // never destroyed: a tensor may outlive everything else
    return *one;
}

// The exchange format of arrays (DLPack 0.x), as far as a dense float32 tensor on the CPU needs it.
struct Device {
    int32_t type, id;
};
struct Kind {
    uint8_t code, bits;
    uint16_t lanes;
};
struct Array {
    void* data;
    Device device;
    int32_t ndim;
    Kind kind;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct Managed {
    Array array;
    void* context;
    void (*deleter)(Managed*);
};
struct Owned {
    Managed managed;
    size_t size;
    int64_t shape[1];
};

}  // namespace

// A new array of n floats, for whoever takes a DLPack capsule; null where there is no memory.
API void* new_map(int64_t n) {
    const size_t size = (size_t(n) * sizeof(float) + PAGE - 1) / PAGE * PAGE;
    void* block = pool().take(size);
    if (!block) return nullptr;
    auto* owned = new Owned{};
    owned->size = size, owned->shape[0] = n;
    owned->managed.array = {block, {1, 0}, 1, {2, 32, 1}, owned->shape, nullptr, 0};
    owned->managed.deleter = [](Managed* self) {
        auto* owned = reinterpret_cast<Owned*>(self);
        pool().give(self->array.data, owned->size);
        delete owned;
    };
    return &owned->managed;
}

// Gives the waiting blocks back to the system.
API void drop_maps() {
    std::lock_guard<std::mutex> held(pool().lock);
    while (!pool().waiting.empty()) pool().drop();
}
