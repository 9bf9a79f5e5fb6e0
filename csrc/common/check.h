// A contract that an op checks before it computes anything.
#pragma once
#include <torch/headeronly/util/Exception.h>

// Throws std::runtime_error (a RuntimeError in Python) that ends in the message.
#define FASTKD_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fastkd: ", __VA_ARGS__)
