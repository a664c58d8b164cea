// Whether kernels may start early: a switch of launch.cuh that bindings.cpp shows to Python, for a C++ compiler too.
#pragma once

#include <atomic>

namespace vitq {

// Off only to measure what early starts gain.
inline std::atomic<bool> early_starts{true};

}  // namespace vitq
