# Prints how many kernels the extension holds: a template axis that multiplies them shows here. Each __global__ function has
# one host stub, with one static handle, per instantiation. Usage: cmake -DNM=<nm> "-DOBJECTS=a.o;b.o" -P count_kernels.cmake
execute_process(COMMAND ${NM} --defined-only ${OBJECTS} OUTPUT_VARIABLE symbols ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  message(STATUS "jax_na: kernels not counted (${NM} failed)")
  return()
endif()
string(REGEX MATCHALL "__device_stub__[A-Za-z0-9_]+__handle" kernels "${symbols}")
list(REMOVE_DUPLICATES kernels)
list(LENGTH kernels total)
message(STATUS "jax_na: ${total} kernels")
