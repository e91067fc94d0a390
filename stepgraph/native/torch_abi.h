// Kernels as torch operators, through the C functions that torch keeps stable: no C++ of torch's is included, so that the
// library compiles in seconds and one binary is right for one torch version however that was compiled.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace stepgraph {

inline void check(AOTITorchError error) {
  if (error != 0) throw std::runtime_error("stepgraph's CPU kernels: torch reported an error");
}

template <typename T>
int32_t dtype_of() {
  if constexpr (std::is_same_v<T, float>) return aoti_torch_dtype_float32();
  if constexpr (std::is_same_v<T, int32_t>) return aoti_torch_dtype_int32();
  if constexpr (std::is_same_v<T, int64_t>) return aoti_torch_dtype_int64();
  if constexpr (std::is_same_v<T, uint8_t>) return aoti_torch_dtype_uint8();
}

// A tensor that this library owns a reference to.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  // A new contiguous float32 tensor of up to three sizes.
  static Tensor empty(std::initializer_list<int64_t> sizes) {
    int64_t size[3], stride[3];
    const int64_t dims = static_cast<int64_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), size);
    for (int64_t i = dims - 1, step = 1; i >= 0; step *= size[i--]) stride[i] = step;
    AtenTensorHandle handle;
    check(aoti_torch_empty_strided(dims, size, stride, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                   &handle));
    return Tensor(handle);
  }

  // Its elements, which must be of T.
  template <typename T>
  T* data() const {
    int32_t dtype;
    check(aoti_torch_get_dtype(handle_, &dtype));
    if (dtype != dtype_of<T>()) throw std::runtime_error("stepgraph's CPU kernels: a tensor is of another dtype");
    void* pointer;
    check(aoti_torch_get_data_ptr(handle_, &pointer));
    return static_cast<T*>(pointer);
  }

  int64_t size(int64_t dim) const {
    int64_t* sizes;
    check(aoti_torch_get_sizes(handle_, &sizes));
    return sizes[dim];
  }

  int64_t stride(int64_t dim) const {
    int64_t* strides;
    check(aoti_torch_get_strides(handle_, &strides));
    return strides[dim];
  }

  bool is_contiguous() const {
    bool contiguous;
    check(aoti_torch_is_contiguous(handle_, &contiguous));
    return contiguous;
  }

  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_;
};

// The arguments of one call, in the order of the schema. Tensors are handed over, so each is taken exactly once.
class Stack {
 public:
  explicit Stack(StableIValue* values) : values_(values) {}

  Tensor tensor() {
    Tensor tensor = strided();
    if (!tensor.is_contiguous()) throw std::runtime_error("stepgraph's CPU kernels: a tensor is not contiguous");
    return tensor;
  }
  Tensor strided() {
    AtenTensorHandle handle;
    std::memcpy(&handle, values_ + next_++, sizeof handle);
    return Tensor(handle);
  }
  std::optional<Tensor> optional() {  // torch wraps what is there once more
    StableIValue* inner;
    std::memcpy(&inner, values_ + next_++, sizeof inner);
    if (inner == nullptr) return std::nullopt;
    AtenTensorHandle handle;
    std::memcpy(&handle, inner, sizeof handle);
    delete inner;
    return Tensor(handle);
  }
  int64_t integer() {
    int64_t value;
    std::memcpy(&value, values_ + next_++, sizeof value);
    return value;
  }
  float real() {
    double value;
    std::memcpy(&value, values_ + next_++, sizeof value);
    return static_cast<float>(value);
  }
  void give(Tensor tensor) {
    AtenTensorHandle handle = tensor.release();
    values_[0] = 0;
    std::memcpy(values_, &handle, sizeof handle);
  }

 private:
  StableIValue* values_;
  int next_ = 0;
};

using Kernel = void(StableIValue* values, uint64_t num_arguments, uint64_t num_results);

inline void kernel(TorchLibraryHandle library, const char* name, Kernel* call) {
  check(torch_library_impl(library, name, call, TORCH_ABI_VERSION));
}

// Run body(begin, end) over 0 … count on torch's own threads, in shares of at least `grain`.
template <typename Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  check(torch_parallel_for(0, count, grain, call, const_cast<Body*>(&body)));
}

}  // namespace stepgraph
