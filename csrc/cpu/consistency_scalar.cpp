// Any CPU: short arrays that the compiler turns into whatever vectors the baseline offers.
#include "consistency.h"

namespace cllm {
namespace {

#include "half.h"

#include "vectors_scalar.h"

#include "consistency_body.h"

}  // namespace

const ConsistencyRow kConsistencyRowScalar = &consistency_row;

}  // namespace cllm
