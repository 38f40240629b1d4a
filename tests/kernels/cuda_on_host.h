// Lets a .cu file of csrc/cuda compile as C++, so that its index and arithmetic code runs under a loop over the grid. No shared memory, no barriers.
#pragma once

#include <cstdint>

#define __global__

struct Dim3 {
    unsigned x, y, z;
};

static Dim3 blockIdx, blockDim, threadIdx;

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, Dim3 grid, unsigned threads, Arguments... arguments) {
    blockDim = {threads, 1, 1};
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
                for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
}
