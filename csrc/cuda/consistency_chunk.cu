// The in-place pass of linear_consistency_loss on a GPU: one block per pair of rows, one launch, no
// host in between. cllm_kernels/linear_consistency_loss/reference.py says what it computes.
//
// A thread reads 16 bytes of the student's row and 16 of the teacher's at a time and keeps its own
// sums under running maxima (Milakov and Gimelshein 2018); the block merges them in a fixed order,
// so results do not change from run to run. The second sweep finds the rows in L2.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device.h"
#include "ops.h"

namespace cllm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16(x); }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half(x); }

// What exponentials are taken relative to: a row of -inf has no finite maximum.
__device__ __forceinline__ float finite(float largest) {
    return largest == -INFINITY ? 0.0f : largest;
}

// 16 bytes of a row of logits.
template <typename T>
struct alignas(16) Pack {
    static constexpr int kSize = 16 / sizeof(T);
    T element[kSize];
};

// A row of logits, in fp32 behind the soft-cap.
template <typename T>
struct Row {
    static constexpr int kPack = Pack<T>::kSize;
    T* data;  // [columns]
    int columns;
    float softcap;  // 0: none
    bool aligned;   // the row begins at a multiple of 16 bytes

    __device__ Row(void* logits, int64_t row, int64_t stride, int count, float cap)
        : data(static_cast<T*>(logits) + row * stride),
          columns(count),
          softcap(cap),
          aligned(reinterpret_cast<uintptr_t>(data) % 16 == 0) {}

    __device__ __forceinline__ float capped(float x) const {
        return softcap == 0.0f ? x : softcap * tanhf(x / softcap);
    }
    // -inf past the end, whose exponential is 0
    __device__ __forceinline__ void load(int begin, float (&values)[kPack]) const {
        if (aligned && begin + kPack <= columns) {
            const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(data + begin);
#pragma unroll
            for (int j = 0; j < kPack; ++j) values[j] = capped(widen(pack.element[j]));
            return;
        }
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
            values[j] = begin + j < columns ? capped(widen(data[begin + j])) : -INFINITY;
        }
    }
    __device__ __forceinline__ void store(int begin, const float (&values)[kPack]) const {
        if (aligned && begin + kPack <= columns) {
            Pack<T> pack;
#pragma unroll
            for (int j = 0; j < kPack; ++j) narrow(values[j], pack.element[j]);
            *reinterpret_cast<Pack<T>*>(data + begin) = pack;
            return;
        }
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
            if (begin + j < columns) narrow(values[j], data[begin + j]);
        }
    }
    // d(capped)/d(logit)
    __device__ __forceinline__ float cap_slope(float value) const {
        if (softcap == 0.0f) return 1.0f;
        const float tanh = value / softcap;
        return 1.0f - tanh * tanh;
    }
};

// Sums of a stretch of both rows, relative to its largest logits.
struct Sums {
    float s_max, t_max;
    float s_sum, t_sum;  // sum exp((x - max) / temperature)
    float cross;         // sum exp(..) (t - s) for forward KL, (s - t) for reverse KL
    float plain;         // sum exp(t - t_max), for a cross-entropy at temperature 1
    float total;         // sum t
};

// What earlier pieces of a row left.
__device__ __forceinline__ Sums kept_sums(const double* state) {
    return {static_cast<float>(state[kStudentMax]), static_cast<float>(state[kTeacherMax]),
            static_cast<float>(state[kStudentSum]), static_cast<float>(state[kTeacherSum]),
            static_cast<float>(state[kCross]),      static_cast<float>(state[kPlain]),
            static_cast<float>(state[kTotal])};
}
__device__ __forceinline__ void keep_sums(const Sums& sums, float label_logit, double* state) {
    state[kStudentMax] = sums.s_max;
    state[kTeacherMax] = sums.t_max;
    state[kStudentSum] = sums.s_sum;
    state[kTeacherSum] = sums.t_sum;
    state[kCross] = sums.cross;
    state[kPlain] = sums.plain;
    state[kTotal] = sums.total;
    state[kLabelLogit] = label_logit;
}

// Brings the sums to larger maxima.
template <Divergence kDivergence>
__device__ __forceinline__ void raise(Sums& sums, float s_max, float t_max, float inverse) {
    const float s_shrink = __expf((sums.s_max - finite(s_max)) * inverse);
    const float t_gap = sums.t_max - finite(t_max);
    const float t_shrink = __expf(t_gap * inverse);
    sums.s_sum *= s_shrink;
    sums.t_sum *= t_shrink;
    const float shrink = kDivergence == Divergence::kForwardKl ? t_shrink : s_shrink;
    // infinite terms whose probability has become 0 count no more
    sums.cross = shrink == 0.0f ? 0.0f : sums.cross * shrink;
    sums.plain *= __expf(t_gap);
    sums.s_max = s_max;
    sums.t_max = t_max;
}

template <Divergence kDivergence>
__device__ Sums merged(Sums a, Sums b, float inverse) {
    const float s_max = fmaxf(a.s_max, b.s_max), t_max = fmaxf(a.t_max, b.t_max);
    raise<kDivergence>(a, s_max, t_max, inverse);
    raise<kDivergence>(b, s_max, t_max, inverse);
    a.s_sum += b.s_sum;
    a.t_sum += b.t_sum;
    a.cross += b.cross;
    a.plain += b.plain;
    a.total += b.total;
    return a;
}

__device__ __forceinline__ Sums from_lane(const Sums& x, int distance) {
    Sums out;
    out.s_max = __shfl_xor_sync(kAll, x.s_max, distance);
    out.t_max = __shfl_xor_sync(kAll, x.t_max, distance);
    out.s_sum = __shfl_xor_sync(kAll, x.s_sum, distance);
    out.t_sum = __shfl_xor_sync(kAll, x.t_sum, distance);
    out.cross = __shfl_xor_sync(kAll, x.cross, distance);
    out.plain = __shfl_xor_sync(kAll, x.plain, distance);
    out.total = __shfl_xor_sync(kAll, x.total, distance);
    return out;
}

// Sum of `value` over the block, in every thread; `shared` [kWarps] is free again afterwards.
__device__ float block_sum(float value, float* shared) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(kAll, value, distance);
    }
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
    __syncthreads();
    return sum;
}

// log(q / m) and log(p / m) of m = beta p + (1 - beta) q, from difference = log p - log q; the
// larger exponential is taken out, so nothing overflows and both share one logarithm.
__device__ __forceinline__ void log_ratios(float difference, float beta, float& q_over_m,
                                           float& p_over_m) {
    const float e = __expf(-fabsf(difference)), other = 1.0f - beta;
    const float rest = logf(difference < 0.0f ? beta * e + other : other * e + beta);
    q_over_m = -(fmaxf(difference, 0.0f) + rest);
    p_over_m = -(fmaxf(-difference, 0.0f) + rest);
}

template <typename T, Divergence kDivergence>
__global__ void __launch_bounds__(kThreads, 2) consistency_chunk_kernel(ConsistencyChunk chunk) {
    constexpr int kPack = Pack<T>::kSize;
    constexpr int kStep = kThreads * kPack;
    __shared__ Sums partial[kWarps];
    __shared__ float scratch[kWarps];
    __shared__ float label_logit;

    const int64_t row = blockIdx.x;
    const int columns = static_cast<int>(chunk.columns);
    const Row<T> student(chunk.student, row, chunk.student_stride, columns, chunk.softcap);
    const Row<T> teacher(chunk.teacher, row, chunk.teacher_stride, columns, chunk.softcap);
    const float weight = chunk.row_weights[row];
    const int64_t label = chunk.labels == nullptr ? -1 : chunk.labels[row];
    const int64_t place = label - chunk.first;
    const bool counts = weight != 0.0f, labelled = label >= 0;
    // A label outside the vocabulary is never read; the caller asserts that there is none.
    const bool inside = labelled && place >= 0 && place < columns;
    const float inverse = chunk.inverse_temperature;
    const bool tempered = labelled && inverse != 1.0f;
    const int length = counts || labelled ? columns : 0;  // a masked row is not read
    const int first = static_cast<int>(threadIdx.x) * kPack;
    const Stage stage = chunk.stage;
    double* const state = stage == Stage::kWhole ? nullptr : chunk.state + row * kStateFields;
    float s[kPack], t[kPack];

    Sums sums{-INFINITY, -INFINITY, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    // What earlier pieces of the vocabulary gave is one thread's beginning, or everybody's end.
    if (state != nullptr && (stage != Stage::kSums || threadIdx.x == 0)) sums = kept_sums(state);
    if (stage == Stage::kWhole || stage == Stage::kSums) {
        for (int begin = first; begin < length; begin += kStep) {
            student.load(begin, s);
            teacher.load(begin, t);
            float s_max = sums.s_max, t_max = sums.t_max;
#pragma unroll
            for (int j = 0; j < kPack; ++j) {
                s_max = fmaxf(s_max, s[j]);
                t_max = fmaxf(t_max, t[j]);
            }
            if (s_max > sums.s_max || t_max > sums.t_max) {
                raise<kDivergence>(sums, s_max, t_max, inverse);
            }
            const float s_reference = finite(s_max), t_reference = finite(t_max);
#pragma unroll
            for (int j = 0; j < kPack; ++j) {
                const float q = __expf((s[j] - s_reference) * inverse);
                const float p = __expf((t[j] - t_reference) * inverse);
                sums.s_sum += q;
                sums.t_sum += p;
                // -inf - -inf is NaN, but where the probability is 0 so is the term.
                if (kDivergence == Divergence::kForwardKl && p != 0.0f) {
                    sums.cross += p * (t[j] - s[j]);
                }
                if (kDivergence == Divergence::kReverseKl && q != 0.0f) {
                    sums.cross += q * (s[j] - t[j]);
                }
                if (tempered) sums.plain += __expf(t[j] - t_reference);
                if (labelled && begin + j < columns) sums.total += t[j];
            }
        }
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            sums = merged<kDivergence>(sums, from_lane(sums, distance), inverse);
        }
        if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = sums;
        if (threadIdx.x == 0) {
            float found = state == nullptr ? 0.0f : static_cast<float>(state[kLabelLogit]);
            if (inside) found = teacher.capped(widen(teacher.data[place]));
            label_logit = found;
        }
        __syncthreads();
        sums = partial[0];
        for (int warp = 1; warp < kWarps; ++warp) {
            sums = merged<kDivergence>(sums, partial[warp], inverse);
        }
        if (stage == Stage::kSums) {
            if (threadIdx.x == 0) keep_sums(sums, label_logit, state);
            return;
        }
    } else if (threadIdx.x == 0) {
        label_logit = static_cast<float>(state[kLabelLogit]);
    }

    const float s_max = finite(sums.s_max), t_max = finite(sums.t_max);
    const float s_log = logf(sums.s_sum), t_log = logf(sums.t_sum);  // relative to the maxima
    const float s_inverse = 1.0f / sums.s_sum, t_inverse = 1.0f / sums.t_sum;
    const float shift = (s_max - t_max) * inverse + (s_log - t_log);
    float divergence = 0.0f, q_divergence = 0.0f;
    if (kDivergence == Divergence::kForwardKl) {
        divergence = sums.cross * t_inverse * inverse + shift;
    } else if (kDivergence == Divergence::kReverseKl) {
        divergence = sums.cross * s_inverse * inverse - shift;
    } else {
        float p_part = 0.0f, q_part = 0.0f;  // KL(p || m), KL(q || m)
        if (stage != Stage::kSlopes && counts) {
            for (int begin = first; begin < columns; begin += kStep) {
                student.load(begin, s);
                teacher.load(begin, t);
#pragma unroll
                for (int j = 0; j < kPack; ++j) {
                    const float s_gap = (s[j] - s_max) * inverse, t_gap = (t[j] - t_max) * inverse;
                    const float q = __expf(s_gap) * s_inverse, p = __expf(t_gap) * t_inverse;
                    float q_over_m, p_over_m;
                    log_ratios((t_gap - s_gap) + (s_log - t_log), chunk.beta, q_over_m, p_over_m);
                    if (p != 0.0f) p_part += p * p_over_m;
                    if (q != 0.0f) q_part += q * q_over_m;
                }
            }
            p_part = block_sum(p_part, scratch);
            q_part = block_sum(q_part, scratch);
        }
        if (state != nullptr) {
            p_part += static_cast<float>(state[kTeacherPart]);
            q_part += static_cast<float>(state[kStudentPart]);
            if (stage == Stage::kDivergence) {
                __syncthreads();  // every thread has read the state
                if (threadIdx.x == 0) {
                    state[kTeacherPart] = p_part;
                    state[kStudentPart] = q_part;
                }
                return;
            }
        }
        q_divergence = q_part;
        divergence = chunk.beta * p_part + (1.0f - chunk.beta) * q_part;
    }
    const float plain_sum = tempered ? sums.plain : sums.t_sum;
    if (threadIdx.x == 0) {
        chunk.consistency[row] = counts ? weight * divergence : 0.0f;
        float loss = t_max + logf(plain_sum) - (1.0f - chunk.label_smoothing) * label_logit;
        if (chunk.label_smoothing != 0.0f) {
            loss -= chunk.label_smoothing * (sums.total / static_cast<float>(chunk.vocabulary));
        }
        chunk.cross_entropy[row] = labelled ? loss : 0.0f;
    }
    if (!chunk.student_gradient && !chunk.teacher_gradient) return;

    const float s_scale = chunk.scales[0] * weight * inverse, t_scale = chunk.scales[1];
    const float plain_inverse = 1.0f / plain_sum;
    const float smoothing = chunk.label_smoothing / static_cast<float>(chunk.vocabulary);
    for (int begin = first; begin < columns; begin += kStep) {
        float slope[kPack];
        if (length > 0) teacher.load(begin, t);
        if (chunk.student_gradient) {
            if (counts) student.load(begin, s);
#pragma unroll
            for (int j = 0; j < kPack; ++j) {
                slope[j] = 0.0f;
                if (!counts) continue;
                const float s_gap = (s[j] - s_max) * inverse, t_gap = (t[j] - t_max) * inverse;
                const float q = __expf(s_gap) * s_inverse;
                const float difference = (t_gap - s_gap) + (s_log - t_log);  // log p - log q
                if (kDivergence == Divergence::kForwardKl) {
                    slope[j] = q - __expf(t_gap) * t_inverse;
                } else if (kDivergence == Divergence::kReverseKl) {
                    if (q != 0.0f) slope[j] = -q * (difference + divergence);
                } else if (q != 0.0f) {
                    float q_over_m, p_over_m;
                    log_ratios(difference, chunk.beta, q_over_m, p_over_m);
                    slope[j] = (1.0f - chunk.beta) * q * (q_over_m - q_divergence);
                }
                slope[j] *= s_scale * student.cap_slope(s[j]);
            }
            student.store(begin, slope);
        }
        if (chunk.teacher_gradient) {
#pragma unroll
            for (int j = 0; j < kPack; ++j) {
                slope[j] = 0.0f;
                if (!labelled) continue;
                slope[j] = __expf(t[j] - t_max) * plain_inverse - smoothing;
                if (begin + j == place) slope[j] -= 1.0f - chunk.label_smoothing;
                slope[j] *= t_scale * teacher.cap_slope(t[j]);
            }
            teacher.store(begin, slope);
        }
    }
}

template <typename T>
void launch(const ConsistencyChunk& chunk, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(chunk.rows);
    switch (chunk.divergence) {
        case Divergence::kForwardKl:
            consistency_chunk_kernel<T, Divergence::kForwardKl>
                <<<blocks, kThreads, 0, stream>>>(chunk);
            return;
        case Divergence::kReverseKl:
            consistency_chunk_kernel<T, Divergence::kReverseKl>
                <<<blocks, kThreads, 0, stream>>>(chunk);
            return;
        default:
            consistency_chunk_kernel<T, Divergence::kJsd><<<blocks, kThreads, 0, stream>>>(chunk);
    }
}

}  // namespace

const char* consistency_chunk_cuda(const ConsistencyChunk& chunk, int device, void* stream) {
    if (chunk.rows == 0) return nullptr;
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    return launch_on(device, [&] {
        switch (chunk.dtype) {
            case Dtype::kFloat32:
                return launch<float>(chunk, queue);
            case Dtype::kBFloat16:
                return launch<__nv_bfloat16>(chunk, queue);
            default:
                return launch<__half>(chunk, queue);
        }
    });
}

}  // namespace cllm
