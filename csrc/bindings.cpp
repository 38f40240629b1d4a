// The Python module dfengine._native: CPU kernels over raw pointers, and the CUDA kernels where nvcc was found (csrc/cuda/registry.h). The
// launchers in kernels/ check shapes, strides and types; nothing is copied and the interpreter lock is released while a kernel runs.
#include <exception>
#include <map>

#include "bindings/call.h"
#include "bindings/common.h"
#include "cpu/product.h"
#include "sources.h"  // written by CMake

namespace dfe {

// ops.inc, written by CMake, names the ops: DFE_OP(ingest) ...
#define DFE_OP(NAME) void bind_##NAME(py::module_&);
#include "ops.inc"
#undef DFE_OP
#if defined(DFE_CUDA)
void bind_cuda(py::module_&);
#endif

namespace {

std::map<std::string, bool> find_levels() {
    std::map<std::string, bool> levels{{"base", true}};
#if defined(DFE_X86_LEVELS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    levels["avx2"] = avx2;
    levels["avx512"] = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vl");
#endif
#if defined(DFE_NARROW_PRODUCTS)
    levels["avx512_bf16"] = levels["avx512"] && pairs_supported();
#endif
    return levels;
}

const std::map<std::string, bool>& cpu_levels() {
    static const std::map<std::string, bool> found = find_levels();
    return found;
}

// `work` runs with the interpreter lock; what it raises is raised when the helpers are gone.
void run_with_helpers(int threads, const py::function& work) {
    std::exception_ptr raised;
    {
        const Unlocked unlocked;
        with_helpers(threads, [&] {
            or_wait_for_the_end([&] {
                py::gil_scoped_acquire locked;
                try {
                    or_wait_for_the_end(work);
                } catch (...) {
                    raised = std::current_exception();
                }
            });
        });
    }
    if (raised) std::rethrow_exception(raised);
}

}  // namespace

Level level_named(const std::string& name) {
    const auto& levels = cpu_levels();
    for (const auto& [level, candidate] :
         {std::pair{Level::avx512_bf16, "avx512_bf16"}, {Level::avx512, "avx512"}, {Level::avx2, "avx2"}, {Level::base, "base"}}) {
        const auto found = levels.find(candidate);
        if (found != levels.end() && found->second && (name.empty() || name == candidate)) return level;
    }
    throw std::invalid_argument("this processor does not run the level '" + name + "'");
}

}  // namespace dfe

PYBIND11_MODULE(_native, module) {
    module.doc() = "Kernels of dfengine";
    dfe::cpu_levels();  // found now: a fork during the first call would leave the child waiting for it
    module.attr("compiler") = DFE_COMPILER;
    module.attr("sources") = DFE_SOURCES;
    module.def("cpu_levels", &dfe::cpu_levels, "Instruction-set levels compiled in, and whether this processor runs them; the last usable one is taken.");
    py::class_<dfe::Call, std::shared_ptr<dfe::Call>>(module, "Call", "A call of an op over raw pointers, to be run any number of times.")
        .def("run", &dfe::Call::run, py::arg("threads"), py::call_guard<dfe::Unlocked>());
    py::class_<dfe::Calls, dfe::Call, std::shared_ptr<dfe::Calls>>(module, "Calls", "Calls that follow each other.")
        .def(py::init<std::vector<std::shared_ptr<const dfe::Call>>>(), py::arg("calls"));
    module.def("with_helpers", &dfe::run_with_helpers, py::arg("threads"), py::arg("work"),
               "Calls work() with threads standing by for the ops that it runs; torch's own operations would share the processors with them.");
#define DFE_OP(NAME) dfe::bind_##NAME(module);
#include "ops.inc"
#undef DFE_OP
#if defined(DFE_CUDA)
    dfe::bind_cuda(module);
#endif
}
