// sk_forward and sk_logits.
#include "forward.hpp"
#include "forward_checks.hpp"
#include "guard.hpp"
#include "head.hpp"

namespace sk {
namespace {

// check(model), then compute(model) when it is this call's turn.
template <typename Check, typename Compute>
int32_t call(uint64_t handle, Check&& check, Compute&& compute) {
  return guarded([&]() -> int32_t {
    std::shared_ptr<Model> model;
    if (const int32_t status = find_model(handle, &model)) return status;
    if (const int32_t status = check(*model)) return status;
    const std::lock_guard<std::mutex> one_at_a_time(model->mutex);
    if (model->ended) return no_such_model(handle);
    compute(*model);
    return SK_STATUS_OK;
  });
}

}  // namespace
}  // namespace sk

int32_t sk_forward(uint64_t handle, const sk_forward_args* args) {
  if (const int32_t status = sk::check_struct(args, "sk_forward_args")) return status;
  return sk::call(
      handle, [&](const sk::Model& model) { return sk::check_forward(model, *args); },
      [&](sk::Model& model) { sk::Forward(model, *args).run(); });
}

int32_t sk_logits(uint64_t handle, const sk_logits_args* args) {
  if (const int32_t status = sk::check_struct(args, "sk_logits_args")) return status;
  return sk::call(
      handle, [&](const sk::Model& model) { return sk::check_logits(model, *args); },
      [&](sk::Model& model) { sk::run_head(model, *args); });
}
