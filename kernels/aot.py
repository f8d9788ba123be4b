"""The ahead-of-time gate: every kernel compiled for every card, on a machine that has none.

Triton compiles for any target without a GPU. Each op is run on meta tensors, forward and backward, with the shapes and
dtypes that SD1.5, SD2.1 and SDXL train with; the launches that a GPU would see are recorded with the very arguments, and
compiled for sm_75 to sm_120. What the assembler made of them stands in kernels/aot.json: registers a thread, stack bytes
(spilled registers), shared memory, code bytes. A kernel's entry holds as long as its source and Triton's version do.

    python -m safelight.kernels.aot            compile what the table lacks, write it, print what fails the gate

Full shape lists are compiled in the dtype a card trains in (fp16 on sm_75, which has no bf16; bf16 from sm_80 on), a
representative one in the other dtypes.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safelight.kernels.adamw8bit import AdamW8bit
from safelight.kernels.bias_residual import bias_residual
from safelight.kernels.diffusion_loss import LossOptions, diffusion_loss
from safelight.kernels.ema import EMA
from safelight.kernels.geglu import geglu, geglu_bwd_again
from safelight.kernels.group_norm_silu import group_norm_silu, group_norm_silu_again, group_norm_silu_bwd
from safelight.kernels.jit import Launch, record_launches
from safelight.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_again, layer_norm_bwd
from safelight.kernels.noising import noising
from safelight.kernels.remainder import REMAINDERS

TABLE = Path(__file__).with_name("aot.json")
TARGETS = (75, 80, 86, 89, 90, 100, 120)
MAX_SHARED_BYTES = 64 * 1024  # sm_75's limit, the smallest
# double precision, and matrix units: an elementwise kernel or a reduction that uses either is not what it should be
FORBIDDEN = re.compile(r"\b(?:[a-z0-9.]+\.f64|(?:wmma|mma|wgmma|tcgen05)\.[a-z0-9_.]+)")


@dataclass(frozen=True)
class Case:
    """One compilation but for its target. label: what distinguishes it among its kernel's; launch: one that needs it."""

    label: str
    launch: Launch


@dataclass(frozen=True)
class Code:
    """What the assembler made. forbidden: double-precision and matrix instructions found."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    code_bytes: int
    forbidden: tuple[str, ...] = ()

    def failures(self) -> list[str]:
        """Return what fails the gate, in words."""
        found = []
        if self.stack_bytes:
            found.append(f"{self.stack_bytes} bytes of spilled registers a thread")
        if self.shared_bytes > MAX_SHARED_BYTES:
            found.append(f"{self.shared_bytes} bytes of shared memory, limit {MAX_SHARED_BYTES}")
        if self.forbidden:
            found.append(f"instructions that should not be there: {', '.join(self.forbidden)}")
        return found


def _meta(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _both_ways(outputs: Tensor | tuple[Tensor, ...]) -> None:
    """Run an op's backward pass on meta tensors."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def _group_norm(
    channels: int, side: int, batch: int, dtype: torch.dtype, kind: str, order: torch.memory_format
) -> None:
    x = _meta(batch, channels, side, side, dtype=dtype).to(memory_format=order)
    weight, bias = _meta(channels, dtype=dtype), _meta(channels, dtype=dtype)
    addend = _meta(batch, channels, dtype=dtype) if kind == "behind the time embedding" else None
    silu = kind != "of a transformer"
    _both_ways(group_norm_silu(x, weight, bias, 32, silu=silu, addend_NC=addend))
    stats = [torch.empty(batch, 32, device="meta") for _ in range(2)]
    group_norm_silu_again(x, weight, bias, addend, *stats, 32, 1e-5, silu)
    saved, dy = (x, weight, bias, addend, *stats, 32, 1e-5, silu), torch.empty_like(x)
    # the second norm of a residual block and the last of the UNet alone are no fork
    if addend is None:
        group_norm_silu_bwd(dy, *saved, ds=dy)


def _layer_norm(rows: int, features: int, dtype: torch.dtype) -> None:
    x, residual = _meta(1, rows, features, dtype=dtype), _meta(1, rows, features, dtype=dtype)
    weight, bias = _meta(features, dtype=dtype), _meta(features, dtype=dtype)
    _both_ways(add_layer_norm(x, residual, weight, bias))
    _both_ways(layer_norm(x, weight, bias))
    stats = [torch.empty(rows, device="meta") for _ in range(2)]
    layer_norm_again(x, weight, bias, *stats, 1e-5)
    for sum_ds in (False, True):
        layer_norm_bwd(x.detach(), x.detach(), x, weight, bias, *stats, 1e-5, sum_dx=True, sum_ds=sum_ds)


def _geglu(rows: int, features: int, dtype: torch.dtype) -> None:
    x, dy = _meta(1, rows, features, dtype=dtype), _meta(1, rows, features // 2, dtype=dtype, grad=False)
    _both_ways(geglu(x))
    geglu_bwd_again(dy, x.detach(), with_sum=True)


def _bias_residual(channels: int, side: int, dtype: torch.dtype, order: torch.memory_format) -> None:
    x = _meta(1, channels, side, side, dtype=dtype).to(memory_format=order)
    bias = _meta(channels, dtype=dtype)
    for residual, residual_bias in ((x, bias), (x, None), (None, None)):
        for scale in (1.0, 0.5):
            _both_ways(bias_residual(x, bias, residual, scale, residual_bias))
    tokens = _meta(1, side * side, channels, dtype=dtype)
    _both_ways(bias_residual(tokens, bias, tokens))


def _steps_ends(side: int, dtype: torch.dtype, every: bool) -> None:
    """What stands at both ends of a step: noising, loss, optimizer, EMA."""
    alphas, words = torch.empty(1000, device="meta"), torch.empty(1, 5, dtype=torch.int64, device="meta")
    mean = torch.empty(1, 4, side, side, device="meta")
    for kind in ("epsilon", "v_prediction", "sample") if every else ("epsilon",):
        for logvar, offset in ((mean, 0.0), (None, 0.1)):
            noised = noising(
                mean, logvar, words, alphas, prediction_type=kind, scaling_factor=0.18215, offset_noise=offset, dtype=dtype,
                memory_format=torch.channels_last,
            )  # fmt: skip
        predicted = noised.noisy_BCHW.detach().requires_grad_()
        mask = torch.empty(1, 1, side, side, device="meta")
        for weighting in ("none", "min_snr", "debiased", "p2") if every else ("min_snr",):
            options = LossOptions("huber" if weighting == "p2" else "mse", weighting=weighting, prediction_type=kind)
            losses = diffusion_loss(
                predicted, noised.target_BCHW, noised.timesteps_B, alphas, options,
                mask_B1HW=mask if weighting == "debiased" else None,
            )  # fmt: skip
            losses.total.backward()
    weights = [torch.empty(320, 320, device="meta"), torch.empty(320, device="meta")]
    for memory in ("fp32",) if dtype == torch.float32 else REMAINDERS:
        gradients = [torch.empty_like(w, dtype=dtype) for w in weights]
        AdamW8bit([w.to(dtype) for w in weights], memory=memory).step(gradients, 1e-6)
    followed = [w.to(dtype) for w in weights]
    EMA(weights, followed).update(torch.empty((), device="meta"))
    for beside in () if dtype == torch.float32 else (torch.int16, torch.int8):
        EMA(weights, followed, [w.to(beside) for w in weights]).update(torch.empty((), device="meta"))


CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
# channels and side of the residual blocks' first norms, of the ones behind the time embedding, of the transformers'
FIRST = (
    (320, 64), (640, 64), (960, 64), (320, 32), (640, 32), (1280, 32), (1920, 32), (640, 16), (1280, 16), (1920, 16),
    (2560, 16), (2560, 8),
)  # fmt: skip
OUTER = ((320, 64), (640, 32), (1280, 16), (1280, 8))


def representative(dtype: torch.dtype) -> None:
    """Run every op once or twice on meta tensors: each kernel, few shapes."""
    _group_norm(320, 64, 1, dtype, "behind the time embedding", CHANNELS_LAST)
    # 9 x 9 pixels: NCHW rows that no vector load fits, a group in one program
    _group_norm(1280, 9, 1, dtype, "of a transformer", NCHW)
    _layer_norm(4096, 320, dtype)
    _geglu(4096, 2560, dtype)
    _bias_residual(320, 64, dtype, CHANNELS_LAST)
    _steps_ends(64, dtype, every=False)


def full(dtype: torch.dtype) -> None:
    """Run every op on meta tensors with the shapes of SD1.5, SD2.1 and SDXL."""
    representative(dtype)
    for batch in (1, 16):
        for channels, side in FIRST:
            _group_norm(channels, side, batch, dtype, "first", CHANNELS_LAST)
        for channels, side in OUTER:
            _group_norm(channels, side, batch, dtype, "behind the time embedding", CHANNELS_LAST)
            _group_norm(channels, side, batch, dtype, "of a transformer", CHANNELS_LAST)
    for channels, side in OUTER:
        _layer_norm(side * side, channels, dtype)
        _geglu(side * side, 8 * channels, dtype)
        _bias_residual(channels, side, dtype, CHANNELS_LAST)
    _steps_ends(64, dtype, every=True)


def _specialization(launch: Launch) -> tuple[dict[str, str], dict[tuple, object], dict[tuple, list]]:
    """Return the (signature, constants, attributes) that Triton compiles a launch under."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    function = launch.kernel.compiled
    bind = create_function_from_signature(function.signature, function.params, CUDABackend)
    _, found, _ = bind(**launch.arguments)
    signature = {name: kind for name, (kind, _) in zip(function.arg_names, found, strict=True)}
    constants = {
        (i,): launch.arguments[name] for i, name in enumerate(function.arg_names) if signature[name] == "constexpr"
    }
    attributes = {
        (i,): CUDABackend.parse_attr(key)
        for i, (kind, key) in enumerate(found)
        if kind != "constexpr" and isinstance(key, str)
    }
    return signature, constants, attributes


def cases_of(workload: Callable[[torch.dtype], None], dtype: torch.dtype) -> list[Case]:
    """Return the distinct compilations a workload needs, in the order it first needs them."""
    with record_launches() as launches:
        workload(dtype)
    found: dict[str, Case] = {}
    for launch in launches:
        signature, constants, attributes = _specialization(launch)
        parts = []
        for i, (name, kind) in enumerate(signature.items()):
            if kind == "constexpr":
                parts.append(f"{name}={constants[(i,)]}")
            else:
                parts.append(kind + ("/16" if attributes.get((i,)) else ""))
        options = [f"{name}={value}" for name, value in sorted(launch.options.items())]
        label = f"{name_of(launch)}({', '.join(parts + options)})"
        found.setdefault(label, Case(label, launch))
    return list(found.values())


def name_of(launch: Launch) -> str:
    """Return the kernel's file and name."""
    return f"{launch.kernel.function.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"


def wanted() -> dict[int, dict[str, Case]]:
    """Return the cases of each target, by label."""
    halves, brains, floats = torch.float16, torch.bfloat16, torch.float32
    lists = {
        (workload, dtype): cases_of(workload, dtype)
        for workload, dtype in (
            (full, halves), (full, brains), (representative, halves), (representative, floats)
        )
    }  # fmt: skip
    chosen = {}
    for target in TARGETS:
        parts = [(full, halves)] if target == 75 else [(full, brains), (representative, halves)]
        chosen[target] = {case.label: case for part in (*parts, (representative, floats)) for case in lists[part]}
    return chosen


def _text_bytes(cubin: bytes) -> int:
    """Return the size of an ELF file's .text sections."""
    offset, size, count, names_index = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    names = sections[names_index][4]

    def name(section: tuple) -> bytes:
        start = names + section[0]
        return cubin[start : cubin.index(b"\0", start)]

    return sum(section[5] for section in sections if name(section).startswith(b".text"))


def compile_case(case: Case, target: int):
    """Return Triton's compiled kernel of one case for one target. Triton's own errors pass through."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.launch.kernel.compiled, *_specialization(case.launch))
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(case.launch.options))


def read_code(compiled) -> Code:
    """Return what the assembler made of a compiled kernel."""
    from triton import knobs

    cubin = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Code(
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        # what a launch asks for beside what the code declares
        numbers["SHARED"] + compiled.metadata.shared,
        _text_bytes(cubin),
        tuple(sorted(set(FORBIDDEN.findall(compiled.asm["ptx"])))),
    )


def source_hash(launch: Launch) -> str:
    """Return the hash a kernel's table entry holds under."""
    return hashlib.sha256(launch.kernel.source().encode()).hexdigest()[:16]


def read_table() -> dict:
    """Return the committed table, or an empty one of this Triton version where it was made with another."""
    import triton

    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    if table.get("triton") != triton.__version__:
        return {"triton": triton.__version__, "kernels": {}}
    return table


def entry_of(table: dict, case: Case, target: int) -> Code | None:
    """Return what the table holds of a case on a target, None where it lacks it."""
    kernel = table["kernels"].get(name_of(case.launch))
    if kernel is None or kernel["source"] != source_hash(case.launch):
        return None
    numbers = kernel["cases"].get(case.label, {}).get(str(target))
    return None if numbers is None else Code(*numbers)


def lacking(table: dict) -> list[tuple[int, Case]]:
    """Return the (target, case) pairs that the table lacks."""
    return [
        (target, case)
        for target, cases in wanted().items()
        for case in cases.values()
        if entry_of(table, case, target) is None
    ]


def _add(table: dict, case: Case, target: int, code: Code) -> None:
    fresh = {"source": source_hash(case.launch), "cases": {}}
    kernel = table["kernels"].setdefault(name_of(case.launch), fresh)
    if kernel["source"] != fresh["source"]:
        kernel.update(fresh)
    numbers = [code.registers, code.stack_bytes, code.shared_bytes, code.code_bytes]
    kernel["cases"].setdefault(case.label, {})[str(target)] = numbers


def write_table(table: dict, keep: Iterable[str]) -> None:
    """Write the table without the cases that nothing needs any more: one line a case."""
    keep = set(keep)
    lines = []
    for name, kernel in sorted(table["kernels"].items()):
        cases = {label: kernel["cases"][label] for label in sorted(kernel["cases"]) if label in keep}
        if not cases:
            continue
        rows = ",\n".join(f"   {json.dumps(label)}: {json.dumps(targets)}" for label, targets in cases.items())
        lines.append(f' {json.dumps(name)}: {{"source": {json.dumps(kernel["source"])}, "cases": {{\n{rows}}}}}')
    note = '"columns": ["registers", "stack bytes", "shared bytes", "code bytes"]'
    text = f'{{"triton": {json.dumps(table["triton"])}, {note}, "kernels": {{\n' + ",\n".join(lines) + "\n}}\n"
    TABLE.write_text(text, encoding="utf-8")


def one_of_each(dtype: torch.dtype = torch.float16) -> list[Case]:
    """Return one representative case of every kernel."""
    return list({name_of(case.launch): case for case in reversed(cases_of(representative, dtype))}.values())


def update() -> tuple[dict, list[str]]:
    """Compile what the table lacks and write it; return (the table, what fails the gate, a line each)."""
    table = read_table()
    missing = lacking(table)
    failed = []
    for number, (target, case) in enumerate(missing, start=1):
        code = read_code(compile_case(case, target))
        if code.failures():
            failed += [f"sm_{target} {case.label}: {why}" for why in code.failures()]
        else:
            _add(table, case, target, code)
        print(f"\r{number} of {len(missing)} compiled, {len(failed)} failed", end="", file=sys.stderr, flush=True)
    if missing:
        print(file=sys.stderr)
    write_table(table, (label for cases in wanted().values() for label in cases))
    return table, failed


def main() -> int:
    """Bring the table up to date; return 1 where something fails the gate."""
    _, failed = update()
    print("\n".join(failed) or f"{TABLE.name} is complete: {sum(map(len, wanted().values()))} compilations")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
