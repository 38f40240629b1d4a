"""Running a loaded model: as a program of fused kernels (`runner`), or as plain torch modules (`modules`), which define
what is correct."""
