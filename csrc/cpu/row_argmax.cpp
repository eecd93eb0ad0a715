// Argmax over the last dimension on the CPU, one read of the logits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "argmax.h"

namespace cllm {
namespace {

// Enough work to be worth waking a thread: about ten microseconds of reading.
constexpr int64_t kElementsPerThread = 1 << 16;
constexpr int64_t kShortestPiece = 1 << 13;

size_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

const char* row_data(const Rows& table, int64_t row) {
    const int64_t offset =
        (row / table.inner) * table.outer_stride + (row % table.inner) * table.inner_stride;
    return static_cast<const char*>(table.data) + offset * element_size(table.dtype);
}

void store(const Rows& table, int64_t row, int64_t winner, int64_t* index, void* value) {
    index[row] = winner;
    const size_t size = element_size(table.dtype);
    // The element itself, so that its sign of zero and its NaN payload survive.
    std::copy_n(row_data(table, row) + winner * size, size, static_cast<char*>(value) + row * size);
}

}  // namespace

void row_argmax_cpu(const Rows& table, int64_t* index, void* value, int threads) {
    const ArgmaxKernels& kernels = argmax_kernels();
    const int64_t rows = table.rows, columns = table.columns;
    const int64_t useful = rows * columns / kElementsPerThread + 1;
    const int workers = static_cast<int>(std::min<int64_t>(threads, useful));

    // Few long rows are cut into pieces, so that every thread has something to read.
    int64_t pieces = 1;
    if (workers > 1 && rows < 4 * workers) {
        pieces = std::min<int64_t>((4 * workers + rows - 1) / rows,
                                   std::max<int64_t>(1, columns / kShortestPiece));
    }
    if (pieces == 1) {
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
        for (int64_t row = 0; row < rows; ++row) {
            const Best best = kernels.span(row_data(table, row), table.dtype, columns);
            store(table, row, best.index, index, value);
        }
        return;
    }
    const int64_t length = (columns + pieces - 1) / pieces;
    pieces = (columns + length - 1) / length;
    std::vector<Best> partial(static_cast<size_t>(rows * pieces));  // [rows, pieces]
#pragma omp parallel for num_threads(workers) schedule(static)
    for (int64_t task = 0; task < rows * pieces; ++task) {
        const int64_t row = task / pieces, begin = (task % pieces) * length;
        const char* data = row_data(table, row) + begin * element_size(table.dtype);
        Best best = kernels.span(data, table.dtype, std::min(length, columns - begin));
        best.index += begin;
        partial[static_cast<size_t>(task)] = best;
    }
    for (int64_t row = 0; row < rows; ++row) {
        const Best* piece = partial.data() + row * pieces;
        Best best = piece[0];
        // In order: an equal later piece never replaces an earlier one, nor anything a NaN.
        for (int64_t i = 1; i < pieces && !std::isnan(best.value); ++i) {
            if (piece[i].value > best.value || std::isnan(piece[i].value)) best = piece[i];
        }
        store(table, row, best.index, index, value);
    }
}

}  // namespace cllm
