"""Times the PyTorch peers on operands and masks that the runner left in a folder.

Run by the runner in a process of its own, so that the two frameworks do not share memory:
`python -m benchmarks.torch_peers FOLDER`. The folder holds request.json (`dtype`, `block_size`,
`rows`, `runs`, `timer`, `operands` and `calls`: a peer and a case each), the operands q, k, v and
perhaps d_out as 16-bit patterns in .npy files, and mask_<case>.npy, a bool array [heads, query
blocks, key blocks]. With d_out a call is forward and backward, and its results are the gradients of
q, k and v; else the output. For each call the sampled rows of its results are written to
rows_<index>.npz. The last line printed is a JSON list with, per call, `runs_ms` and `queued_ms`, or
`failure`.
"""

# torch and flash-attn-4 are nobody's requirement here.
# pyright: reportMissingImports=false

import functools
import json
import pathlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import cutlass.cute as cute
import numpy as np
import torch
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import flash_attn_func

from benchmarks.rounds import Timer, calls_per_queue, heat, queued_rounds

Results = tuple[torch.Tensor, ...]
Call = Callable[[], Results]


@cute.jit
def causal_mask(batch, head, q_index, kv_index, seqlen_info, aux_tensors):
    """FA4's element mask of the diagonal blocks."""
    return kv_index <= q_index


def main(folder: pathlib.Path) -> None:
    """Answers the request in `folder`."""
    request = json.loads((folder / "request.json").read_text())
    dtype = getattr(torch, request["dtype"])
    operands = {name: _load(folder / f"{name}.npy", dtype) for name in request["operands"]}
    rows = torch.tensor(request["rows"], device="cuda")
    answers = []
    for index, (peer, case) in enumerate(request["calls"]):
        try:
            mask = folder / f"mask_{case}.npy"
            call = _CALLS[peer](**operands, mask=mask, block_size=request["block_size"])
            results, answer = time_call(call, timer=request["timer"], runs=request["runs"])
            sampled = [x[0, rows].float().cpu().numpy() for x in results]
            np.savez(folder / f"rows_{index}.npz", *sampled)
        except Exception:  # the peer's own, of any kind: reported, and the other calls go on
            answer = {"failure": traceback.format_exc(limit=-3)}
        answers.append(answer)
    print(json.dumps(answers), flush=True)


def time_call(call: Call, *, timer: Timer, runs: int) -> tuple[Results, dict[str, Any]]:
    """The figures of benchmarks.timing.time_call, taken in the same way."""
    results = call()
    torch.cuda.synchronize()
    call_ms = _queue_ms(call, calls=2)
    calls = calls_per_queue(call_ms)
    queue = functools.partial(_queue_ms, call, calls=calls)
    heat(queue)
    rounds = runs if timer == "queued" else queued_rounds(call_ms)
    queued = [queue() for _ in range(rounds)]
    runs_ms = queued if timer == "queued" else _kernel_ms(call, max(runs, calls))
    return results, {"runs_ms": runs_ms, "queued_ms": statistics.median(queued)}


def _queue_ms(call: Call, *, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / calls


def _kernel_ms(call: Call, runs: int) -> list[float]:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    if not kernels or len(kernels) % runs:
        names = sorted({event.name for event in kernels})
        raise RuntimeError(f"{len(kernels)} kernels in {runs} calls: {names}")
    kernels.sort(key=lambda event: event.time_range.start)
    per_call = len(kernels) // runs
    micros = [event.time_range.elapsed_us() for event in kernels]
    return [sum(micros[i : i + per_call]) / 1e3 for i in range(0, len(micros), per_call)]


def _load(path: pathlib.Path, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.load(path).view(np.int16)).view(dtype).cuda()


def _fa4(*, mask: pathlib.Path, block_size: int, **operands: torch.Tensor) -> Call:
    del mask, block_size  # dense
    return _call(operands, causal=True)


def _fa4_block_sparse(*, mask: pathlib.Path, block_size: int, **operands: torch.Tensor) -> Call:
    keep = torch.from_numpy(np.load(mask)).cuda()
    options: dict[str, Any] = {"block_sparse_tensors": _block_lists(keep, block_size)}
    if "d_out" in operands:
        by_keys = keep.transpose(1, 2).contiguous()
        options["block_sparse_tensors_bwd"] = _block_lists(by_keys, block_size)
    return _call(operands, mask_mod=causal_mask, pack_gqa=False, **options)


def _call(operands: dict[str, torch.Tensor], **options: Any) -> Call:
    """FA4 forward, or if the output's gradient is there forward and backward."""
    q, k, v = (operands[name] for name in "qkv")
    if "d_out" not in operands:
        return lambda: (_first(flash_attn_func(q, k, v, **options)),)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

    def gradients() -> Results:
        out = _first(flash_attn_func(q, k, v, **options))
        return torch.autograd.grad(out, (q, k, v), operands["d_out"])

    return gradients


def _block_lists(keep: torch.Tensor, block_size: int) -> BlockSparseTensorsTorch:
    """Of a bool matrix [heads, rows, columns]: FA4 masks the elements of the diagonal alone."""
    is_diagonal = torch.eye(keep.shape[-1], dtype=torch.bool, device="cuda")
    mask_counts, mask_indices = _lists(keep & is_diagonal)
    full_counts, full_indices = _lists(keep & ~is_diagonal)
    return BlockSparseTensorsTorch(
        mask_block_cnt=mask_counts,
        mask_block_idx=mask_indices,
        full_block_cnt=full_counts,
        full_block_idx=full_indices,
        block_size=(block_size, block_size),
    )


def _lists(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [1, heads, rows] and ascending indices [1, heads, rows, columns] of a bool matrix."""
    counts = keep.sum(-1, dtype=torch.int32)
    indices = torch.argsort((~keep).to(torch.int8), dim=-1, stable=True).to(torch.int32)
    return counts[None].contiguous(), indices[None].contiguous()


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


_CALLS: dict[str, Callable[..., Call]] = {"fa4": _fa4, "fa4_block_sparse": _fa4_block_sparse}


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
