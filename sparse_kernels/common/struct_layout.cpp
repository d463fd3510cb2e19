// The layout that the compiler gave the structs of the ABI, for checking the ctypes mirror.
#include <cstddef>
#include <cstring>

#include "error.hpp"

namespace {

struct Layout {
  const char* struct_name;
  const char* field_name;  // null: the struct itself
  uint64_t offset;
  uint64_t bytes;
};

#define STRUCT(type) {#type, nullptr, 0, sizeof(type)},
#define FIELD(type, field) {#type, #field, offsetof(type, field), sizeof(type::field)},
constexpr Layout kLayouts[] = {
#include "struct_layout.inc"
};
#undef STRUCT
#undef FIELD

bool same_name(const char* a, const char* b) {
  return a == nullptr || b == nullptr ? a == b : std::strcmp(a, b) == 0;
}

}  // namespace

int32_t sk_struct_layout(const char* struct_name, const char* field_name, uint64_t* offset,
                         uint64_t* bytes) {
  if (struct_name == nullptr || offset == nullptr || bytes == nullptr) {
    return sk::fail(SK_STATUS_NULL_POINTER, "struct_name, offset or bytes is a null pointer");
  }
  for (const Layout& layout : kLayouts) {
    if (!same_name(layout.struct_name, struct_name)) continue;
    if (!same_name(layout.field_name, field_name)) continue;
    *offset = layout.offset;
    *bytes = layout.bytes;
    return SK_STATUS_OK;
  }
  return sk::fail(SK_STATUS_BAD_VALUE, "this library has no struct '%s' with a field '%s'",
                  struct_name, field_name == nullptr ? "" : field_name);
}
