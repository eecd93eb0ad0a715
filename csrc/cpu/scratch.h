// Memory that a call writes before it reads.
#pragma once

#include <cstdint>
#include <memory>

namespace cllm {

constexpr int64_t kLine = 64;  // vectors that straddle cache lines are read at half the speed

inline int64_t whole_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// What a thread keeps from call to call, at most kMost bytes: more is made and freed by its call,
// or one long prompt would hold its memory for as long as the thread lives.
class Scratch {
  public:
    static constexpr int64_t kMost = 8 << 20;

    // `bytes` of memory, aligned to lines; gone when `large` or this is, or at the next call.
    char* take(int64_t bytes, std::unique_ptr<char[]>& large) {
        if (bytes > kMost) {
            large.reset(new char[bytes + kLine]);
            return aligned(large.get());
        }
        if (bytes > size_ || kept_ == nullptr) {
            size_ = 0;
            kept_.reset();  // first, and no copy: what it holds is of no use to anybody
            kept_.reset(new char[bytes + kLine]);
            size_ = bytes;
        }
        return aligned(kept_.get());
    }

  private:
    static char* aligned(char* data) {
        return data + (kLine - reinterpret_cast<uintptr_t>(data) % kLine) % kLine;
    }

    std::unique_ptr<char[]> kept_;
    int64_t size_ = 0;
};

}  // namespace cllm
