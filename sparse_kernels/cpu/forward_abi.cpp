// sk_forward and sk_logits.
#include "forward.hpp"
#include "forward_checks.hpp"
#include "head.hpp"
#include "registry.hpp"

int32_t sk_forward(uint64_t handle, const sk_forward_args* args) {
  if (const int32_t status = sk::check_struct(args, "sk_forward_args")) return status;
  return sk::Registry<sk::Model>::get().call(
      handle, [&](const sk::Model& model) { return sk::check_forward(model, *args); },
      [&](sk::Model& model) -> int32_t {
        sk::Forward(model, *args).run();
        return SK_STATUS_OK;
      });
}

int32_t sk_logits(uint64_t handle, const sk_logits_args* args) {
  if (const int32_t status = sk::check_struct(args, "sk_logits_args")) return status;
  return sk::Registry<sk::Model>::get().call(
      handle, [&](const sk::Model& model) { return sk::check_logits(model, *args); },
      [&](sk::Model& model) -> int32_t {
        sk::run_head(model, *args);
        return SK_STATUS_OK;
      });
}
