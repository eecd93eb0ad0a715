// cllm_kernels._C: plain integers in, kernels out. Pointers arrive as integers (tensor.data_ptr()),
// and the Python side has checked shapes, types and devices before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "direct.h"
#include "guess_bindings.h"
#include "ops.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// One list of arguments for every device: `run` takes the state and then whatever is its own.
template <typename Result, typename... Rest>
auto jacobi_step(Result (*run)(const cllm::JacobiStep&, Rest...)) {
    return [run](uintptr_t window, uintptr_t predictions, uintptr_t output, uintptr_t lengths,
                 uintptr_t generated, uintptr_t progress, uintptr_t done, uintptr_t limits,
                 uintptr_t stop_ids, uintptr_t fill, uintptr_t accepted, int64_t rows, int64_t n,
                 int64_t capacity, int64_t stops, int64_t fill_width, bool block_mode,
                 bool accept_one, Rest... rest) {
        const cllm::JacobiStep step{pointer<int64_t>(window),
                                    pointer<const int64_t>(predictions),
                                    pointer<int64_t>(output),
                                    pointer<int64_t>(lengths),
                                    pointer<int64_t>(generated),
                                    pointer<int64_t>(progress),
                                    pointer<bool>(done),
                                    pointer<const int64_t>(limits),
                                    pointer<const int64_t>(stop_ids),
                                    pointer<const int64_t>(fill),
                                    pointer<int64_t>(accepted),
                                    rows,
                                    n,
                                    capacity,
                                    stops,
                                    fill_width,
                                    block_mode,
                                    accept_one};
        py::gil_scoped_release release;
        return run(step, rest...);
    };
}

cllm::Rows rows_argument(uintptr_t data, int dtype, int64_t rows, int64_t inner,
                         int64_t outer_stride, int64_t inner_stride, int64_t columns) {
    return {pointer<const void>(data),
            static_cast<cllm::Dtype>(dtype),
            rows,
            inner,
            outer_stride,
            inner_stride,
            columns};
}

void row_argmax_cpu(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride,
                    int64_t inner_stride, int64_t columns, uintptr_t index, uintptr_t value,
                    int threads) {
    const auto table =
        rows_argument(logits, dtype, rows, inner, outer_stride, inner_stride, columns);
    py::gil_scoped_release release;
    cllm::row_argmax_cpu(table, pointer<int64_t>(index), pointer<void>(value), threads);
}

void rms_norm_cpu(uintptr_t x, uintptr_t weight, int dtype, int64_t rows, int64_t width, float eps,
                  uintptr_t out, int threads) {
    py::gil_scoped_release release;
    cllm::rms_norm_cpu(pointer<const void>(x), pointer<const void>(weight),
                       static_cast<cllm::Dtype>(dtype), rows, width, eps, pointer<void>(out),
                       threads);
}

// addresses of x, weight, bias, out, a, b; rows, columns, width, rank; strides of x, weight, out;
// period and first gated row; whether the weight lies across.
void block_linear_cpu(const std::array<uintptr_t, 6>& addresses, int dtype, int out_dtype,
                      const std::array<int64_t, 4>& sizes, const std::array<int64_t, 3>& strides,
                      const std::array<int64_t, 2>& gate, bool across, int threads) {
    const cllm::BlockLinear linear{pointer<const void>(addresses[0]),
                                   pointer<const void>(addresses[1]),
                                   pointer<const void>(addresses[2]),
                                   pointer<void>(addresses[3]),
                                   pointer<const void>(addresses[4]),
                                   pointer<const void>(addresses[5]),
                                   static_cast<cllm::Dtype>(dtype),
                                   static_cast<cllm::Dtype>(out_dtype),
                                   sizes[0],
                                   sizes[1],
                                   sizes[2],
                                   strides[0],
                                   strides[1],
                                   strides[2],
                                   sizes[3],
                                   gate[0],
                                   gate[1],
                                   across};
    py::gil_scoped_release release;
    cllm::block_linear_cpu(linear, threads);
}

// addresses: hidden, out, then weight, bias, a, b of each of the seven linear layers, the four
// norms, cos, sin, keys, values, lengths. sizes: batch, n, hidden, mlp, heads, kv_heads, head_size,
// capacity, rotary_row, window, guesses_from, guess_width, gated_from.
constexpr size_t kLayerAddresses = 2 + 4 * cllm::kLayerParts + 9;

int64_t decoder_layer_cpu(const std::array<uintptr_t, kLayerAddresses>& addresses,
                          const std::array<int64_t, cllm::kLayerParts>& ranks, int dtype,
                          const std::array<int64_t, 13>& sizes,
                          const std::array<int64_t, 6>& strides, float scale, float eps,
                          int threads) {
    cllm::DecoderLayer layer;
    const uintptr_t* next = addresses.data();
    const auto take = [&next] { return pointer<void>(*next++); };
    layer.hidden = take();
    layer.out = take();
    for (int part = 0; part < cllm::kLayerParts; ++part) {
        cllm::LayerLinear& linear = layer.linears[part];
        linear.weight = take();
        linear.bias = take();
        linear.a = take();
        linear.b = take();
        linear.rank = ranks[part];
    }
    layer.attention_norm = take();
    layer.mlp_norm = take();
    layer.query_norm = take();
    layer.key_norm = take();
    layer.cos = take();
    layer.sin = take();
    layer.keys = {take(), strides[0], strides[1], strides[2]};
    layer.values = {take(), strides[3], strides[4], strides[5]};
    layer.lengths = static_cast<const int64_t*>(take());
    layer.dtype = static_cast<cllm::Dtype>(dtype);
    int64_t* const fields[] = {
        &layer.batch,      &layer.n,        &layer.hidden_size,  &layer.mlp_size,
        &layer.heads,      &layer.kv_heads, &layer.head_size,    &layer.capacity,
        &layer.rotary_row, &layer.window,   &layer.guesses_from, &layer.guess_width,
        &layer.gated_from};
    for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
    layer.scale = scale;
    layer.eps = eps;
    py::gil_scoped_release release;
    return cllm::decoder_layers_cpu(&layer, 1, threads);
}

// table [count, kLayerFields]: of every layer weight, bias, a, b of each of the seven linear
// layers, the four norms, keys, values, the seven ranks, row, head and slot strides of keys and of
// values, capacity and window. shared: hidden, out, cos, sin, lengths. sizes: batch, n, hidden,
// mlp, heads, kv_heads, head_size, rotary_row, guesses_from, guess_width, gated_from.
constexpr int64_t kLayerFields = 4 * cllm::kLayerParts + 6 + cllm::kLayerParts + 8;

int64_t decoder_layers_cpu(uintptr_t table, int64_t count, const std::array<uintptr_t, 5>& shared,
                           int dtype, const std::array<int64_t, 11>& sizes, float scale, float eps,
                           int threads) {
    std::vector<cllm::DecoderLayer> layers(static_cast<size_t>(count));
    const auto* next = pointer<const int64_t>(table);
    const auto take = [&next] { return pointer<void>(static_cast<uintptr_t>(*next++)); };
    for (cllm::DecoderLayer& layer : layers) {
        layer.hidden = pointer<void>(shared[&layer == layers.data() ? 0 : 1]);
        layer.out = pointer<void>(shared[1]);
        for (cllm::LayerLinear& linear : layer.linears) {
            linear.weight = take();
            linear.bias = take();
            linear.a = take();
            linear.b = take();
        }
        layer.attention_norm = take();
        layer.mlp_norm = take();
        layer.query_norm = take();
        layer.key_norm = take();
        layer.keys.data = take();
        layer.values.data = take();
        for (cllm::LayerLinear& linear : layer.linears) linear.rank = *next++;
        for (cllm::LayerCache* cache : {&layer.keys, &layer.values}) {
            cache->row = *next++;
            cache->head = *next++;
            cache->slot = *next++;
        }
        layer.capacity = *next++;
        layer.window = *next++;
        layer.cos = pointer<void>(shared[2]);
        layer.sin = pointer<void>(shared[3]);
        layer.lengths = pointer<const int64_t>(shared[4]);
        layer.dtype = static_cast<cllm::Dtype>(dtype);
        int64_t* const fields[] = {&layer.batch,       &layer.n,          &layer.hidden_size,
                                   &layer.mlp_size,    &layer.heads,      &layer.kv_heads,
                                   &layer.head_size,   &layer.rotary_row, &layer.guesses_from,
                                   &layer.guess_width, &layer.gated_from};
        for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
        layer.scale = scale;
        layer.eps = eps;
    }
    py::gil_scoped_release release;
    return cllm::decoder_layers_cpu(layers.data(), count, threads);
}

cllm::Noise noise_argument(uintptr_t seed, uintptr_t row, uintptr_t position) {
    return {pointer<const int64_t>(seed), pointer<const int64_t>(row),
            pointer<const int64_t>(position)};
}

void gumbel_noise_cpu(uintptr_t seed, uintptr_t row, uintptr_t position, int64_t rows,
                      int64_t vocabulary, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    cllm::gumbel_noise_cpu(noise_argument(seed, row, position), rows, vocabulary,
                           pointer<float>(out), threads);
}

void running_argmax_cpu(uintptr_t scores, int dtype, int64_t rows, int64_t row_stride,
                        int64_t columns, uintptr_t bias, float softcap, float scale, int64_t first,
                        uintptr_t seed, uintptr_t noise_row, uintptr_t position, uintptr_t index,
                        uintptr_t value, int threads) {
    const cllm::ScoreChunk chunk{
        rows_argument(scores, dtype, rows, rows > 0 ? rows : 1, 0, row_stride, columns),
        pointer<const float>(bias),
        softcap,
        scale,
        first,
        noise_argument(seed, noise_row, position)};
    py::gil_scoped_release release;
    cllm::running_argmax_cpu(chunk, pointer<int64_t>(index), pointer<float>(value), threads);
}

void running_argmax_exact_cpu(uintptr_t scores, int dtype, int64_t rows, int64_t row_stride,
                              int64_t columns, uintptr_t bias, float softcap, float scale,
                              int64_t first, uintptr_t seed, uintptr_t noise_row,
                              uintptr_t position, uintptr_t hidden, int64_t hidden_stride,
                              uintptr_t weight, int64_t weight_stride, int64_t width,
                              uintptr_t index, uintptr_t value, int threads) {
    const cllm::ScoreChunk chunk{
        rows_argument(scores, dtype, rows, rows > 0 ? rows : 1, 0, row_stride, columns),
        pointer<const float>(bias),
        softcap,
        scale,
        first,
        noise_argument(seed, noise_row, position)};
    const cllm::LinearOperands operands{pointer<const void>(hidden), hidden_stride,
                                        pointer<const void>(weight), weight_stride, width};
    py::gil_scoped_release release;
    cllm::running_argmax_exact_cpu(chunk, operands, pointer<int64_t>(index), pointer<float>(value),
                                   threads);
}

template <typename Result, typename... Rest>
auto consistency_chunk(Result (*run)(const cllm::ConsistencyChunk&, Rest...)) {
    return [run](uintptr_t student, uintptr_t teacher, uintptr_t row_weights, uintptr_t labels,
                 uintptr_t scales, uintptr_t consistency, uintptr_t cross_entropy, uintptr_t state,
                 int stage, int dtype, int64_t rows, int64_t columns, int64_t student_stride,
                 int64_t teacher_stride, int64_t first, int64_t vocabulary, int divergence,
                 float beta, float inverse_temperature, float label_smoothing, float softcap,
                 bool student_gradient, bool teacher_gradient, Rest... rest) {
        const cllm::ConsistencyChunk chunk{pointer<void>(student),
                                           pointer<void>(teacher),
                                           pointer<const float>(row_weights),
                                           pointer<const int64_t>(labels),
                                           pointer<const float>(scales),
                                           pointer<float>(consistency),
                                           pointer<float>(cross_entropy),
                                           pointer<double>(state),
                                           static_cast<cllm::Stage>(stage),
                                           static_cast<cllm::Dtype>(dtype),
                                           rows,
                                           columns,
                                           student_stride,
                                           teacher_stride,
                                           first,
                                           vocabulary,
                                           static_cast<cllm::Divergence>(divergence),
                                           beta,
                                           inverse_temperature,
                                           label_smoothing,
                                           softcap,
                                           student_gradient,
                                           teacher_gradient};
        py::gil_scoped_release release;
        return run(chunk, rest...);
    };
}

cllm::CacheSide cache_side(const py::tuple& side) {
    const auto at = [&side](size_t i) { return side[i].cast<int64_t>(); };
    return {pointer<const void>(static_cast<uintptr_t>(at(0))),
            pointer<void>(static_cast<uintptr_t>(at(1))),
            at(2),
            at(3),
            at(4),
            at(5),
            at(6),
            at(7)};
}

cllm::BlockAppend block_append(const py::tuple& keys, const py::tuple& values, uintptr_t lengths,
                               int dtype, int64_t batch, int64_t heads, int64_t n, int64_t width,
                               int64_t capacity) {
    return {cache_side(keys),
            cache_side(values),
            pointer<const int64_t>(lengths),
            static_cast<cllm::Dtype>(dtype),
            batch,
            heads,
            n,
            width,
            capacity};
}

int64_t block_append_cpu(const py::tuple& keys, const py::tuple& values, uintptr_t lengths,
                         int dtype, int64_t batch, int64_t heads, int64_t n, int64_t width,
                         int64_t capacity, int threads) {
    const auto append =
        block_append(keys, values, lengths, dtype, batch, heads, n, width, capacity);
    py::gil_scoped_release release;
    return cllm::block_append_cpu(append, threads);
}

void block_mask_cpu(uintptr_t lengths, int64_t batch, int64_t n, int64_t first, int64_t slots,
                    int64_t window, int64_t groups, int dtype, uintptr_t mask, int threads) {
    const cllm::BlockView view{pointer<const int64_t>(lengths), batch, n, first, slots, window};
    py::gil_scoped_release release;
    cllm::block_mask_cpu(view, groups, static_cast<cllm::Dtype>(dtype), pointer<void>(mask),
                         threads);
}

int block_unsafe_cpu(const py::tuple& keys, const py::tuple& values, uintptr_t lengths, int dtype,
                     int64_t batch, int64_t heads, int64_t n, int64_t width, int64_t capacity,
                     int64_t first, int64_t slots, int64_t window, int threads) {
    const auto append =
        block_append(keys, values, lengths, dtype, batch, heads, n, width, capacity);
    const cllm::BlockView view{append.lengths, batch, n, first, slots, window};
    py::gil_scoped_release release;
    return cllm::block_unsafe_cpu(append, view, threads);
}

#ifdef CLLM_WITH_CUDA
void launched(const char* op, const char* failure) {
    if (failure == nullptr) return;
    throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " + failure);
}

void jacobi_step_cuda(const cllm::JacobiStep& step, int device, uintptr_t stream) {
    launched("jacobi_step", cllm::jacobi_step_cuda(step, device, pointer<void>(stream)));
}

void consistency_chunk_cuda(const cllm::ConsistencyChunk& chunk, int device, uintptr_t stream) {
    launched("linear_consistency_loss",
             cllm::consistency_chunk_cuda(chunk, device, pointer<void>(stream)));
}
#endif

const char* isa_name() {
    switch (cllm::cpu_isa()) {
        case cllm::Isa::kAvx512:
            return "avx512";
        case cllm::Isa::kAvx2:
            return "avx2";
        default:
            return "scalar";
    }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native kernels of cllm_kernels; addresses and sizes in, no tensors.";
    module.def("jacobi_step_cpu", jacobi_step(&cllm::jacobi_step_cpu));
    cllm::bind_guesses(module);
    module.def("row_argmax_cpu", &row_argmax_cpu);
    module.def("rms_norm_cpu", &rms_norm_cpu);
    module.def("block_linear_cpu", &block_linear_cpu);
    module.def("decoder_layer_cpu", &decoder_layer_cpu);
    module.def("decoder_layers_cpu", &decoder_layers_cpu);
    module.attr("LAYER_FIELDS") = kLayerFields;
    module.def("gumbel_noise_cpu", &gumbel_noise_cpu);
    module.def("running_argmax_cpu", &running_argmax_cpu);
    module.def("running_argmax_exact_cpu", &running_argmax_exact_cpu);
    module.def("consistency_chunk_cpu", consistency_chunk(&cllm::consistency_chunk_cpu));
    if (!cllm::direct::add_to(module.ptr())) throw py::error_already_set();
    module.def("block_append_cpu", &block_append_cpu);
    module.def("block_mask_cpu", &block_mask_cpu);
    module.def("block_unsafe_cpu", &block_unsafe_cpu);
    module.def("isa", &isa_name);
    module.def("bf16_dot", &cllm::cpu_has_bf16_dot);
#ifdef _OPENMP
    module.def("openmp_threads", [] { return omp_get_max_threads(); });
#else
    module.def("openmp_threads", [] { return 1; });
#endif
#ifdef CLLM_WITH_CUDA
    module.def("jacobi_step_cuda", jacobi_step(&jacobi_step_cuda));
    module.def("consistency_chunk_cuda", consistency_chunk(&consistency_chunk_cuda));
#endif
}
