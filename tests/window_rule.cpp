// The window rule of cuda/common/window.h behind a C interface, for tests/test_window_rule.py.
#include "window.h"

extern "C" {

int32_t group_length(int32_t length, int32_t dilation, int32_t group) {
  return jax_na::group_length(length, dilation, group);
}

// bounds: [length, 4] = begin and end of the keys of query i, begin and end of the queries of key i.
void bounds(int32_t length, int32_t window, int32_t stride, int32_t causal, int32_t* bounds) {
  for (int32_t i = 0; i < length; ++i) {
    const jax_na::Interval keys = jax_na::keys_of_query(i, length, window, stride, causal != 0);
    const jax_na::Interval queries = jax_na::queries_of_key(i, length, window, stride, causal != 0);
    bounds[4 * i] = keys.begin;
    bounds[4 * i + 1] = keys.end;
    bounds[4 * i + 2] = queries.begin;
    bounds[4 * i + 3] = queries.end;
  }
}

}  // extern "C"
