"""CUDA sources and what else the tests of the NVRTC runtime share."""

from __future__ import annotations

from pathlib import Path

import pytest

from turboquant_vllm.cuda import nvrtc, runtime

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

SOURCE = r"""
#ifndef SCALE
#define SCALE 1
#endif
extern "C" __global__ void vector_add(const float* a, const float* b, float* c, long long n, int bias, float s) {
  __shared__ float tile[64];
  extern __shared__ float dynamic[];
  if (threadIdx.x < 64) tile[threadIdx.x] = s;
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (n < 0) c[0] = dynamic[bias];
  if (i < n) c[i] = a[i] + SCALE * b[i] * tile[i & 63] + bias;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
struct Params { const float* a; const float* b; float* c; long long n; int bias; float s; };
extern "C" __global__ void vector_add_struct(const __grid_constant__ Params p) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < p.n) p.c[i] = p.a[i] + p.b[i] * p.s + p.bias;
}
template <int N> __global__ void fill(float* x) { x[threadIdx.x] = N; }
extern "C" __global__ void crowded(float* x) {
  float v[48];
  #pragma unroll
  for (int i = 0; i < 48; ++i) v[i] = ((volatile float*)x)[i * 32 + threadIdx.x];
  #pragma unroll
  for (int i = 0; i < 48; ++i) ((volatile float*)x)[i * 32 + threadIdx.x] = v[47 - i] + v[i];
}
"""
PARAMS = "PPPqif"
VERSIONS = ("nvrtc 1.0", "core 1.0")


def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty disk cache; the memory cache is empty too."""
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows."""
    monkeypatch.setattr(nvrtc, "_compiled", {})
    monkeypatch.setattr(runtime, "_kernels", {})
    monkeypatch.setattr(nvrtc, "_warned", set())
