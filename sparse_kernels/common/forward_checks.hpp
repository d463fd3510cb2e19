// What comes in with sk_forward and sk_logits is checked, size by size, before anything is
// computed.
#pragma once

#include "description.hpp"

namespace sk {

// `may_leave_logits`: they can stay where they are computed.
int32_t check_forward(const Description& model, const sk_forward_args& args,
                      bool may_leave_logits = false);
int32_t check_logits(const Description& model, const sk_logits_args& args);

}  // namespace sk
