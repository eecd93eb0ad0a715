// The ragged KV cache on the CPU: a block's keys and values are copied to each row's own slots, and
// what torch's attention needs to read them there is prepared.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "ops.h"

namespace cllm {
namespace {

// Enough bytes to be worth waking a thread.
constexpr int64_t kBytesPerThread = 1 << 18;

int workers_for(int64_t bytes, int threads) {
    return static_cast<int>(std::min<int64_t>(threads, bytes / kBytesPerThread + 1));
}

int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

void append_head(const BlockAppend& append, const CacheSide& side, int64_t row, int64_t head) {
    const int64_t size = element_size(append.dtype), bytes = append.width * size;
    const char* block = static_cast<const char*>(side.block) +
                        (row * side.block_row + head * side.block_head) * size;
    char* cache = static_cast<char*>(side.cache) + (row * side.cache_row + head * side.cache_head +
                                                    append.lengths[row] * side.cache_slot) *
                                                       size;
    for (int64_t i = 0; i < append.n; ++i) {
        std::memcpy(cache + i * side.cache_slot * size, block + i * side.block_token * size,
                    static_cast<size_t>(bytes));
    }
}

template <typename Element>
void mask_row(const BlockView& view, int64_t row, int64_t groups, Element masked, Element* mask) {
    for (int64_t i = 0; i < view.n; ++i) {
        const int64_t position = view.lengths[row] + i;
        const int64_t from = view.window > 0 ? position - view.window + 1 : 0;
        const int64_t begin = std::clamp<int64_t>(from - view.first, 0, view.slots);
        const int64_t end = std::clamp<int64_t>(position + 1 - view.first, 0, view.slots);
        Element* line = mask + i * view.slots;
        std::fill(line, line + begin, masked);
        std::fill(line + begin, line + end, Element{0});
        std::fill(line + end, line + view.slots, masked);
    }
    // The same for every query head of the group.
    const int64_t size = view.n * view.slots;
    for (int64_t g = 1; g < groups; ++g) std::copy(mask, mask + size, mask + g * size);
}

template <typename Element>
void mask_rows(const BlockView& view, int64_t groups, Element masked, void* mask, int threads) {
    const int64_t size = groups * view.n * view.slots;
    const int workers =
        workers_for(view.batch * size * static_cast<int64_t>(sizeof(Element)), threads);
    (void)workers;  // unused by a compiler without OpenMP
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t row = 0; row < view.batch; ++row) {
        mask_row(view, row, groups, masked, static_cast<Element*>(mask) + row * size);
    }
}

// Whether any element's magnitude, as an integer of its bits without the sign, reaches the limit.
template <typename Bits>
bool any_from(const Bits* data, int64_t count, Bits limit) {
    constexpr Bits kMagnitude = static_cast<Bits>(~(Bits{1} << (8 * sizeof(Bits) - 1)));
    Bits found = 0;
    for (int64_t i = 0; i < count; ++i) {
        found |= static_cast<Bits>((data[i] & kMagnitude) >= limit);
    }
    return found != 0;
}

template <typename Bits>
bool unsafe_slots(const BlockAppend& append, const CacheSide& side, int64_t row, int64_t head,
                  int64_t begin, int64_t end, Bits limit) {
    const Bits* cache =
        static_cast<const Bits*>(side.cache) + row * side.cache_row + head * side.cache_head;
    for (int64_t slot = begin; slot < end; ++slot) {
        if (any_from(cache + slot * side.cache_slot, append.width, limit)) return true;
    }
    return false;
}

// What `block_unsafe_cpu` found: slots that no query of the block sees, or not every one.
constexpr int kUnseen = 1, kSeenBySome = 2;

bool unsafe_head(const BlockAppend& append, const CacheSide& side, int64_t row, int64_t head,
                 int64_t begin, int64_t end) {
    // 2^41 in the wide formats: a score of 256 products with it stays finite beside any query that
    // makes sense. Every finite float16 is smaller.
    switch (append.dtype) {
        case Dtype::kFloat32:
            return unsafe_slots<uint32_t>(append, side, row, head, begin, end, 0x54000000u);
        case Dtype::kBFloat16:
            return unsafe_slots<uint16_t>(append, side, row, head, begin, end, 0x5400u);
        default:
            return unsafe_slots<uint16_t>(append, side, row, head, begin, end, 0x7c00u);
    }
}

}  // namespace

int64_t block_append_cpu(const BlockAppend& append, int threads) {
    for (int64_t row = 0; row < append.batch; ++row) {
        const int64_t length = append.lengths[row];
        if (length < 0 || length > append.capacity - append.n) return row;
    }
    const int64_t pieces = append.batch * append.heads;
    const int workers =
        workers_for(2 * pieces * append.n * append.width * element_size(append.dtype), threads);
    (void)workers;  // unused by a compiler without OpenMP
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        append_head(append, append.keys, piece / append.heads, piece % append.heads);
        append_head(append, append.values, piece / append.heads, piece % append.heads);
    }
    return -1;
}

void block_mask_cpu(const BlockView& view, int64_t groups, Dtype dtype, void* mask, int threads) {
    switch (dtype) {  // the bits of -inf
        case Dtype::kFloat32:
            return mask_rows<uint32_t>(view, groups, 0xff800000u, mask, threads);
        case Dtype::kBFloat16:
            return mask_rows<uint16_t>(view, groups, uint16_t{0xff80}, mask, threads);
        default:
            return mask_rows<uint16_t>(view, groups, uint16_t{0xfc00}, mask, threads);
    }
}

int block_unsafe_cpu(const BlockAppend& append, const BlockView& view, int threads) {
    const int64_t last = view.first + view.slots;
    const int64_t pieces = append.batch * append.heads;
    const int workers =
        workers_for(2 * pieces * view.slots * append.width * element_size(append.dtype), threads);
    (void)workers;  // unused by a compiler without OpenMP
    std::atomic<int> found{0};
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t row = piece / append.heads, head = piece % append.heads;
        const int64_t length = view.lengths[row];
        // the first slots that the block's first query sees, and its last
        const auto seen_from = [&](int64_t query) {
            const int64_t slot = view.window > 0 ? query - view.window + 1 : 0;
            return std::clamp(slot, view.first, last);
        };
        const int64_t first = seen_from(length), late = seen_from(length + view.n - 1);
        const int64_t own = std::clamp(length + 1, view.first, last);
        const int64_t behind = std::clamp(length + view.n, view.first, last);
        for (const CacheSide* side : {&append.keys, &append.values}) {
            const auto unsafe = [&](int64_t begin, int64_t end) {
                return unsafe_head(append, *side, row, head, begin, end);
            };
            int here = found.load(std::memory_order_relaxed);
            if (!(here & kUnseen) && (unsafe(view.first, first) || unsafe(behind, last)))
                here |= kUnseen;
            if (!(here & kSeenBySome) && (unsafe(first, late) || unsafe(own, behind)))
                here |= kSeenBySome;
            found.fetch_or(here, std::memory_order_relaxed);
        }
    }
    return found.load();
}

}  // namespace cllm
