// The kernels, as host code.
#include <map>

#include "../carried.cu"
#include "../statistics.cu"
#include "../update.cu"
#include "../upload.cu"

namespace fusedopt::cuda::emulated {

// Parts of mangled names.
std::string ptx_name(void* kernel) {
  static const std::map<void*, std::string> names = [] {
    std::map<void*, std::string> all = {
        {reinterpret_cast<void*>(&statistics_kernel<NormKind::kNone>), "17statistics_kernelILNS_8NormKindE0E"},
        {reinterpret_cast<void*>(&statistics_kernel<NormKind::kOne>), "17statistics_kernelILNS_8NormKindE1E"},
        {reinterpret_cast<void*>(&statistics_kernel<NormKind::kTwo>), "17statistics_kernelILNS_8NormKindE2E"},
        {reinterpret_cast<void*>(&statistics_kernel<NormKind::kInf>), "17statistics_kernelILNS_8NormKindE3E"},
        {reinterpret_cast<void*>(&statistics_kernel<NormKind::kP>), "17statistics_kernelILNS_8NormKindE4E"},
        {reinterpret_cast<void*>(&conclude_kernel), "15conclude_kernel"},
        {reinterpret_cast<void*>(&map_kernel), "10map_kernel"},
        {reinterpret_cast<void*>(&upload_kernel<kSmallUpload>), "13upload_kernelILm3840E"},
        {reinterpret_cast<void*>(&upload_kernel<kLargeUpload>), "13upload_kernelILm32000E"},
    };
#define FUSEDOPT_NAME_UPDATE(Rule)                                           \
  all[reinterpret_cast<void*>(&update_kernel<Rule>)] =                       \
      "13update_kernelINS_" + std::to_string(sizeof(#Rule) - 1) + #Rule "E"; \
  all[reinterpret_cast<void*>(&carried_kernel<Rule>)] =                      \
      "14carried_kernelINS_" + std::to_string(sizeof(#Rule) - 1) + #Rule "E";
    FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_NAME_UPDATE)
#undef FUSEDOPT_NAME_UPDATE
    return all;
  }();
  const auto found = names.find(kernel);
  if (found == names.end()) throw ptx::Error("a kernel whose name in PTX is not listed in emulator/kernels.cpp");
  return found->second;
}

}  // namespace fusedopt::cuda::emulated

namespace fusedopt::cuda {

const Launcher* emulated_launcher() {
  static const Launcher launcher = {
      emulated::capturing, nullptr,         emulated::upload, emulated::map_chunks, emulated::statistics,
      emulated::conclude,  emulated::update};
  return &launcher;
}

}  // namespace fusedopt::cuda
