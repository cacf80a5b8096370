// Compiler differences, in one place.
#pragma once

#if defined(__CUDACC__)
#define JAX_NA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAX_NA_HOST_DEVICE inline
#endif
