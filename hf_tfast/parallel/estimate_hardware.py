"""GPUs, by their makers' data sheets: dense bf16 throughput (without sparsity), memory, and links in one direction.

The figures were compared with pages that quote these sheets (https://glennklockwood.com/garden/processors/h100 and
/A100, and NVIDIA's system description of the H200 for MLPerf Inference 4.1), not with the sheets themselves. Network:
400 Gb/s a GPU with H100 and H200, 200 Gb/s with A100; 25 Gb/s with L4 and all latencies are assumptions.
"""

from dataclasses import dataclass

__all__ = ["HARDWARE", "Hardware"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """flops bf16 a second; memory bytes; bandwidth, inside and between in bytes a second; latencies in seconds."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    inside: float
    between: float
    per_machine: int = 8
    inside_latency: float = 5e-6
    between_latency: float = 2e-5
    fused_norm: bool = True  # is torch's rms_norm one operation? On CPUs it is a chain of them
    reduces_whole: bool = False  # is a reduce-scatter an all-reduce, as gloo's? nccl's is not
    source: str = ""

    def link(self, span: int) -> tuple[float, float]:
        """Bandwidth and latency of a group whose members lie within `span` neighbouring GPUs."""
        if span <= self.per_machine:
            return self.inside, self.inside_latency
        return self.between, self.between_latency


HARDWARE = {
    "h200": Hardware(name="NVIDIA H200 SXM", flops=989e12, memory=141e9, bandwidth=4.8e12, inside=450e9, between=50e9,
                     source="https://www.nvidia.com/en-us/data-center/h200/"),
    "h100": Hardware(name="NVIDIA H100 SXM", flops=989e12, memory=80e9, bandwidth=3.35e12, inside=450e9, between=50e9,
                     source="https://www.nvidia.com/en-us/data-center/h100/"),
    "a100": Hardware(name="NVIDIA A100 SXM 80 GB", flops=312e12, memory=80e9, bandwidth=2.039e12, inside=300e9,
                     between=25e9, source="https://www.nvidia.com/en-us/data-center/a100/"),
    "l4": Hardware(name="NVIDIA L4", flops=121e12, memory=24e9, bandwidth=300e9, inside=32e9, between=3e9,
                   source="https://www.nvidia.com/en-us/data-center/l4/"),
}  # fmt: skip
