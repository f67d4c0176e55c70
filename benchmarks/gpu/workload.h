// A step's tables and launch arguments, made without torch and without the executor. All that these benchmarks know of
// the kernels' data is here.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "../../csrc/device/tables.h"
#include "../../csrc/cuda/launchers.h"
#include "timing.h"

namespace fusedopt::cuda::gpu {

void load_statistics();
void load_update();
void load_upload();
void map_chunks(const Place& place, const Tables& tables);
void statistics(const Place& place, const StatisticsArguments& a);
void update(const Place& place, const UpdateArguments& a, const Row& like, bool early);

}  // namespace fusedopt::cuda::gpu

namespace fusedopt::bandwidth {

using namespace fusedopt::device;

// A rule with its settings, those of a usual training.
struct RuleChoice {
  const char* name;
  RuleId rule;
  int states;
  std::vector<double> hyper;
};

inline std::vector<RuleChoice> rule_choices() {
  std::vector<double> adamw(kMaxHyper), sgd(kMaxHyper);
  adamw[Adam::kLr] = 1e-3, adamw[Adam::kBeta1] = 0.9, adamw[Adam::kBeta2] = 0.999, adamw[Adam::kEps] = 1e-8;
  adamw[Adam::kWeightDecay] = 0.01, adamw[Adam::kDecoupled] = 1;
  sgd[Sgd::kLr] = 1e-3, sgd[Sgd::kMomentum] = 0.9, sgd[Sgd::kWeightDecay] = 0.01;
  return {{"adamw", kRuleAdam, 2, adamw}, {"sgd", kRuleSgd, 1, sgd}};
}

struct DTypeChoice {
  const char* name;
  DType param, grad, state;
};

constexpr DTypeChoice kDTypeChoices[] = {
    {"fp32", DType::kFloat32, DType::kFloat32, DType::kFloat32},
    {"bf16", DType::kBFloat16, DType::kBFloat16, DType::kBFloat16},
    {"bf16-grads", DType::kFloat32, DType::kBFloat16, DType::kFloat32},
    {"fp32-states", DType::kBFloat16, DType::kBFloat16, DType::kFloat32},
};

constexpr float kLossScale = 1024;

// Values of about the size `scale`, of either sign and none of them zero; positive ones only where they are squares.
__global__ void fill_kernel(void* column, DType dtype, size_t count, float scale, bool positive) {
  const size_t step = size_t(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += step) {
    unsigned hash = static_cast<unsigned>(i) * 2654435761u;
    hash = (hash ^ hash >> 15) * 2246822519u;
    hash ^= hash >> 13;
    const float sign = positive || hash & 0x10000 ? 1.0f : -1.0f;
    const float value = sign * scale * (0.5f + (hash & 0xffff) / 65536.0f);
    if (dtype == DType::kFloat32) {
      static_cast<float*>(column)[i] = value;
    } else {
      static_cast<uint16_t*>(column)[i] = float_to_bf16(value);
    }
  }
}

// Room for the columns of any dtypes; every workload takes it in turn.
struct Columns {
  explicit Columns(size_t elements)
      : elements(elements), param(4 * elements), grad(4 * elements), state0(4 * elements), state1(4 * elements) {}

  void fill(const DTypeChoice& dtypes) const {
    fill_one(param, dtypes.param, 0.02f, false);
    fill_one(grad, dtypes.grad, kLossScale, false);
    fill_one(state0, dtypes.state, 1e-2f, false);
    fill_one(state1, dtypes.state, 1e-4f, true);
    FUSEDOPT_CHECK_CUDA(cudaDeviceSynchronize());
  }

  void fill_one(const Memory& column, DType dtype, float scale, bool positive) const {
    fill_kernel<<<2048, 256>>>(column.as<void>(), dtype, elements, scale, positive);
    FUSEDOPT_CHECK_CUDA(cudaGetLastError());
  }

  size_t elements;
  Memory param, grad, state0, state1;
};

// Equal tensors that fill the columns, with the tables of one step over them.
class Workload {
 public:
  Workload(const Columns& columns, int tensors, const RuleChoice& rule, const DTypeChoice& dtypes, int64_t chunk,
           cudaStream_t stream)
      : tensors_(tensors),
        rule_(rule),
        dtypes_(dtypes),
        columns_(columns),
        place_{0, stream},
        each_(static_cast<int64_t>(columns.elements / tensors)),
        chunk_count_(static_cast<uint32_t>(tensors) * chunks_of(each_, chunk)),
        groups_(sizeof(GroupRow)),
        rows_(sizeof(Row) * tensors),
        grads_(sizeof(void*) * tensors),
        chunks_(sizeof(ChunkEntry) * chunk_count_),
        scalars_(sizeof(RowScalars) * tensors),
        partials_(sizeof(double) * chunk_count_),
        control_(sizeof(Control)),
        steps_(sizeof(float) * tensors),
        report_(2 * sizeof(float)) {
    upload_tables(chunk);
    make_arguments();
  }

  void statistics() const { cuda::gpu::statistics(place_, statistics_); }

  void update(bool after_statistics, bool reverse, bool early) {
    update_.after_statistics = after_statistics;
    update_.reverse = reverse;
    cuda::gpu::update(place_, update_, like_, early);
  }

  // Exits where the steps so far have not done what steps do: speed says nothing then.
  void check(int steps) const {
    FUSEDOPT_CHECK_CUDA(cudaDeviceSynchronize());
    Control control{};
    std::vector<float> counted(tensors_);
    FUSEDOPT_CHECK_CUDA(cudaMemcpy(&control, control_.as<void>(), sizeof control, cudaMemcpyDeviceToHost));
    FUSEDOPT_CHECK_CUDA(
        cudaMemcpy(counted.data(), steps_.as<void>(), sizeof(float) * tensors_, cudaMemcpyDeviceToHost));
    const bool all =
        std::all_of(counted.begin(), counted.end(), [steps](float count) { return count == float(steps); });
    if (all && !control.skip && control.multiplier > 0) return;
    std::fprintf(stderr, "%s, %s: after %d steps the first parameter has counted %g, skip is %u, the multiplier %g\n",
                 rule_.name, dtypes_.name, steps, counted[0], control.skip, control.multiplier);
    std::exit(1);
  }

  double statistics_bytes() const { return element_size(dtypes_.grad); }
  double update_bytes() const {
    return element_size(dtypes_.grad) + 2.0 * element_size(dtypes_.param) +
           2.0 * rule_.states * element_size(dtypes_.state);
  }
  double elements() const { return static_cast<double>(each_) * tensors_; }

 private:
  void upload_tables(int64_t chunk) {
    GroupRow group{};
    std::copy(rule_.hyper.begin(), rule_.hyper.end(), group.value);
    std::vector<Row> rows(tensors_);
    std::vector<void*> grads(tensors_);
    auto part = [this](const Memory& column, DType dtype, int tensor) {
      return column.as<char>() + tensor * each_ * element_size(dtype);
    };
    for (int i = 0; i < tensors_; ++i) {
      Row row{};
      std::fill_n(row.layout, kColumns, Row::kFlat);
      std::fill_n(row.dtype, kColumns, dtypes_.state);
      row.dtype[kParam] = dtypes_.param, row.dtype[kGrad] = dtypes_.grad;
      row.data[kParam] = part(columns_.param, dtypes_.param, i);
      row.data[kState] = part(columns_.state0, dtypes_.state, i);
      if (rule_.states > 1) row.data[kState + 1] = part(columns_.state1, dtypes_.state, i);
      row.step = steps_.as<float>() + i, row.step_dtype = DType::kFloat32;
      row.numel = each_;
      row.first_chunk = static_cast<uint32_t>(i) * chunks_of(each_, chunk);
      grads[i] = part(columns_.grad, dtypes_.grad, i);
      rows[i] = row;
    }
    like_ = rows[0];
    FUSEDOPT_CHECK_CUDA(cudaMemcpy(groups_.as<void>(), &group, sizeof group, cudaMemcpyHostToDevice));
    FUSEDOPT_CHECK_CUDA(cudaMemcpy(rows_.as<void>(), rows.data(), sizeof(Row) * tensors_, cudaMemcpyHostToDevice));
    FUSEDOPT_CHECK_CUDA(cudaMemcpy(grads_.as<void>(), grads.data(), sizeof(void*) * tensors_, cudaMemcpyHostToDevice));
    FUSEDOPT_CHECK_CUDA(cudaMemset(control_.as<void>(), 0, sizeof(Control)));
    FUSEDOPT_CHECK_CUDA(cudaMemset(steps_.as<void>(), 0, sizeof(float) * tensors_));
    tables_ = {};
    tables_.groups = groups_.as<GroupRow>();
    tables_.rows = rows_.as<Row>();
    tables_.grads = grads_.as<void*>();
    tables_.chunks = chunks_.as<ChunkEntry>();
    tables_.scalars = scalars_.as<RowScalars>();
    tables_.partials = partials_.as<double>();
    tables_.control = control_.as<Control>();
    tables_.row_count = static_cast<uint32_t>(tensors_), tables_.chunk_count = chunk_count_;
    tables_.chunk_elements = chunk;
    FUSEDOPT_CHECK_CUDA(cudaDeviceSynchronize());
    cuda::gpu::map_chunks(place_, tables_);
  }

  // As of a step with AMP that clips to the 2-norm; the update's scale is that of a bare step.
  void make_arguments() {
    statistics_.tables = tables_;
    statistics_.norm = {NormKind::kTwo, 2};
    statistics_.rule = rule_.rule;
    statistics_.check = true;
    statistics_.scale.value = kLossScale;
    statistics_.max_norm.value = 0.5 * std::sqrt(elements());
    statistics_.report.scalars = report_.as<float>();
    update_.tables = tables_;
    update_.rule = rule_.rule;
    update_.clip_value = std::numeric_limits<double>::infinity();
    update_.scale.value = kLossScale;
    update_.chunk_count = update_.tickets = chunk_count_;
  }

  const int tensors_;
  const RuleChoice& rule_;
  const DTypeChoice& dtypes_;
  const Columns& columns_;
  const Place place_;
  const int64_t each_;
  const uint32_t chunk_count_;
  Memory groups_, rows_, grads_, chunks_, scalars_, partials_, control_, steps_, report_;
  Tables tables_{};
  Row like_{};
  StatisticsArguments statistics_{};
  UpdateArguments update_{};
};

}  // namespace fusedopt::bandwidth
