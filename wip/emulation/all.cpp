#include "cuda/sm90/sparse_fwd_64.cu"
#include "cuda/sm90/sparse_fwd_128.cu"
#include "cuda/sm90/sparse_fwd_linear_64.cu"
#include "cuda/sm90/sparse_fwd_linear_128.cu"
