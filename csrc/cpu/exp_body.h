// exp over a vector type; included inside an anonymous namespace, behind `Simd` and `Vec`.

// exp, 1 unit in the last place or so: 2^n * e^r by a polynomial of r in [-ln2/2, ln2/2]. Exactly 0
// below fp32's normal range, NaN for NaN; arguments are at most 0, or little more after rounding.
inline Vec exp_of(Vec x) {
    const Vec n = Simd::round(Simd::mul(x, Simd::fill(1.44269504088896341f)));
    Vec r = Simd::multiply_add(n, Simd::fill(-0.693145751953125f), x);
    r = Simd::multiply_add(n, Simd::fill(-1.42860682030941723e-6f), r);
    Vec e = Simd::fill(1.9875691500e-4f);
    e = Simd::multiply_add(e, r, Simd::fill(1.3981999507e-3f));
    e = Simd::multiply_add(e, r, Simd::fill(8.3334519073e-3f));
    e = Simd::multiply_add(e, r, Simd::fill(4.1665795894e-2f));
    e = Simd::multiply_add(e, r, Simd::fill(1.6666665459e-1f));
    e = Simd::multiply_add(e, r, Simd::fill(5.0000001201e-1f));
    e = Simd::multiply_add(Simd::mul(r, r), e, Simd::add(r, Simd::fill(1.0f)));
    return Simd::zero_if_below(Simd::scale(e, n), x, -87.3f);
}
