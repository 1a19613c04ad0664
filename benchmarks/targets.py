"""Accelerators that programs can be compiled for without having one: JAX's ahead-of-time compilation.

XLA's compiler for NVIDIA GPUs comes with `pip install "jax[cuda13]"`, that for TPUs with `pip install libtpu`; neither
needs the hardware. What cannot be had without it is the timing of candidates: GPU programs are compiled with matrix
products by cuBLAS, where a GPU would try Triton's kernels as well.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30

# What XLA asks a GPU for. Compute capability 9.0: "Technical Specifications per Compute Capability" in NVIDIA's CUDA
# C++ Programming Guide; bandwidths: the data sheets of the cards.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


@dataclass(frozen=True)
class Target:
    """An accelerator.

    Attributes:
      memory: bytes that programs can use.
      platform: JAX's name of it.
      options: of `get_topology_desc`.
      compiler_options: of XLA.
    """

    memory: int
    platform: str
    topology: str
    options: dict[str, str]
    compiler_options: dict[str, Any]

    def device(self) -> jax.Device:
        """A device to compile for; nothing can be put on it.

        Raises:
          RuntimeError: the compiler for it is not installed.
        """
        try:
            return topologies.get_topology_desc(self.topology, self.platform, **self.options).devices[0]
        except (RuntimeError, NotImplementedError) as error:
            package = "libtpu" if self.platform == "tpu" else '"jax[cuda13]"'
            raise RuntimeError(f"No compiler for {self.platform}: pip install {package}. JAX says: {error}") from error


def _hopper(name: str, memory: int, bandwidth: float, cache: int) -> Target:
    config = _HOPPER.format(name=name, memory=memory, bandwidth=int(bandwidth), cache=cache)
    by_cublas = {"xla_gpu_enable_triton_gemm": False}  # Triton's tile sizes would be guesses
    return Target(memory, "cuda", "1x1x1", {"target_config": config, "topology": "1x1x1"}, by_cublas)


TARGETS = {
    "h100": _hopper("NVIDIA H100 80GB HBM3", 79 * GIB, 3.35e12, 50 * 2**20),
    "h200": _hopper("NVIDIA H200", 140 * GIB, 4.8e12, 60 * 2**20),
    "v5p": Target(95 * GIB, "tpu", "v5p:2x2x1", {}, {}),
    "v6e": Target(32 * GIB, "tpu", "v6e:2x2", {}, {}),
}
