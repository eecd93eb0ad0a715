// The row pass of consistency.h over a vector type. Each consistency_<isa>.cpp defines `Simd` and
// includes this, all inside an anonymous namespace: no function here may be shared between
// translation units that are compiled for different instruction sets.
//
// A row pair is read twice: once for its sums under a running maximum (Milakov and Gimelshein
// 2018), once for the gradients, which replace the logits. It fits in L2 in between. Blocks of
// columns are widened to fp32 in L1 first, so that types and soft-caps stay out of the arithmetic;
// sums over a block are fp32 vectors, sums over the row are doubles.
//
// p is the teacher's softmax, q the student's, both at the temperature; lower case names are
// scalars of the row, `Vec` holds neighbouring columns.

using Vec = Simd::Vec;

constexpr int64_t kBlock = 1024;  // columns; two buffers of them leave room in a 32 KiB L1

#include "exp_body.h"

// log of a positive normal number: the exponent, and atanh's series of the mantissa in
// [sqrt(1/2), sqrt(2)].
inline Vec log_of(Vec x) {
    Vec exponent, mantissa;
    Simd::split(x, exponent, mantissa);
    const Vec z =
        Simd::div(Simd::sub(mantissa, Simd::fill(1.0f)), Simd::add(mantissa, Simd::fill(1.0f)));
    const Vec square = Simd::mul(z, z);
    Vec series = Simd::fill(2.0f / 9.0f);
    series = Simd::multiply_add(series, square, Simd::fill(2.0f / 7.0f));
    series = Simd::multiply_add(series, square, Simd::fill(2.0f / 5.0f));
    series = Simd::multiply_add(series, square, Simd::fill(2.0f / 3.0f));
    series = Simd::multiply_add(series, square, Simd::fill(2.0f));
    return Simd::multiply_add(exponent, Simd::fill(0.693147180559945309f), Simd::mul(z, series));
}

// tanh by exp(-2|x|); near 0 by its series, where the quotient would cancel.
inline Vec tanh_of(Vec x) {
    const Vec size = Simd::abs(x);
    const Vec t = exp_of(Simd::mul(size, Simd::fill(-2.0f)));
    const Vec one = Simd::fill(1.0f);
    const Vec large = Simd::copy_sign(Simd::div(Simd::sub(one, t), Simd::add(one, t)), x);
    const Vec square = Simd::mul(x, x);
    Vec series = Simd::fill(62.0f / 2835.0f);
    series = Simd::multiply_add(series, square, Simd::fill(-17.0f / 315.0f));
    series = Simd::multiply_add(series, square, Simd::fill(2.0f / 15.0f));
    series = Simd::multiply_add(series, square, Simd::fill(-1.0f / 3.0f));
    const Vec small = Simd::multiply_add(Simd::mul(x, square), series, x);
    return Simd::select_below(size, 0.25f, small, large);
}

struct Float32 {
    using Element = float;
    static Vec load(const float* data) { return Simd::load(data); }
    static void store(float* data, Vec x) { Simd::store(data, x); }
};
struct BFloat16 {
    using Element = uint16_t;
    static Vec load(const uint16_t* data) { return Simd::load_bf16(data); }
    static void store(uint16_t* data, Vec x) { Simd::store_bf16(data, x); }
};
struct Float16 {
    using Element = uint16_t;
    static Vec load(const uint16_t* data) { return Simd::load_f16(data); }
    static void store(uint16_t* data, Vec x) { Simd::store_f16(data, x); }
};

// The number that exponentials are taken relative to: a row of -inf has no finite maximum.
inline float reference_of(double largest) {
    return largest == -__builtin_inf() ? 0.0f : float(largest);
}

template <typename Type, Divergence kDivergence>
class RowPass {
  public:
    RowPass(const ConsistencyChunk& chunk, int64_t row)
        : chunk_(chunk),
          row_(row),
          student_(static_cast<Element*>(chunk.student) + row * chunk.student_stride),
          teacher_(static_cast<Element*>(chunk.teacher) + row * chunk.teacher_stride),
          weight_(chunk.row_weights[row]),
          label_(chunk.labels == nullptr || chunk.labels[row] < 0 ? -1 : chunk.labels[row]),
          divergence_wanted_(weight_ != 0.0f),
          labelled_(label_ >= 0),
          tempered_(labelled_ && chunk.inverse_temperature != 1.0f) {
        double whole[kStateFields] = {};
        whole[kStudentMax] = whole[kTeacherMax] = -__builtin_inf();
        double* const kept = chunk.state == nullptr ? nullptr : chunk.state + row * kStateFields;
        __builtin_memcpy(state_, kept == nullptr ? whole : kept, sizeof state_);
    }

    void run() {
        const Stage stage = chunk_.stage;
        const bool whole = stage == Stage::kWhole, idle = !divergence_wanted_ && !labelled_;
        if ((whole || stage == Stage::kSums) && !idle) gather();
        const bool mixture = kDivergence == Divergence::kJsd && divergence_wanted_;
        if ((whole && mixture) || stage == Stage::kDivergence) {
            finish_sums();
            if (mixture) gather_mixture();
        }
        if (stage == Stage::kSums || stage == Stage::kDivergence) {
            __builtin_memcpy(chunk_.state + row_ * kStateFields, state_, sizeof state_);
            return;
        }
        finish_sums();
        finish_losses();
        const bool student = chunk_.student_gradient && divergence_wanted_;
        const bool teacher = chunk_.teacher_gradient && labelled_;
        if (student || teacher) scatter(student, teacher);
        if (chunk_.student_gradient && !divergence_wanted_) clear(student_);
        if (chunk_.teacher_gradient && !labelled_) clear(teacher_);
    }

  private:
    using Element = typename Type::Element;
    static constexpr int64_t kWidth = Simd::kWidth;

    void clear(Element* row) { __builtin_memset(row, 0, chunk_.columns * sizeof(Element)); }

    // Widens `count` columns to fp32, through the soft-cap; pads to whole vectors with -inf, whose
    // exponential is 0.
    void widen(const Element* row, int64_t begin, int64_t count, float* buffer) const {
        int64_t i = 0;
        for (; i + kWidth <= count; i += kWidth) Simd::store(buffer + i, capped(row + begin + i));
        if (i < count) {
            Element rest[kWidth] = {};
            for (int64_t j = i; j < count; ++j) rest[j - i] = row[begin + j];
            Simd::store(buffer + i, capped(rest));
            for (int64_t j = count; j < i + kWidth; ++j) buffer[j] = -__builtin_inff();
        }
    }

    Vec capped(const Element* data) const {
        const Vec x = Type::load(data);
        if (chunk_.softcap == 0.0f) return x;
        const Vec scaled = Simd::mul(x, Simd::fill(1.0f / chunk_.softcap));
        return Simd::mul(tanh_of(scaled), Simd::fill(chunk_.softcap));
    }

    // Takes a block's maximum into `largest`; by how much that falls short of the new one, which is
    // what exponentials relative to it must shrink by (-inf for the first block).
    double raise(double& largest, const float* buffer, int64_t padded) const {
        Vec high = Simd::fill(-__builtin_inff());
        for (int64_t i = 0; i < padded; i += kWidth) high = Simd::max(Simd::load(buffer + i), high);
        const double block = Simd::reduce_max(high);
        if (!(block > largest)) return 0.0;
        const double gap = largest - block;
        largest = block;
        return gap;
    }

    void gather() {
        alignas(64) float s_buffer[kBlock], t_buffer[kBlock];
        const Vec inverse = Simd::fill(chunk_.inverse_temperature);
        const Vec zero = Simd::fill(0.0f);
        for (int64_t begin = 0; begin < chunk_.columns; begin += kBlock) {
            const int64_t left = chunk_.columns - begin, count = left < kBlock ? left : kBlock;
            const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;
            widen(teacher_, begin, count, t_buffer);
            if (const double gap = raise(state_[kTeacherMax], t_buffer, padded)) {
                const double factor = __builtin_exp(gap * chunk_.inverse_temperature);
                state_[kTeacherSum] *= factor;
                if (kDivergence == Divergence::kForwardKl) shrink_cross(factor);
                state_[kPlain] *= __builtin_exp(gap);
            }
            const Vec t_reference = Simd::fill(reference_of(state_[kTeacherMax]));
            Vec t_sum = zero;
            if (divergence_wanted_) {
                widen(student_, begin, count, s_buffer);
                if (const double gap = raise(state_[kStudentMax], s_buffer, padded)) {
                    const double factor = __builtin_exp(gap * chunk_.inverse_temperature);
                    state_[kStudentSum] *= factor;
                    if (kDivergence == Divergence::kReverseKl) shrink_cross(factor);
                }
                const Vec s_reference = Simd::fill(reference_of(state_[kStudentMax]));
                Vec s_sum = zero, cross = zero;
                for (int64_t i = 0; i < padded; i += kWidth) {
                    const Vec s = Simd::load(s_buffer + i), t = Simd::load(t_buffer + i);
                    const Vec q = exp_of(Simd::mul(Simd::sub(s, s_reference), inverse));
                    const Vec p = exp_of(Simd::mul(Simd::sub(t, t_reference), inverse));
                    s_sum = Simd::add(s_sum, q);
                    t_sum = Simd::add(t_sum, p);
                    // -inf - -inf is NaN, but where the probability is 0 so is the term.
                    if (kDivergence == Divergence::kForwardKl) {
                        const Vec term = Simd::mul(p, Simd::sub(t, s));
                        cross = Simd::add(cross, Simd::zero_unless(p, term));
                    } else if (kDivergence == Divergence::kReverseKl) {
                        const Vec term = Simd::mul(q, Simd::sub(s, t));
                        cross = Simd::add(cross, Simd::zero_unless(q, term));
                    }
                }
                state_[kStudentSum] += Simd::reduce_add(s_sum);
                state_[kCross] += Simd::reduce_add(cross);
            } else {
                for (int64_t i = 0; i < padded; i += kWidth) {
                    const Vec gap = Simd::sub(Simd::load(t_buffer + i), t_reference);
                    t_sum = Simd::add(t_sum, exp_of(Simd::mul(gap, inverse)));
                }
            }
            state_[kTeacherSum] += Simd::reduce_add(t_sum);
            if (labelled_) gather_label(t_buffer, begin, count, padded, t_reference);
        }
    }

    // What the cross-entropy needs of a block of the teacher's logits.
    // Infinite terms whose probability has become 0 count no more.
    void shrink_cross(double factor) {
        state_[kCross] = factor < __FLT_MIN__ ? 0.0 : state_[kCross] * factor;
    }

    void gather_label(float* t_buffer, int64_t begin, int64_t count, int64_t padded,
                      Vec t_reference) {
        const int64_t place = label_ - chunk_.first - begin;
        if (place >= 0 && place < count) state_[kLabelLogit] = t_buffer[place];
        if (tempered_) {
            Vec plain = Simd::fill(0.0f);
            for (int64_t i = 0; i < padded; i += kWidth) {
                plain = Simd::add(plain, exp_of(Simd::sub(Simd::load(t_buffer + i), t_reference)));
            }
            state_[kPlain] += Simd::reduce_add(plain);
        }
        if (chunk_.label_smoothing != 0.0f) {
            for (int64_t i = count; i < padded; ++i) t_buffer[i] = 0.0f;
            Vec total = Simd::fill(0.0f);
            for (int64_t i = 0; i < padded; i += kWidth) {
                total = Simd::add(total, Simd::load(t_buffer + i));
            }
            state_[kTotal] += Simd::reduce_add(total);
        }
    }

    // From the complete sums, what probabilities are made of.
    void finish_sums() {
        s_reference_ = reference_of(state_[kStudentMax]);
        t_reference_ = reference_of(state_[kTeacherMax]);
        s_inverse_ = float(1.0 / state_[kStudentSum]);
        t_inverse_ = float(1.0 / state_[kTeacherSum]);
        plain_sum_ = tempered_ ? state_[kPlain] : state_[kTeacherSum];
        shift_ = __builtin_log(state_[kStudentSum]) - __builtin_log(state_[kTeacherSum]);
    }

    void finish_losses() {
        const double inverse = chunk_.inverse_temperature;
        // log sum exp(s / temperature) - log sum exp(t / temperature)
        const double gap = (double(s_reference_) - double(t_reference_)) * inverse + shift_;
        if (kDivergence == Divergence::kForwardKl) {
            divergence_ = float(state_[kCross] * inverse / state_[kTeacherSum] + gap);
        } else if (kDivergence == Divergence::kReverseKl) {
            divergence_ = float(state_[kCross] * inverse / state_[kStudentSum] - gap);
        } else {
            q_divergence_ = float(state_[kStudentPart]);
            divergence_ = float(chunk_.beta * state_[kTeacherPart] +
                                (1.0 - chunk_.beta) * state_[kStudentPart]);
        }
        chunk_.consistency[row_] = divergence_wanted_ ? weight_ * divergence_ : 0.0f;
        const double smoothing = chunk_.label_smoothing;
        double loss = double(t_reference_) + __builtin_log(plain_sum_);
        loss -= (1.0 - smoothing) * state_[kLabelLogit];
        if (smoothing != 0.0) loss -= smoothing * state_[kTotal] / double(chunk_.vocabulary);
        chunk_.cross_entropy[row_] = labelled_ ? float(loss) : 0.0f;
    }

    // log(q / m) and log(p / m) of the mixture m = beta p + (1 - beta) q, from d = log p - log q:
    // log(m / q) = log((1 - beta) + beta e^d) and log(m / p) = log(beta + (1 - beta) e^-d), with
    // the larger exponential taken out of each: nothing overflows, both share one logarithm, and
    // its argument lies between min(beta, 1 - beta) and 1.
    void log_ratios(Vec difference, Vec& q_over_m, Vec& p_over_m) const {
        const Vec beta = Simd::fill(chunk_.beta), rest = Simd::fill(1.0f - chunk_.beta);
        const Vec zero = Simd::fill(0.0f);
        const Vec minus = Simd::sub(zero, difference);
        const Vec e = exp_of(Simd::sub(zero, Simd::abs(difference)));
        const Vec negative = Simd::multiply_add(beta, e, rest);
        const Vec positive = Simd::multiply_add(rest, e, beta);
        const Vec log_of_rest = log_of(Simd::select_below(difference, 0.0f, negative, positive));
        q_over_m = Simd::sub(zero, Simd::add(Simd::max(difference, zero), log_of_rest));
        p_over_m = Simd::sub(zero, Simd::add(Simd::max(minus, zero), log_of_rest));
    }

    // p, q and log p - log q of neighbouring columns.
    void probabilities(Vec s, Vec t, Vec& p, Vec& q, Vec& difference) const {
        const Vec inverse = Simd::fill(chunk_.inverse_temperature);
        const Vec s_gap = Simd::mul(Simd::sub(s, Simd::fill(s_reference_)), inverse);
        const Vec t_gap = Simd::mul(Simd::sub(t, Simd::fill(t_reference_)), inverse);
        q = Simd::mul(exp_of(s_gap), Simd::fill(s_inverse_));
        p = Simd::mul(exp_of(t_gap), Simd::fill(t_inverse_));
        difference = Simd::add(Simd::sub(t_gap, s_gap), Simd::fill(float(shift_)));
    }

    void gather_mixture() {
        alignas(64) float s_buffer[kBlock], t_buffer[kBlock];
        for (int64_t begin = 0; begin < chunk_.columns; begin += kBlock) {
            const int64_t left = chunk_.columns - begin, count = left < kBlock ? left : kBlock;
            widen(student_, begin, count, s_buffer);
            widen(teacher_, begin, count, t_buffer);
            Vec p_sum = Simd::fill(0.0f), q_sum = p_sum;
            for (int64_t i = 0; i < count; i += kWidth) {
                Vec p, q, difference, q_over_m, p_over_m;
                probabilities(Simd::load(s_buffer + i), Simd::load(t_buffer + i), p, q, difference);
                log_ratios(difference, q_over_m, p_over_m);
                p_sum = Simd::add(p_sum, Simd::zero_unless(p, Simd::mul(p, p_over_m)));
                q_sum = Simd::add(q_sum, Simd::zero_unless(q, Simd::mul(q, q_over_m)));
            }
            state_[kTeacherPart] += Simd::reduce_add(p_sum);
            state_[kStudentPart] += Simd::reduce_add(q_sum);
        }
    }

    // d(divergence)/d(student logit), times the temperature.
    Vec student_slope(Vec s, Vec t) const {
        Vec p, q, difference;
        probabilities(s, t, p, q, difference);
        if (kDivergence == Divergence::kForwardKl) return Simd::sub(q, p);
        if (kDivergence == Divergence::kReverseKl) {
            const Vec gap = Simd::add(difference, Simd::fill(divergence_));  // KL - log(q / p)
            return Simd::sub(Simd::fill(0.0f), Simd::zero_unless(q, Simd::mul(q, gap)));
        }
        Vec q_over_m, p_over_m;
        log_ratios(difference, q_over_m, p_over_m);
        const Vec gap = Simd::sub(q_over_m, Simd::fill(q_divergence_));
        return Simd::zero_unless(q, Simd::mul(Simd::mul(q, gap), Simd::fill(1.0f - chunk_.beta)));
    }

    // Writes a block of slopes; through the soft-cap, whose derivative is 1 - tanh^2.
    void write(Element* row, int64_t begin, int64_t count, const float* values, float* slopes) {
        for (int64_t i = 0; i < count; i += kWidth) {
            Vec slope = Simd::load(slopes + i);
            if (chunk_.softcap != 0.0f) {
                const Vec tanh =
                    Simd::mul(Simd::load(values + i), Simd::fill(1.0f / chunk_.softcap));
                slope = Simd::mul(slope, Simd::sub(Simd::fill(1.0f), Simd::mul(tanh, tanh)));
            }
            if (i + kWidth <= count) {
                Type::store(row + begin + i, slope);
            } else {
                Element rest[kWidth];
                Type::store(rest, slope);
                for (int64_t j = i; j < count; ++j) row[begin + j] = rest[j - i];
            }
        }
    }

    void scatter(bool student, bool teacher) {
        alignas(64) float s_buffer[kBlock], t_buffer[kBlock], slopes[kBlock];
        const Vec s_scale = Simd::fill(weight_ * chunk_.scales[0] * chunk_.inverse_temperature);
        const float t_scale = chunk_.scales[1];
        const Vec reference = Simd::fill(t_reference_);
        const Vec normalise = Simd::fill(float(t_scale / plain_sum_));
        const Vec smoothing =
            Simd::fill(-t_scale * chunk_.label_smoothing / float(chunk_.vocabulary));
        for (int64_t begin = 0; begin < chunk_.columns; begin += kBlock) {
            const int64_t left = chunk_.columns - begin, count = left < kBlock ? left : kBlock;
            widen(teacher_, begin, count, t_buffer);
            if (student) {
                widen(student_, begin, count, s_buffer);
                for (int64_t i = 0; i < count; i += kWidth) {
                    const Vec s = Simd::load(s_buffer + i), t = Simd::load(t_buffer + i);
                    Simd::store(slopes + i, Simd::mul(student_slope(s, t), s_scale));
                }
                write(student_, begin, count, s_buffer, slopes);
            }
            if (teacher) {
                for (int64_t i = 0; i < count; i += kWidth) {
                    const Vec p = exp_of(Simd::sub(Simd::load(t_buffer + i), reference));
                    Simd::store(slopes + i, Simd::multiply_add(p, normalise, smoothing));
                }
                const int64_t place = label_ - chunk_.first - begin;
                if (place >= 0 && place < count) {
                    slopes[place] -= t_scale * (1.0f - chunk_.label_smoothing);
                }
                write(teacher_, begin, count, t_buffer, slopes);
            }
        }
    }

    const ConsistencyChunk& chunk_;
    const int64_t row_;
    Element* const student_;  // [columns]
    Element* const teacher_;  // [columns]
    const float weight_;
    const int64_t label_;
    const bool divergence_wanted_;
    const bool labelled_;
    const bool tempered_;
    double state_[kStateFields];
    float s_reference_ = 0.0f, t_reference_ = 0.0f;  // largest logit of the row
    float s_inverse_ = 0.0f, t_inverse_ = 0.0f;      // 1 / sum exp((x - largest) / temperature)
    double plain_sum_ = 0.0;                         // the teacher's sum at temperature 1
    double shift_ = 0.0;                             // log of the student's sum over the teacher's
    float divergence_ = 0.0f, q_divergence_ = 0.0f;
};

template <typename Type>
void row_of(const ConsistencyChunk& chunk, int64_t row) {
    switch (chunk.divergence) {
        case Divergence::kForwardKl:
            return RowPass<Type, Divergence::kForwardKl>(chunk, row).run();
        case Divergence::kReverseKl:
            return RowPass<Type, Divergence::kReverseKl>(chunk, row).run();
        default:
            return RowPass<Type, Divergence::kJsd>(chunk, row).run();
    }
}

void consistency_row(const ConsistencyChunk& chunk, int64_t row) {
    switch (chunk.dtype) {
        case Dtype::kFloat32:
            return row_of<Float32>(chunk, row);
        case Dtype::kBFloat16:
            return row_of<BFloat16>(chunk, row);
        default:
            return row_of<Float16>(chunk, row);
    }
}
