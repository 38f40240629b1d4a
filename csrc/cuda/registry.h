// The CUDA kernels compiled into dfengine._native, by name.
#pragma once

#include <map>
#include <string>

namespace dfe {

std::map<std::string, const void*>& cuda_kernels();

struct RegisteredKernel {
    RegisteredKernel(const char* name, const void* function) { cuda_kernels()[name] = function; }
};

}  // namespace dfe
