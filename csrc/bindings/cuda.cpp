// Launches the CUDA kernels that nvcc compiled into the module.
#include <cuda_runtime_api.h>

#include "../cuda/registry.h"
#include "common.h"

namespace dfe {

std::map<std::string, const void*>& cuda_kernels() {
    static std::map<std::string, const void*> kernels;
    return kernels;
}

namespace {

void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

const void* kernel_named(const std::string& name) {
    const auto found = cuda_kernels().find(name);
    if (found == cuda_kernels().end()) throw std::invalid_argument("no CUDA kernel is called '" + name + "'");
    return found->second;
}

// Whether the code compiled in runs on the current device.
bool cuda_kernel_runs(const std::string& name) {
    cudaFuncAttributes attributes;
    const bool runs = cudaFuncGetAttributes(&attributes, kernel_named(name)) == cudaSuccess;
    cudaGetLastError();
    return runs;
}

// Lets a kernel have that much dynamic shared memory on the current device; the driver is asked only for more than before. With much of it, it is
// given all that a multiprocessor has, at the cost of its first-level cache, for the other blocks that are meant to share it.
void allow_shared(const void* function, unsigned shared) {
    constexpr unsigned MUCH = 16 * 1024;  // kernels/cuda_launch.py: MUCH_SHARED
    if (shared <= MUCH) return;
    static std::map<std::pair<const void*, int>, unsigned> allowed;  // the interpreter's lock is held
    int device = 0;
    check(cudaGetDevice(&device));
    unsigned& most = allowed[{function, device}];
    if (shared <= most) return;
    if (most == 0) check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    if (shared > 48 * 1024) check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    most = shared;
}

void cuda_launch(const std::string& name, std::array<unsigned, 3> grid, std::array<unsigned, 3> block, unsigned shared, uintptr_t stream,
                 const std::string& arguments) {
    const void* const function = kernel_named(name);
    allow_shared(function, shared);
    std::vector<uint64_t> slots((arguments.size() + 7) / 8);
    memcpy(slots.data(), arguments.data(), arguments.size());
    std::vector<void*> pointers;
    for (uint64_t& slot : slots) pointers.push_back(&slot);
    check(cudaLaunchKernel(function, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), pointers.data(), shared,
                           pointer<CUstream_st>(stream)));
}

std::vector<std::string> names() {
    std::vector<std::string> result;
    for (const auto& [name, function] : cuda_kernels()) result.push_back(name);
    return result;
}

}  // namespace

void bind_cuda(py::module_& module) {
    module.def("cuda_kernels", &names, "Names of the CUDA kernels compiled in.");
    module.def("cuda_kernel_runs", [](const std::string& name) { return cuda_kernel_runs(name); }, py::arg("name"),
               "Whether the current device runs the code compiled in for this kernel.");
    module.def("cuda_launch", [](const std::string& name, std::array<unsigned, 3> grid, std::array<unsigned, 3> block, unsigned shared,
                                 uintptr_t stream, const py::bytes& arguments) { cuda_launch(name, grid, block, shared, stream, arguments); },
               py::arg("name"), py::arg("grid"), py::arg("block"), py::arg("shared"), py::arg("stream"), py::arg("arguments"),
               "Launch a kernel on a stream of the current device. `arguments`: eight bytes for each argument, its value in the first of them.");
}

}  // namespace dfe
