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

# What XLA asks a GPU for: "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming Guide, and
# the data sheets of the cards.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_optin}
  threads_per_core_limit: {threads}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
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


# Shared memory of a multiprocessor and of one block at most, and threads and lanes of a multiprocessor.
_ARCHITECTURES = {
    (8, 0): {"shared": 164 * 1024, "shared_optin": 163 * 1024, "threads": 2048, "fpus": 64},
    (8, 9): {"shared": 100 * 1024, "shared_optin": 99 * 1024, "threads": 1536, "fpus": 128},
    (9, 0): {"shared": 228 * 1024, "shared_optin": 227 * 1024, "threads": 2048, "fpus": 128},
}


def _gpu(name: str, capability: tuple[int, int], memory: int, bandwidth: float, **numbers: float) -> Target:
    major, minor = capability
    numbers = numbers | _ARCHITECTURES[capability] | {"memory": memory, "bandwidth": int(bandwidth)}
    config = _GPU.format(name=name, major=major, minor=minor, **numbers)
    by_cublas = {"xla_gpu_enable_triton_gemm": False}  # Triton's tile sizes would be guesses
    return Target(memory, "cuda", "1x1x1", {"target_config": config, "topology": "1x1x1"}, by_cublas)


TARGETS = {
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 * GIB, 1.01e12, cache=72 * 2**20, cores=128, clock=2.52),
    "a100": _gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40 * GIB, 1.555e12, cache=40 * 2**20, cores=108, clock=1.41),
    "h100": _gpu("NVIDIA H100 80GB HBM3", (9, 0), 79 * GIB, 3.35e12, cache=50 * 2**20, cores=132, clock=1.98),
    "h200": _gpu("NVIDIA H200", (9, 0), 140 * GIB, 4.8e12, cache=60 * 2**20, cores=132, clock=1.98),
    "v5p": Target(95 * GIB, "tpu", "v5p:2x2x1", {}, {}),
    "v6e": Target(32 * GIB, "tpu", "v6e:2x2", {}, {}),
}
