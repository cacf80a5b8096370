// Compiler differences, in one place.
#pragma once

#if defined(__CUDACC__)
#define JAX_NA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAX_NA_HOST_DEVICE inline
#endif

// Index checks in kernels, in builds with -DJAX_NA_DEVICE_ASSERTS=ON: the launch fails, and the call raises.
#if defined(JAX_NA_DEVICE_ASSERTS) && defined(__CUDA_ARCH__)
#include <cstdio>
#define JAX_NA_DEVICE_ASSERT(condition)                                    \
  do {                                                                     \
    if (!(condition)) {                                                    \
      printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      __trap();                                                            \
    }                                                                      \
  } while (false)
#else
#define JAX_NA_DEVICE_ASSERT(condition) ((void)0)
#endif
