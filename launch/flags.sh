# shellcheck shell=bash
# Sourced with a chip of tfusion/accelerators.py, or gpu, or cpu: . launch/flags.sh v5p
# Exports what XLA and libtpu are told there. The names are those of libtpu 0.0.42.1 and jaxlib 0.10.2, and a test
# holds them to it. What a user has set already comes after ours, and so overrules it. None of this has been timed
# by us on a TPU; each line says what it is for.

case $1 in
  v4 | v5e | v5p | v6e | tpu7x)
    flags=(
      # With parameters over `fsdp` every layer gathers its weights and scatters their gradients. These let a gather
      # begin early and run beside the matrix products, in several steps, instead of before them.
      --xla_enable_async_all_gather=true
      --xla_tpu_enable_async_collective_fusion=true
      --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
      --xla_tpu_enable_async_collective_fusion_multiple_steps=true
      --xla_tpu_overlap_compute_collective_tc=true
      # Between slices gradients are summed over the data centre's network, far slower than the links of a slice:
      # each is sent as soon as it is there, whatever its size, while the backward pass goes on.
      --xla_tpu_enable_data_parallel_all_reduce_opt=true
      --xla_tpu_data_parallel_opt_different_sized_ops=true
    )
    export LIBTPU_INIT_ARGS="${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
    ;;
  gpu | a100 | h100 | h200)
    flags=(
      # Orders the program so that gathers and sums of `fsdp` run beside the matrix products: as on TPUs, where it is
      # always so.
      --xla_gpu_enable_latency_hiding_scheduler=true
    )
    export XLA_FLAGS="${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
    # The share of a GPU's memory that JAX takes; by itself it takes three quarters. The planner counts on nine
    # tenths (tfusion/accelerators.py).
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.9}"
    ;;
  cpu) ;;
  *)
    echo "error: launch/flags.sh knows v4, v5e, v5p, v6e, tpu7x, gpu and cpu, not '$1'" >&2
    exit 1
    ;;
esac
unset flags
