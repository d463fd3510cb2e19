// The models of a library, by their handles, and whose turn it is. A Model has a `mutex`, held by
// the call that computes, a flag `ended` under it, the `process` that made it, and kStaysBehind,
// which says what of it a forked process lacks.
#pragma once

#include <unistd.h>

#include <cinttypes>
#include <map>
#include <memory>
#include <mutex>

#include "guard.hpp"

namespace sk {

inline int32_t no_such_model(uint64_t handle) {
  return fail(SK_STATUS_BAD_VALUE, "there is no model %" PRIu64, handle);
}

template <typename Model>
class Registry {
 public:
  // Never destroyed: at exit Python may still hold models, and a GPU's driver may be gone.
  static Registry& get() {
    static auto* registry = new Registry();
    return *registry;
  }

  // -> its handle.
  uint64_t add(std::shared_ptr<Model> model) {
    const std::lock_guard<std::mutex> lock(mutex_);
    models_[++last_handle_] = std::move(model);
    return last_handle_;
  }

  // check(model), then compute(model) when it is this call's turn.
  template <typename Check, typename Compute>
  int32_t call(uint64_t handle, Check&& check, Compute&& compute) {
    return guarded([&]() -> int32_t {
      std::shared_ptr<Model> model;
      SK_TRY(find(handle, &model));
      SK_TRY(check(*model));
      const std::lock_guard<std::mutex> one_at_a_time(model->mutex);
      if (model->ended) return no_such_model(handle);
      return compute(*model);
    });
  }

  int32_t destroy(uint64_t handle) {
    return guarded([&]() -> int32_t {
      std::shared_ptr<Model> model;
      SK_TRY(find(handle, &model));
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        models_.erase(handle);
      }
      // Calls that still wait for their turn find it ended: what it was made of is the caller's
      // again.
      const std::lock_guard<std::mutex> idle(model->mutex);
      model->ended = true;
      return SK_STATUS_OK;
    });
  }

 private:
  // SK_STATUS_OK, or the failure, noted: no such model, or one of another process.
  int32_t find(uint64_t handle, std::shared_ptr<Model>* model) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = models_.find(handle);
    if (found == models_.end()) return no_such_model(handle);
    if (found->second->process != getpid()) {
      return fail(SK_STATUS_UNSUPPORTED, "model %" PRIu64 " belongs to process %ld; %s in a fork",
                  handle, static_cast<long>(found->second->process), Model::kStaysBehind);
    }
    *model = found->second;
    return SK_STATUS_OK;
  }

  std::mutex mutex_;
  std::map<uint64_t, std::shared_ptr<Model>> models_;
  uint64_t last_handle_ = 0;
};

}  // namespace sk
