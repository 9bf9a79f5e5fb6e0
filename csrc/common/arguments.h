// An op's arguments, read off the dispatcher's stack in the schema's order.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace fastkd {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : stack_(stack) {}
  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*stack_++);
  }

 private:
  StableIValue* stack_;
};

}  // namespace fastkd
