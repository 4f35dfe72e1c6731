"""Compile every kernel for GPUs that are not there, and show what each asks of the chip.

    python -m kernels.cross_compile [--targets cuda:90 hip:gfx942] [--json]

The public functions run forward, backward and jvp on tensors without storage, at the models' shapes; each launch is
compiled exactly as it would be on the target, and none is started. So what is compiled is what runs, configuration by
configuration. Registers and spills are read from the binary (NVIDIA) or from the assembly's own notes (AMD).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import unittest.mock
from pathlib import Path

import torch

from . import attention, backend, gather_patches, patch_loss, scatter_tokens, select_patches

# Bytes of shared memory a program; of sm_80, those of sm_86, sm_89 and sm_120, which are programmed alike and have less.
TARGETS = {"cuda:80": 101_376, "cuda:90": 232_448, "cuda:100": 232_448, "hip:gfx942": 65_536}


class Absent:
    """What Triton asks of a driver in order to compile, and no device."""

    def __init__(self, target, index):
        self.get_current_target, self.get_current_device = (lambda: target), (lambda: index)  # it caches by device

    def get_current_stream(self, device):
        return 0


def model_calls():
    """Run the five operations and their derivatives at the models' shapes, on tensors without storage."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    def derive(function, *inputs):
        function(*inputs).sum().backward()
        torch.func.jvp(function, tuple(x.detach() for x in inputs), tuple(x.detach() for x in inputs))

    bf16, fp32, B = torch.bfloat16, torch.float32, 128
    for patch, side, K, dtypes in ((2, 32, 64, (bf16, fp32)), (16, 224, 49, (bf16,))):  # ViT-B/2 on CIFAR, ViT-B/16
        L = (side // patch) ** 2
        keep, restore = (empty(B, n, dtype=torch.int64) for n in (K, L))
        images, mask = empty(B, 3, side, side), empty(B, L)
        gather_patches(images.to(torch.uint8), keep, patch)
        derive(lambda x: gather_patches(x, keep, patch), images)
        derive(lambda x: gather_patches(x, None, patch), images)
        select_patches(empty(B, L), K)
        for dtype in dtypes:
            tokens, mask_token, pos = empty(B, 1 + K, 512, dtype=dtype), empty(1, 1, 512), empty(1, 1 + L, 512)
            derive(lambda *x: scatter_tokens(*x, restore), tokens, mask_token, pos)
            derive(lambda x: patch_loss(x, images, mask), empty(B, L, 3 * patch**2, dtype=dtype))
    encoder, decoder = (64, (17, 50, 65, 197, 257)), (32, (197, 257))  # head dim, lengths: kept patches or all, + class
    small = (16, (33, 65))  # the default model, on the built-in images
    for dtype, (d, lengths) in ((bf16, encoder), (fp32, encoder), (bf16, decoder), (bf16, small), (fp32, small)):
        for N in lengths:
            derive(attention, empty(B, N, 3, 12, d, dtype=dtype))
    for d in (80, 128):  # wide heads: ViT-H's, and the widest; every longer row runs the same binary
        for N in (197, 257, 1025):
            derive(attention, empty(B, N, 3, 12, d, dtype=torch.float16))
    attention(empty(B, 197, 3, 12, 128))


def resources(compiled, target):
    """Registers a thread, and bytes a thread spilled to memory (NVIDIA: its whole stack, of which spills are all)."""
    if target.startswith("hip"):
        notes = compiled.asm["amdgcn"]
        count, spilled = (int(re.search(rf"\.vgpr_{what}: +(\d+)", notes)[1]) for what in ("count", "spill_count"))
        return count, 4 * spilled
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.check_output([cuobjdump, "--dump-resource-usage", file.name], text=True)
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def compile_all(targets=TARGETS, calls=model_calls):
    """One row (a dict) for each target, kernel and configuration in use; raises where a kernel does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    rows, run = {}, triton.JITFunction.run

    def record(kernel, *arguments, grid, warmup, **configuration):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **configuration)
        if compiled.hash not in rows:
            registers, spills = resources(compiled, target)
            dtypes = [str(x.dtype).removeprefix("torch.") for x in arguments if torch.is_tensor(x)]
            rows[compiled.hash] = {
                "target": target,
                "kernel": kernel.__name__,
                "dtypes": dtypes,
                "configuration": configuration,
                "registers": registers,
                "spills": spills,
                "shared": compiled.metadata.shared,
                "warps": compiled.metadata.num_warps,
                "wgmma": "wgmma" in compiled.asm.get("ptx", ""),
            }

    attention, patch = sys.modules["kernels.attention"], unittest.mock.patch.object
    with patch(triton.JITFunction, "run", record), patch(backend, "DEVICES", {"meta"}), backend.use("triton"):
        for target in targets:
            name, arch = target.split(":")
            chip = GPUTarget(name, int(arch) if name == "cuda" else arch, 64 if name == "hip" else 32)
            triton.runtime.driver.set_active(Absent(chip, list(TARGETS).index(target)))
            with patch(attention, "architecture", lambda device: target):
                calls()
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    arguments = parser.parse_args()
    rows = compile_all(arguments.targets)
    if arguments.json:
        return print(json.dumps(rows))
    print(f"{'target':12}{'kernel':30}{'regs':>5}{'spill':>6}{'shared':>8}{'warps':>6}  configuration")
    for row in rows:
        shape = " ".join(f"{k}={v}" for k, v in row["configuration"].items() if k != "num_warps")
        numbers = f"{row['registers']:5}{row['spills']:6}{row['shared']:8}{row['warps']:6}"
        print(f"{row['target']:12}{row['kernel']:30}{numbers}  {row['dtypes'][0]} {shape}")


if __name__ == "__main__":
    main()
