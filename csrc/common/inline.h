// FASTKD_HD: inlined everywhere, on the host and on the device. On the host this is more than
// speed: the CPU schedules are compiled once per instruction set, and of a function that is
// emitted in several of them the linker keeps any one, perhaps with instructions that this
// processor does not have. What must be emitted lives in the namespace FASTKD_ISA.
#pragma once

#if defined(__CUDACC__)
#define FASTKD_HD __host__ __device__ __forceinline__
#else
#define FASTKD_HD inline __attribute__((always_inline))
#endif

#ifndef FASTKD_ISA
#define FASTKD_ISA baseline
#endif
