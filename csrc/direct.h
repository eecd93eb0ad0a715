// The direct way into small ops: one call takes the tensor objects themselves, checks them and runs
// the kernel. Reading shape, dtype, device, layout and address of ten tensors from Python takes
// longer than jacobi_step itself; DLPack's C exchange interface (dmlc/dlpack 1.2, on torch's
// Tensor as __dlpack_c_exchange_api__) gives all of a tensor in some 20 ns and belongs to no
// version of torch.
//
// A function here answers None where it does not serve: no such interface, another type of tensor,
// something that watches torch's calls, arguments that do not fit. The caller then goes the long
// way, which explains what is wrong.
#pragma once

#include <Python.h>

#include <cstdint>

#include "ops.h"
#include "without_gil.h"

namespace cllm::direct {

// DLPack's structs, as far as they are read here.
struct Device {
    int32_t type;
    int32_t id;
};
struct ElementType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
    bool is(uint8_t wanted_code, uint8_t wanted_bits) const {
        return code == wanted_code && bits == wanted_bits && lanes == 1;
    }
};
struct View {
    void* data;
    Device device;
    int32_t dims;
    ElementType type;
    int64_t* shape;    // [dims]
    int64_t* strides;  // [dims], in elements
    uint64_t byte_offset;
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
    }
    bool contiguous() const {
        int64_t expected = 1;
        bool in_order = true;
        for (int32_t i = dims - 1; i >= 0; --i) {
            if (shape[i] == 0) return true;
            in_order &= shape[i] == 1 || strides[i] == expected;
            expected *= shape[i];
        }
        return in_order;
    }
};
struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;
    void* allocate;
    void* from_object;
    void* to_object;
    int (*borrow)(void* object, View* out);
    int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

constexpr int32_t kCpu = 1, kCuda = 2;                           // device types
constexpr uint8_t kInt = 0, kFloat = 2, kBFloat = 4, kBool = 6;  // element types

// Filled by install(); holds references for as long as the process lives.
struct State {
    const ExchangeApi* api = nullptr;
    PyTypeObject* tensor = nullptr;
    PyTypeObject* parameter = nullptr;
    PyObject* watchers[4] = {};  // functions whose result is 0, False or None when nobody watches
};
inline State state;

// install(capsule, Tensor, Parameter, four watchers) -> bool: whether the interface can be used.
inline PyObject* install(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 7 || !PyType_Check(args[1]) || !PyType_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "install(capsule, Tensor, Parameter, 4 functions)");
        return nullptr;
    }
    auto* api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
    if (api == nullptr) return nullptr;
    while (api != nullptr && api->major > 1) api = api->previous;
    if (api == nullptr || api->major != 1 || api->borrow == nullptr) Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(args[i]);
    state.tensor = reinterpret_cast<PyTypeObject*>(args[1]);
    state.parameter = reinterpret_cast<PyTypeObject*>(args[2]);
    for (int i = 0; i < 4; ++i) state.watchers[i] = args[3 + i];
    state.api = api;
    Py_RETURN_TRUE;
}

enum class Answer { kYes, kNo, kError };

// Whether nothing watches torch's calls (a mode, a functional transform, a tracer).
inline Answer unwatched() {
    if (state.api == nullptr) return Answer::kNo;
    for (PyObject* watcher : state.watchers) {
        PyObject* seen = PyObject_CallNoArgs(watcher);
        if (seen == nullptr) return Answer::kError;
        const int truth = seen == Py_None ? 0 : PyObject_IsTrue(seen);
        Py_DECREF(seen);
        if (truth < 0) return Answer::kError;
        if (truth != 0) return Answer::kNo;
    }
    return Answer::kYes;
}

inline bool plain(PyObject* object) {
    return Py_TYPE(object) == state.tensor || Py_TYPE(object) == state.parameter;
}

// False for what is no plain tensor, or none that DLPack can describe (sparse ones, say).
inline bool borrow(PyObject* object, View& out) {
    if (!plain(object)) return false;
    if (state.api->borrow(object, &out) == 0) return out.dims == 0 || out.strides != nullptr;
    PyErr_Clear();
    return false;
}

// eager(*tensors) -> bool: plain tensors, the first on a CPU or CUDA device, and nobody watching.
inline PyObject* eager(PyObject*, PyObject* const* args, Py_ssize_t count) {
    const Answer answer = unwatched();
    if (answer == Answer::kError) return nullptr;
    if (answer == Answer::kNo) Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (!plain(args[i])) Py_RETURN_FALSE;
    }
    View first;
    if (count < 1 || !borrow(args[0], first)) Py_RETURN_FALSE;
    if (first.device.type != kCpu && first.device.type != kCuda) Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

inline bool is_column(const View& view, int64_t rows) {
    return view.dims == 1 && view.shape[0] == rows && view.type.is(kInt, 64);
}

inline bool is_table(const View& view, int64_t rows) {
    return view.dims == 2 && view.shape[0] == rows && view.type.is(kInt, 64);
}

// jacobi_step(window, predictions, output, lengths, generated, progress, done, limits, stop_ids,
// fill, empty_like, block_mode, accept_one, threads) -> accepted, made by empty_like(lengths); or
// None, also where, on a CPU, a row's state is out of bounds (nothing has changed then). The
// conditions are those of _fits of cllm_kernels/jacobi_step.
inline PyObject* jacobi_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 14) {
        PyErr_SetString(PyExc_TypeError, "jacobi_step takes 14 arguments");
        return nullptr;
    }
    const Answer answer = unwatched();
    if (answer == Answer::kError) return nullptr;
    if (answer == Answer::kNo) Py_RETURN_NONE;
    enum {
        kWindow,
        kPredictions,
        kOutput,
        kLengths,
        kGenerated,
        kProgress,
        kDone,
        kLimits,
        kStops,
        kFill,
        kTensors
    };
    View views[kTensors];
    for (int i = 0; i < kTensors; ++i) {
        if (i == kFill && args[i] == Py_None) continue;
        if (!borrow(args[i], views[i]) || !views[i].contiguous()) Py_RETURN_NONE;
        if (views[i].device.type != views[0].device.type ||
            views[i].device.id != views[0].device.id) {
            Py_RETURN_NONE;
        }
    }
    const View &window = views[kWindow], &done = views[kDone], &stops = views[kStops];
    if (window.dims != 2) Py_RETURN_NONE;
    const int64_t rows = window.shape[0], n = window.shape[1];
    const bool has_fill = args[kFill] != Py_None;
    const bool fits = n >= 1 && is_table(window, rows) && is_table(views[kPredictions], rows) &&
                      views[kPredictions].shape[1] == n && is_table(views[kOutput], rows) &&
                      is_column(views[kLengths], rows) && is_column(views[kGenerated], rows) &&
                      is_column(views[kProgress], rows) && is_column(views[kLimits], rows) &&
                      done.dims == 1 && done.shape[0] == rows && done.type.is(kBool, 8) &&
                      stops.dims == 1 && is_column(stops, stops.shape[0]) &&
                      (!has_fill || (is_table(views[kFill], rows) && views[kFill].shape[1] >= n));
    if (!fits) Py_RETURN_NONE;
    const int threads = static_cast<int>(PyLong_AsLong(args[13]));
    if (threads == -1 && PyErr_Occurred()) return nullptr;
    JacobiStep step{window.as<int64_t>(),
                    views[kPredictions].as<int64_t>(),
                    views[kOutput].as<int64_t>(),
                    views[kLengths].as<int64_t>(),
                    views[kGenerated].as<int64_t>(),
                    views[kProgress].as<int64_t>(),
                    done.as<bool>(),
                    views[kLimits].as<int64_t>(),
                    stops.as<int64_t>(),
                    has_fill ? views[kFill].as<int64_t>() : nullptr,
                    nullptr,
                    rows,
                    n,
                    views[kOutput].shape[1],
                    stops.shape[0],
                    has_fill ? views[kFill].shape[1] : 0,
                    args[11] == Py_True,
                    args[12] == Py_True};
    const Device device = window.device;
    if (device.type != kCpu && device.type != kCuda) Py_RETURN_NONE;
    // From here on the views are not looked at: making a tensor runs code that may change others.
    PyObject* accepted = PyObject_CallOneArg(args[10], args[kLengths]);
    if (accepted == nullptr) return nullptr;
    View result;
    if (!borrow(accepted, result) || !is_column(result, rows)) {
        Py_DECREF(accepted);
        Py_RETURN_NONE;
    }
    step.accepted = result.as<int64_t>();
    if (device.type == kCpu) {
        int64_t bad = -1;
        if (!without_gil([&] { bad = jacobi_step_cpu(step, threads); })) {
            Py_DECREF(accepted);
            return nullptr;
        }
        if (bad < 0) return accepted;
    }
#ifdef CLLM_WITH_CUDA
    if (device.type == kCuda) {
        void* stream = nullptr;
        const char* failure = nullptr;
        if (state.api->current_stream(kCuda, device.id, &stream) == 0) {
            failure = jacobi_step_cuda(step, device.id, stream);
            if (failure == nullptr) return accepted;
            PyErr_Format(PyExc_RuntimeError, "jacobi_step: the CUDA launch failed: %s", failure);
        }
        Py_DECREF(accepted);
        return nullptr;
    }
#endif
    Py_DECREF(accepted);
    Py_RETURN_NONE;
}

// Whether the type is one that the kernels take.
inline bool dtype_of(const View& view, Dtype& dtype) {
    if (view.type.is(kFloat, 32)) {
        dtype = Dtype::kFloat32;
    } else if (view.type.is(kBFloat, 16)) {
        dtype = Dtype::kBFloat16;
    } else if (view.type.is(kFloat, 16)) {
        dtype = Dtype::kFloat16;
    } else {
        return false;
    }
    return true;
}

// row_argmax(logits, index, value, threads) -> None, or -1 when done. CPU only; logits [..., V]
// whose rows two strides reach.
inline PyObject* row_argmax(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "row_argmax takes 4 arguments");
        return nullptr;
    }
    const Answer answer = unwatched();
    if (answer == Answer::kError) return nullptr;
    if (answer == Answer::kNo) Py_RETURN_NONE;
    View logits, index, value;
    if (!borrow(args[0], logits) || !borrow(args[1], index) || !borrow(args[2], value)) {
        Py_RETURN_NONE;
    }
    if (logits.device.type != kCpu || logits.dims < 1) Py_RETURN_NONE;
    Dtype dtype;
    if (!dtype_of(logits, dtype)) Py_RETURN_NONE;
    const int32_t last = logits.dims - 1;
    const int64_t columns = logits.shape[last];
    if (columns < 1 || (columns != 1 && logits.strides[last] != 1)) Py_RETURN_NONE;
    // Leading dimensions in groups that one stride reaches, the innermost first.
    int64_t sizes[2] = {1, 1}, strides[2] = {0, 0}, rows = 1;
    int groups = 0;
    for (int32_t i = last - 1; i >= 0; --i) {
        const int64_t size = logits.shape[i], stride = logits.strides[i];
        rows *= size;
        if (size == 1) continue;
        if (groups > 0 && stride == sizes[groups - 1] * strides[groups - 1]) {
            sizes[groups - 1] *= size;
        } else if (groups == 2) {
            Py_RETURN_NONE;
        } else {
            sizes[groups] = size;
            strides[groups++] = stride;
        }
    }
    const int threads = static_cast<int>(PyLong_AsLong(args[3]));
    if (threads == -1 && PyErr_Occurred()) return nullptr;
    if (rows > 0) {
        const Rows table{
            logits.as<const void>(), dtype, rows, sizes[0], strides[1], strides[0], columns};
        const auto work = [&] {
            row_argmax_cpu(table, index.as<int64_t>(), value.as<void>(), threads);
        };
        if (!without_gil(work)) return nullptr;
    }
    return PyLong_FromLong(-1);
}

// One matrix [rows, columns] of this type on the CPU, rows in one piece.
inline bool is_matrix(const View& view, int64_t rows, int64_t columns, Dtype wanted) {
    Dtype dtype;
    return view.device.type == kCpu && view.dims == 2 && view.shape[0] == rows &&
           view.shape[1] == columns && (columns == 1 || view.strides[1] == 1) &&
           dtype_of(view, dtype) && dtype == wanted;
}

// One matrix [rows, columns] of this type on the CPU, columns in one piece.
inline bool lies_across(const View& view, int64_t rows, int64_t columns, Dtype wanted) {
    Dtype dtype;
    return view.device.type == kCpu && view.dims == 2 && view.shape[0] == rows &&
           view.shape[1] == columns && rows > 1 && columns > 1 && view.strides[0] == 1 &&
           view.strides[1] >= rows && dtype_of(view, dtype) && dtype == wanted;
}

// block_linear(x, weight, bias or None, a or None, b or None, out, gated_from, threads) -> None, or
// -1 when done. CPU only, of one type: x [.., H] contiguous, weight [N, H] with contiguous rows (or
// columns, without a and b), bias [N], a [R, H], b [N, R], out [.., N] contiguous; gated are the
// rows x[.., gated_from:, :].
inline PyObject* block_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 8) {
        PyErr_SetString(PyExc_TypeError, "block_linear takes 8 arguments");
        return nullptr;
    }
    const Answer answer = unwatched();
    if (answer == Answer::kError) return nullptr;
    if (answer == Answer::kNo) Py_RETURN_NONE;
    View x, weight, bias{}, a{}, b{}, out;
    const bool has_bias = args[2] != Py_None, gated = args[3] != Py_None;
    if (gated != (args[4] != Py_None) || !borrow(args[0], x) || !borrow(args[1], weight) ||
        !borrow(args[5], out) || (has_bias && !borrow(args[2], bias)) ||
        (gated && (!borrow(args[3], a) || !borrow(args[4], b)))) {
        Py_RETURN_NONE;
    }
    Dtype dtype, other;
    if (x.dims < 1 || weight.dims != 2 || out.dims != x.dims || x.device.type != kCpu ||
        !x.contiguous() || !out.contiguous() || !dtype_of(x, dtype)) {
        Py_RETURN_NONE;
    }
    const int64_t width = x.shape[x.dims - 1], columns = weight.shape[0];
    const bool across = !gated && lies_across(weight, columns, width, dtype);
    if (width < 1 || !(across || is_matrix(weight, columns, width, dtype)) ||
        out.shape[x.dims - 1] != columns || !dtype_of(out, other) || other != dtype) {
        Py_RETURN_NONE;
    }
    if (has_bias && (bias.device.type != kCpu || bias.dims != 1 || bias.shape[0] != columns ||
                     !bias.contiguous() || !dtype_of(bias, other) || other != dtype)) {
        Py_RETURN_NONE;
    }
    const int64_t rank = gated && a.dims == 2 ? a.shape[0] : 0;
    if (gated && (x.dims < 2 || !a.contiguous() || !b.contiguous() ||
                  !is_matrix(a, rank, width, dtype) || !is_matrix(b, columns, rank, dtype))) {
        Py_RETURN_NONE;
    }
    int64_t rows = 1;
    for (int32_t i = 0; i + 1 < x.dims; ++i) rows *= x.shape[i];
    const int64_t period = x.dims > 1 ? x.shape[x.dims - 2] : 1;
    const long long gated_from = PyLong_AsLongLong(args[6]);
    if (gated_from == -1 && PyErr_Occurred()) return nullptr;
    if (gated && (gated_from < 0 || gated_from > period)) Py_RETURN_NONE;
    const int threads = static_cast<int>(PyLong_AsLong(args[7]));
    if (threads == -1 && PyErr_Occurred()) return nullptr;
    const BlockLinear linear{x.as<const void>(),
                             weight.as<const void>(),
                             has_bias ? bias.as<const void>() : nullptr,
                             out.as<void>(),
                             gated ? a.as<const void>() : nullptr,
                             gated ? b.as<const void>() : nullptr,
                             dtype,
                             dtype,
                             rows,
                             columns,
                             width,
                             width,
                             across        ? weight.strides[1]
                             : columns > 1 ? weight.strides[0]
                                           : width,
                             columns,
                             rank,
                             period,
                             gated_from,
                             across};
    if (!without_gil([&] { block_linear_cpu(linear, threads); })) return nullptr;
    return PyLong_FromLong(-1);
}

template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction fastcall() {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kFunction));
}

// Adds the functions of this file to the module; false with a Python error set.
inline bool add_to(PyObject* module) {
    static PyMethodDef methods[] = {
        {"direct_install", fastcall<install>(), METH_FASTCALL, nullptr},
        {"direct_eager", fastcall<eager>(), METH_FASTCALL, nullptr},
        {"direct_jacobi_step", fastcall<jacobi_step>(), METH_FASTCALL, nullptr},
        {"direct_block_linear", fastcall<block_linear>(), METH_FASTCALL, nullptr},
        {"direct_row_argmax", fastcall<row_argmax>(), METH_FASTCALL, nullptr},
        {nullptr, nullptr, 0, nullptr}};
    return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace cllm::direct
