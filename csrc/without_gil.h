// Work in C++ that a function of plain CPython does while other threads run Python.
#pragma once

#include <Python.h>

#include <exception>
#include <new>

namespace cllm::direct {

// Runs `work` with the GIL released. False, with a Python error set, where it throws: no exception
// may leave a function of plain C, nor pass the place where the GIL is taken again.
template <typename Work>
bool without_gil(const Work& work) {
    std::exception_ptr thrown;
    Py_BEGIN_ALLOW_THREADS;
    try {
        work();
    } catch (...) {
        thrown = std::current_exception();
    }
    Py_END_ALLOW_THREADS;
    if (thrown == nullptr) return true;
    try {
        std::rethrow_exception(thrown);
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "an unknown C++ exception");
    }
    return false;
}

}  // namespace cllm::direct
