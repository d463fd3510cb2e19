#include "forward_checks.hpp"

#include <algorithm>
#include <cmath>

#include "error.hpp"

namespace sk {
namespace {

int32_t check_thresholds(const Description& model, const sk_choice& choice, uint32_t index) {
  const uint64_t wanted = choice.kind == SK_CHOICE_CORE ? 0 : 3 * uint64_t{model.layers.size()};
  if (choice.thresholds_count != wanted || (choice.thresholds == nullptr) != (wanted == 0)) {
    return fail(SK_STATUS_BAD_SIZE,
                "sequence %" PRIu32 " has thresholds_count %" PRIu64 "; its kind %" PRIu32
                " needs %" PRIu64 ", null where none",
                index, choice.thresholds_count, choice.kind, wanted);
  }
  for (uint64_t i = 0; i < wanted; ++i) {
    if (!(choice.thresholds[i] >= 0)) {
      return fail(SK_STATUS_BAD_VALUE,
                  "sequence %" PRIu32 " has the threshold %g at %" PRIu64 "; it must be >= 0",
                  index, static_cast<double>(choice.thresholds[i]), i);
    }
  }
  for (const Layer& layer : model.layers) {
    if ((choice.kind == SK_CHOICE_PLANES && layer.planes_factors.empty()) ||
        (choice.kind == SK_CHOICE_GATE && layer.gate_factors.empty())) {
      return fail(SK_STATUS_UNSUPPORTED,
                  "sequence %" PRIu32 " has the choice kind %" PRIu32
                  ", for which the model was given no factors",
                  index, choice.kind);
    }
  }
  return SK_STATUS_OK;
}

int32_t check_choice(const Description& model, const sk_forward_args& args, const sk_choice& choice,
                     uint32_t index) {
  if (const int32_t status = check_struct(&choice, "sk_choice")) return status;
  if (args.prompts != 0) {
    return fail(SK_STATUS_UNSUPPORTED,
                "sequence %" PRIu32 " has a choice; prompts cannot choose their neurons", index);
  }
  const uint64_t corrections = model.corrections.size() / model.layers.size();
  if (choice.kind > SK_CHOICE_GATE || choice.correction > corrections) {
    return fail(SK_STATUS_BAD_VALUE,
                "sequence %" PRIu32 " has the choice kind %" PRIu32 " and correction %" PRIu32
                "; they can be up to %d and %" PRIu64,
                index, choice.kind, choice.correction, SK_CHOICE_GATE, corrections);
  }
  const uint64_t words = choice.core == nullptr ? 0 : uint64_t{model.words} * model.layers.size();
  if (choice.core_count != words) {
    return fail(SK_STATUS_BAD_SIZE,
                "sequence %" PRIu32 " has core_count %" PRIu64 "; it must be %" PRIu64, index,
                choice.core_count, words);
  }
  return check_thresholds(model, choice, index);
}

int32_t check_sequence(const Description& model, const sk_forward_args& args, uint32_t index) {
  const sk_sequence& sequence = args.sequences[index];
  if (const int32_t status = check_struct(&sequence, "sk_sequence")) return status;
  if (sequence.token_ids == nullptr || sequence.block_table == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "sequence %" PRIu32 ": token_ids or block_table is null",
                index);
  }
  if (sequence.num_tokens < 1 || sequence.num_tokens > SK_MAX_TOKENS) {
    return fail(SK_STATUS_BAD_SIZE,
                "sequence %" PRIu32 " has %" PRIu32 " tokens; it can have 1 to %d", index,
                sequence.num_tokens, SK_MAX_TOKENS);
  }
  const uint64_t end = uint64_t{sequence.start} + sequence.num_tokens;
  if (end > SK_MAX_POSITIONS || end > uint64_t{sequence.num_blocks} * SK_BLOCK_SIZE) {
    return fail(SK_STATUS_BAD_SIZE,
                "sequence %" PRIu32 " ends at position %" PRIu64 ", beyond its %" PRIu32
                " KV blocks of %d",
                index, end, sequence.num_blocks, SK_BLOCK_SIZE);
  }
  for (uint32_t i = 0; i < sequence.num_tokens; ++i) {
    if (sequence.token_ids[i] < 0 || static_cast<uint32_t>(sequence.token_ids[i]) >= model.vocab) {
      return fail(SK_STATUS_BAD_VALUE,
                  "sequence %" PRIu32 " has the token id %" PRId32 "; the vocabulary has %" PRIu32,
                  index, sequence.token_ids[i], model.vocab);
    }
  }
  const uint64_t blocks = (end + SK_BLOCK_SIZE - 1) / SK_BLOCK_SIZE;
  for (uint64_t i = 0; i < blocks; ++i) {
    if (sequence.block_table[i] < 0 ||
        static_cast<uint32_t>(sequence.block_table[i]) >= args.kv_num_blocks) {
      return fail(SK_STATUS_BAD_VALUE,
                  "sequence %" PRIu32 " has the KV block %" PRId32 "; there are %" PRIu32, index,
                  sequence.block_table[i], args.kv_num_blocks);
    }
  }
  const uint64_t touched = blocks - sequence.start / SK_BLOCK_SIZE;
  if (sequence.statistics != nullptr ? sequence.statistics_blocks != touched
                                     : sequence.statistics_blocks != 0) {
    return fail(SK_STATUS_BAD_SIZE,
                "sequence %" PRIu32 " has statistics_blocks %" PRIu32 "; its tokens touch %" PRIu64
                " blocks, and without statistics it is 0",
                index, sequence.statistics_blocks, touched);
  }
  if (sequence.score > SK_SCORE_SIGNED_COUNT ||
      (sequence.score != SK_SCORE_NORM &&
       !(sequence.score_share > 0 && sequence.score_share <= 1))) {
    return fail(SK_STATUS_BAD_VALUE,
                "sequence %" PRIu32 " has the score %" PRIu32
                " and score_share %g; a score is 0 to %d, "
                "and the share of a count above 0 and at most 1",
                index, sequence.score, static_cast<double>(sequence.score_share),
                SK_SCORE_SIGNED_COUNT);
  }
  if (sequence.choice == nullptr) return SK_STATUS_OK;
  return check_choice(model, args, *sequence.choice, index);
}

int32_t check_rows(const char* name, const uint32_t* rows, uint32_t count, uint64_t tokens) {
  if (count != 0 && rows == nullptr) return fail(SK_STATUS_NULL_POINTER, "%s is null", name);
  for (uint32_t i = 0; i < count; ++i) {
    if (rows[i] >= tokens) {
      return fail(SK_STATUS_BAD_VALUE, "%s has row %" PRIu32 "; the batch has %" PRIu64 " tokens",
                  name, rows[i], tokens);
    }
  }
  return SK_STATUS_OK;
}

int32_t check_count(const char* name, uint64_t found, uint64_t wanted) {
  if (found == wanted) return SK_STATUS_OK;
  return fail(SK_STATUS_BAD_SIZE, "%s is %" PRIu64 ", it must be %" PRIu64, name, found, wanted);
}

int32_t check_logits_out(const Description& model, const sk_forward_args& args,
                         bool may_leave_logits) {
  if (args.logits != nullptr || !may_leave_logits) {
    return check_count("logits_count", args.logits_count, uint64_t{args.num_outputs} * model.vocab);
  }
  if (args.num_outputs > SK_LEFT_LOGITS) {
    return fail(SK_STATUS_BAD_SIZE,
                "logits is null and num_outputs %" PRIu32 "; logits of %d rows can stay on a GPU",
                args.num_outputs, SK_LEFT_LOGITS);
  }
  return check_count("logits_count", args.logits_count, 0);
}

int32_t check_outputs(const Description& model, const sk_forward_args& args, uint64_t tokens,
                      bool may_leave_logits) {
  if (args.num_outputs > tokens || args.num_hidden > tokens) {
    return fail(SK_STATUS_BAD_SIZE,
                "num_outputs is %" PRIu32 " and num_hidden %" PRIu32 "; the batch has %" PRIu64
                " tokens",
                args.num_outputs, args.num_hidden, tokens);
  }
  if (const int32_t s = check_rows("output_rows", args.output_rows, args.num_outputs, tokens))
    return s;
  if (const int32_t s = check_rows("hidden_rows", args.hidden_rows, args.num_hidden, tokens))
    return s;
  const uint64_t outputs = args.num_outputs,
                 kept = std::min<uint64_t>(SK_NUM_CANDIDATES, model.vocab);
  if (const int32_t s = check_logits_out(model, args, may_leave_logits)) return s;
  if (const int32_t s = check_count("candidates_count", args.candidates_count, outputs * kept))
    return s;
  if (const int32_t s = check_count("hidden_count", args.hidden_count,
                                    uint64_t{args.num_hidden} * model.hidden)) {
    return s;
  }
  if (args.num_hidden != 0 && args.hidden == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "hidden is null");
  }
  if (outputs == 0) return SK_STATUS_OK;
  if ((args.logits == nullptr && !may_leave_logits) || args.candidate_ids == nullptr ||
      args.candidate_logits == nullptr || args.log_normalizers == nullptr ||
      args.log_normalizers_1 == nullptr || args.temperatures == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "temperatures or a result of num_outputs rows is null");
  }
  if (args.needed != nullptr && args.rescored == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "rescored is null, and needed is not");
  }
  for (uint32_t i = 0; args.needed != nullptr && i < args.num_outputs; ++i) {
    if (args.needed[i] > kept) {
      return fail(SK_STATUS_BAD_SIZE,
                  "needed is %" PRIu32 " for row %" PRIu32 "; a row has %" PRIu64 " candidates",
                  args.needed[i], i, kept);
    }
  }
  for (uint32_t i = 0; i < args.num_outputs; ++i) {
    if (!(args.temperatures[i] > 0 && std::isfinite(args.temperatures[i]))) {
      return fail(SK_STATUS_BAD_VALUE, "temperature %g of row %" PRIu32 " must be finite and > 0",
                  static_cast<double>(args.temperatures[i]), i);
    }
  }
  return SK_STATUS_OK;
}

}  // namespace

int32_t check_forward(const Description& model, const sk_forward_args& args,
                      bool may_leave_logits) {
  if (args.sequences == nullptr || args.kv == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "sequences or kv is null");
  }
  if (args.num_sequences < 1 || args.num_sequences > SK_MAX_TOKENS) {
    return fail(SK_STATUS_BAD_SIZE, "num_sequences is %" PRIu32 "; it can be 1 to %d",
                args.num_sequences, SK_MAX_TOKENS);
  }
  if (args.prompts > 1 || args.reserved != 0) {
    return fail(SK_STATUS_BAD_VALUE, "prompts is %" PRIu32 "; it can be 0 or 1, and reserved is 0",
                args.prompts);
  }
  const uint64_t block_bytes = model.kv_bytes;
  if (args.kv_num_blocks < 1 || args.kv_num_blocks > INT32_MAX ||
      args.kv_bytes / block_bytes < args.kv_num_blocks) {
    return fail(SK_STATUS_BAD_SIZE,
                "kv has %" PRIu64 " bytes; %" PRIu32 " blocks of %" PRIu64 " bytes do not fit",
                args.kv_bytes, args.kv_num_blocks, block_bytes);
  }
  if (reinterpret_cast<uintptr_t>(args.kv) % SK_ALIGNMENT != 0) {
    return fail(SK_STATUS_BAD_VALUE, "kv is not aligned to %d bytes", SK_ALIGNMENT);
  }
  uint64_t tokens = 0;
  bool choosing = false;
  for (uint32_t i = 0; i < args.num_sequences; ++i) {
    if (const int32_t status = check_sequence(model, args, i)) return status;
    tokens += args.sequences[i].num_tokens;
    choosing = choosing || args.sequences[i].choice != nullptr;
  }
  if (choosing && tokens > SK_CHOICE_TOKENS) {
    return fail(SK_STATUS_BAD_SIZE,
                "the batch has %" PRIu64
                " tokens; where a sequence chooses neurons it can have 1 to %d",
                tokens, SK_CHOICE_TOKENS);
  }
  if (tokens > SK_MAX_TOKENS) {
    return fail(SK_STATUS_BAD_SIZE, "the batch has %" PRIu64 " tokens; it can have 1 to %d", tokens,
                SK_MAX_TOKENS);
  }
  return check_outputs(model, args, tokens, may_leave_logits);
}

int32_t check_logits(const Description& model, const sk_logits_args& args) {
  if (args.rows < 1 || args.rows > SK_MAX_TOKENS || args.reserved != 0) {
    return fail(SK_STATUS_BAD_SIZE, "rows is %" PRIu32 "; it can be 1 to %d, and reserved is 0",
                args.rows, SK_MAX_TOKENS);
  }
  if (const int32_t s =
          check_count("hidden_count", args.hidden_count, uint64_t{args.rows} * model.hidden))
    return s;
  if (const int32_t s =
          check_count("logits_count", args.logits_count, uint64_t{args.rows} * model.vocab))
    return s;
  if (args.hidden == nullptr || args.logits == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "hidden or logits is null");
  }
  return SK_STATUS_OK;
}

}  // namespace sk
