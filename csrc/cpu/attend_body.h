// Attention of a block's rows to a cache, over a vector type; a part of decoder_layer_body.h.
//
// The softmax is taken online (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), over
// tiles of positions. Tiles that all rows see whole are taken by all of them together, so that a
// key is read, and widened, once for several queries; the others row by row. A query's sums are
// made in the same order either way: its bits are its own.

// Positions that are scored before the running maximum is looked at; tiles begin at multiples of
// it, so that a sum is grouped alike wherever its slots are.
constexpr int64_t kTile = 32;
constexpr int kMostGroups = 4;
constexpr int kMostQueries = kMostTogether * kMostGroups;
// Queries, keys, and vectors of a value that the registers hold products of.
constexpr int kQueryBlock = 4;
constexpr int kKeyBlock = kWidth == 16 ? 4 : 2;
constexpr int kValueBlock = kKeyBlock;

struct Attention {
    // [queries, stride]
    alignas(64) float query[kMostQueries * kLargestHead];
    alignas(64) float sums[kMostQueries * kLargestHead];
    alignas(64) float scores[kMostQueries][kTile];
    float largest[kMostQueries], total[kMostQueries], fade[kMostQueries];
    int64_t size, stride;
};

// Positions of a tile from `first` on: the first `near` are slots of their own number, the others
// `shift` further.
struct TilePart {
    int64_t first;
    int64_t count;
    int64_t near;
    int64_t shift;
    int64_t slot(int64_t j) const { return first + j + (j < near ? 0 : shift); }
};

// Scores of kQueries queries and the kKeys keys of positions j and on. kWhole: heads are whole
// vectors.
template <typename Type, bool kWhole, int kQueries, int kKeys>
void score_block(Attention& state, const QueryRows& rows, const TilePart& part, int64_t from,
                 int64_t j) {
    using Element = typename Type::Element;
    const int64_t size = state.size, stride = state.stride;
    const Element* keys[kKeys];
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
        keys[k] = static_cast<const Element*>(rows.keys) + part.slot(j + k) * rows.key_slot;
    }
    const float* const query = state.query + from * stride;
    Vec dots[kQueries * kKeys];
    // unrolled: else gcc keeps the sums in memory at the loop's ends, which cost as much as the
    // loop
#pragma GCC unroll 16
    for (int i = 0; i < kQueries * kKeys; ++i) dots[i] = Simd::fill(0.0f);
    for (int64_t d = 0; d < size; d += kWidth) {
        Vec key[kKeys];
#pragma GCC unroll 16
        for (int k = 0; k < kKeys; ++k) {
            key[k] = kWhole ? Type::load(keys[k] + d) : load_some<Type>(keys[k] + d, size - d);
        }
#pragma GCC unroll 16
        for (int q = 0; q < kQueries; ++q) {
            const Vec own = Simd::held(Simd::load(query + q * stride + d));
#pragma GCC unroll 16
            for (int k = 0; k < kKeys; ++k) {
                Vec& dot = dots[q * kKeys + k];
                dot = Simd::multiply_add(own, key[k], dot);
            }
        }
    }
    float totals[kQueries * kKeys];
    Simd::template reduce_add_each<kQueries * kKeys>(dots, totals);
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
        __builtin_memcpy(state.scores[from + q] + j, totals + q * kKeys, kKeys * sizeof(float));
    }
}

template <typename Type, bool kWhole, int kQueries>
void score(Attention& state, const QueryRows& rows, const TilePart& part, int64_t from) {
    int64_t j = 0;
    for (; j + kKeyBlock <= part.count; j += kKeyBlock) {
        score_block<Type, kWhole, kQueries, kKeyBlock>(state, rows, part, from, j);
    }
    for (; j < part.count; ++j) score_block<Type, kWhole, kQueries, 1>(state, rows, part, from, j);
}

// Scores to weights, and what they do to the sums so far.
inline void weigh(Attention& state, int64_t query, int64_t count) {
    float* const scores = state.scores[query];
    for (int64_t j = count; j < kTile; ++j) scores[j] = -__builtin_inff();
    Vec most = Simd::load(scores);
    for (int64_t j = kWidth; j < kTile; j += kWidth) most = Simd::max(most, Simd::load(scores + j));
    const float best = Simd::reduce_max(most), before = state.largest[query];
    const float now = best > before ? best : before;
    // nothing but -inf so far: 0 instead, whose difference to it is no NaN
    const float base = now == -__builtin_inff() ? 0.0f : now;
    Vec sum = Simd::fill(0.0f);
    for (int64_t j = 0; j < kTile; j += kWidth) {
        const Vec weight = exp_of(Simd::sub(Simd::load(scores + j), Simd::fill(base)));
        Simd::store(scores + j, weight);
        sum = Simd::add(sum, weight);
    }
    alignas(64) float step[kWidth];
    Simd::store(step, exp_of(Simd::fill(before - base)));
    state.fade[query] = step[0];
    state.total[query] = state.total[query] * step[0] + Simd::reduce_add(sum);
    state.largest[query] = now;
}

// Adds the weighed values of kQueries queries, kVectors vectors of them from d on, of which the
// last has `left` elements.
template <typename Type, int kQueries, int kVectors>
void gather_block(Attention& state, const QueryRows& rows, const TilePart& part, int64_t from,
                  int64_t d, int64_t left) {
    using Element = typename Type::Element;
    Vec sums[kQueries * kVectors];
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
        const Vec fade = Simd::fill(state.fade[from + q]);
        const float* const place = state.sums + (from + q) * state.stride + d;
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
            sums[q * kVectors + v] = Simd::mul(Simd::load(place + v * kWidth), fade);
        }
    }
    const auto* const values = static_cast<const Element*>(rows.values) + d;
    for (int64_t j = 0; j < part.count; ++j) {
        const Element* const value = values + part.slot(j) * rows.value_slot;
        Vec entry[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v + 1 < kVectors; ++v) entry[v] = Type::load(value + v * kWidth);
        constexpr int kLast = (kVectors - 1) * kWidth;
        entry[kVectors - 1] = load_some<Type>(value + kLast, left);
#pragma GCC unroll 16
        for (int q = 0; q < kQueries; ++q) {
            const Vec weight = Simd::held(Simd::fill(state.scores[from + q][j]));
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) {
                Vec& sum = sums[q * kVectors + v];
                sum = Simd::multiply_add(weight, entry[v], sum);
            }
        }
    }
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
        float* const place = state.sums + (from + q) * state.stride + d;
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) Simd::store(place + v * kWidth, sums[q * kVectors + v]);
    }
}

template <typename Type, int kQueries>
void gather(Attention& state, const QueryRows& rows, const TilePart& part, int64_t from) {
    constexpr int64_t kBlock = kValueBlock * kWidth;
    int64_t d = 0;
    for (; d + kBlock <= state.size; d += kBlock) {
        gather_block<Type, kQueries, kValueBlock>(state, rows, part, from, d, kWidth);
    }
    for (; d < state.size; d += kWidth) {
        gather_block<Type, kQueries, 1>(state, rows, part, from, d, state.size - d);
    }
}

// Takes a part of a tile into the sums of queries from .. to - 1.
template <typename Type, int kQueries = kQueryBlock>
void attend_part(Attention& state, const QueryRows& rows, const TilePart& part, int64_t from,
                 int64_t to) {
    for (; from + kQueries <= to; from += kQueries) {
        if (state.size == state.stride) {
            score<Type, true, kQueries>(state, rows, part, from);
        } else {
            score<Type, false, kQueries>(state, rows, part, from);
        }
        for (int q = 0; q < kQueries; ++q) weigh(state, from + q, part.count);
        gather<Type, kQueries>(state, rows, part, from);
    }
    if constexpr (kQueries > 1) {
        if (from < to) attend_part<Type, kQueries - 1>(state, rows, part, from, to);
    }
}

// The tiles of one row that begin at `begin` and on, before `end`.
template <typename Type>
void attend_alone(Attention& state, const QueryRows& rows, const Seen& seen, int64_t begin,
                  int64_t end, int64_t from, int64_t to) {
    for (int64_t tile = begin; tile < end; tile += kTile) {
        const int64_t first = tile > seen.begin ? tile : seen.begin;
        const int64_t last = tile + kTile < seen.end ? tile + kTile : seen.end;
        const int64_t count = last - first, before = seen.split - first;
        const int64_t near = before < 0 ? 0 : before < count ? before : count;
        attend_part<Type>(state, rows, {first, count, near, seen.shift}, from, to);
    }
}

// Heads group .. group + groups - 1 of every row.
template <typename Type>
void attend_groups(const QueryRows& rows, int64_t group, int64_t groups) {
    using Element = typename Type::Element;
    Attention state;
    const int64_t size = rows.size, stride = (size + kWidth - 1) / kWidth * kWidth;
    state.size = size;
    state.stride = stride;
    // the tiles that all rows see whole, in slots of their own number
    int64_t common = 0, apart = rows.seen[0].end;
    for (int64_t row = 0; row < rows.rows; ++row) {
        const Seen& seen = rows.seen[row];
        const int64_t begin = (seen.begin + kTile - 1) / kTile * kTile;
        const int64_t end = (seen.end < seen.split ? seen.end : seen.split) / kTile * kTile;
        common = begin > common ? begin : common;
        apart = end < apart ? end : apart;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t query = row * groups + g;
            const auto* const data =
                static_cast<const Element*>(rows.query) + row * rows.query_row + (group + g) * size;
            for (int64_t d = 0; d < size; d += kWidth) {
                const Vec part = load_some<Type>(data + d, size - d);
                Simd::store(state.query + query * stride + d,
                            Simd::mul(part, Simd::fill(rows.scale)));
                Simd::store(state.sums + query * stride + d, Simd::fill(0.0f));
            }
            state.largest[query] = -__builtin_inff();
            state.total[query] = 0.0f;
        }
    }
    if (apart < common) apart = common;
    const auto alone = [&](int64_t row, int64_t from, int64_t to) {
        const Seen& seen = rows.seen[row];
        const int64_t begin = seen.begin / kTile * kTile;
        attend_alone<Type>(state, rows, seen, from > begin ? from : begin,
                           to < seen.end ? to : seen.end, row * groups, (row + 1) * groups);
    };
    for (int64_t row = 0; row < rows.rows; ++row) alone(row, 0, common);
    for (int64_t tile = common; tile < apart; tile += kTile) {
        attend_part<Type>(state, rows, {tile, kTile, kTile, 0}, 0, rows.rows * groups);
    }
    for (int64_t row = 0; row < rows.rows; ++row) alone(row, apart, rows.seen[row].end);
    for (int64_t query = 0; query < rows.rows * groups; ++query) {
        auto* const out = static_cast<Element*>(rows.out) + query / groups * rows.query_row +
                          (group + query % groups) * size;
        const Vec whole = Simd::fill(state.total[query]);
        for (int64_t d = 0; d < size; d += kWidth) {
            store_some<Type>(out + d, Simd::div(Simd::load(state.sums + query * stride + d), whole),
                             size - d);
        }
    }
}

template <typename Type>
void attend_of(const QueryRows& rows) {
    for (int64_t group = 0; group < rows.groups; group += kMostGroups) {
        const int64_t left = rows.groups - group;
        attend_groups<Type>(rows, group, left < kMostGroups ? left : kMostGroups);
    }
}
