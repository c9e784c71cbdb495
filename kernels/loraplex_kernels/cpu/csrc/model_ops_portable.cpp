#include <omp.h>

#include "model_ops.h"

#define LORAPLEX_MODEL_OPS kModelOpsPortable
#include "model_ops_body.inc"
