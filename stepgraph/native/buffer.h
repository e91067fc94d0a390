#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace stepgraph {

// Uninitialised memory that starts with a cache line, as registers are loaded from it.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(operator new(size * sizeof(T), line))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { operator delete(data_, line); }
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t line{64};
  T* data_;
};

}  // namespace stepgraph
