// How many CTAs share the query tiles of a Hopper forward kernel.
#pragma once

#include <cstdint>

#include "../common/problem.h"
#include "plan_sm90.h"

namespace jax_na::hopper {

// CTAs that finish first, of at most num_sms. CTA c takes items c, c + CTAs, ... (item_place), and where the number of
// tiles has a divisor in common with that of the CTAs, it comes to the same few places in every head: some CTAs to the
// middle of the axes alone, where most keys are seen. A CTA less is then the better schedule.
int32_t balanced_ctas(const Problem& problem, const ForwardPlan& plan, int32_t num_sms);

}  // namespace jax_na::hopper
