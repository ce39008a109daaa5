"""Runs Mosaic GPU kernels on the CPU, and says whether their threads race.

The interpreter of jax 0.11 and 0.12 lacks some things that a wgmma kernel needs; this file adds
them and is the only one that reaches into it:
- a value stored into a wgmma accumulator, and a left operand of wgmma in registers;
- wgmma as an asynchronous reader of shared memory: a slot that is freed before the wgmma which
  reads it has been waited for is a race, as is one that no barrier announced;
- `kernels.mosaic.take_number`;
- copies that add to global memory; additions to one place do not race;
- `kernels.mosaic.warp_any`. Warps have no values of their own here: they branch as one.
"""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import core as jax_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
    reset_gpu_interpret_mode_state,
)
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import get_memory_space_idx
from jax._src.state import primitives as state_primitives
from jax.experimental import io_callback
from jax.experimental.pallas import mosaic_gpu as plgpu

_REGISTERS = get_memory_space_idx(plgpu.REGS)

# Copies and products with clocks of their own. By default all share five, and whoever has waited
# for one of them seems to have waited for others.
_COPIES = 512


def interpret(f: Callable[..., Any], *args: Any) -> tuple[Any, bool]:
    """(f(*args), whether its kernels raced), with every Mosaic GPU kernel interpreted."""
    reset_gpu_interpret_mode_state()
    params = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=_COPIES)
    try:
        with _patched(), _recorded_races() as races, plgpu.force_gpu_interpret_mode(params):
            results = jax.block_until_ready(f(*args))
        return results, any(of_kernel.races_found for of_kernel in races)
    finally:
        reset_gpu_interpret_mode_state()


# What the interpreter says of a barrier's completion that a thread missed; jax 0.12 also raises its
# races.
FAULTS_SAID = ("observe", "RACE DETECTED")


def is_fault_seen(check: Callable[[], object], said: Sequence[str] = FAULTS_SAID) -> bool:
    """Whether a check of results fails, returns that threads raced, or makes one miss a barrier.

    `said` are the words by which the interpreter's errors are told from any others.
    """
    try:
        return bool(check())
    except jax.errors.JaxRuntimeError as error:
        if not any(text in str(error) for text in said):
            raise
        return True
    except AssertionError:
        return True


@contextlib.contextmanager
def _recorded_races() -> Iterator[list[GPURaceDetectionState]]:
    """The races of every kernel; the interpreter itself only keeps those of the last."""
    found = []

    def record(**kwargs: Any) -> GPURaceDetectionState:
        found.append(GPURaceDetectionState(**kwargs))
        return found[-1]

    with mock.patch.object(gpu_callbacks, "GPURaceDetectionState", record):
        yield found


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    in_flight = _WgmmaInFlight()
    original_deref = gpu_callbacks.wgmma_accumulator_deref
    original_copy = gpu_callbacks.copy_smem_to_gmem
    original_interpret = JaxprInterpreter.interpret
    original_check_write = GPURaceDetectionState.check_write

    def deref(*, thread, wait_n, **kwargs):
        in_flight.wait(thread, wait_n)
        return original_deref(thread=thread, wait_n=wait_n, **kwargs)

    def copy(*, reduction_op, **kwargs):
        if reduction_op is None:
            return original_copy(reduction_op=None, **kwargs)
        assert reduction_op == "add"
        return _add_smem_to_gmem(**kwargs)

    def check_write(self, thread, clock, buffer_key, *args, **kwargs):
        if buffer_key.memory_space_id != _REGISTERS:  # no other thread sees those
            original_check_write(self, thread, clock, buffer_key, *args, **kwargs)

    def interpret_rewritten(self, jaxpr, token, *args):
        return original_interpret(self, _stores_as_swaps(jaxpr), token, *args)

    def inline(self, eqn, token, get_invals):
        if eqn.params["mgpu_fn"].__name__ == "take_number":
            return _take_number(self, eqn, token, *get_invals())
        assert eqn.params["mgpu_fn"].__name__ == "warp_any"
        (rows,) = get_invals()
        return token, [jnp.any(rows != 0.0)]

    with (
        mock.patch.object(JaxprInterpreter, "_interpret_inline_mgpu_p", inline),
        mock.patch.object(gpu_callbacks, "copy_smem_to_gmem", copy),
        mock.patch.object(gpu_callbacks, "wgmma", in_flight.issue),
        mock.patch.object(gpu_callbacks, "wgmma_accumulator_deref", deref),
        mock.patch.object(JaxprInterpreter, "interpret", interpret_rewritten),
        mock.patch.object(GPURaceDetectionState, "check_write", check_write),
    ):
        yield


class _WgmmaInFlight:
    """Computes at once, but lets a thread know that its operands were read only when it waits."""

    def __init__(self):
        self._clocks = collections.defaultdict(collections.deque)

    @gpu_callbacks.fail_on_exception
    def issue(self, *, token, thread, mesh_location, source_info=None, **operands):
        memory = gpu_callbacks._get_shared_memory()
        memory.incr_clock(thread)
        clock = memory.get_clock(thread)
        clock.inc(memory.get_next_tma_thread_id())

        def read(name):
            key = operands[f"{name}_allocation_key_as_array"]
            if np.ndim(key) == 2:
                return np.asarray(key)  # the operand itself, from registers
            key, access = _access(memory, key, operands[f"{name}_transforms"])
            value, _, _ = memory.get_buffer_content(key, access, thread)
            if name != "acc":
                gpu_callbacks.get_races().check_read(
                    thread, clock.async_smem_clock.copy(), key, access, source_info=source_info
                )
            return value

        acc = read("acc")
        product = np.matmul(read("a").astype(acc.dtype), read("b").astype(acc.dtype))
        acc_key, acc_access = _access(
            memory, operands["acc_allocation_key_as_array"], operands["acc_transforms"]
        )
        memory.store_buffer_content(acc_key, acc_access, acc + product, thread)
        self._clocks[thread].append(clock)
        return token

    def wait(self, thread, allowed: int | None) -> None:
        if allowed is None:
            return
        memory = gpu_callbacks._get_shared_memory()
        while len(self._clocks[thread]) > allowed:
            finished = self._clocks[thread].popleft()
            with memory.lock:
                memory.clocks[thread].update(finished)


def _take_number(interpreter, eqn, token, counter, place, *transforms):
    transforms = jax.tree.unflatten(eqn.params["pytree_ref_transforms"], transforms)
    (counter, counter_transforms), (place, place_transforms) = (
        jaxpr_interpret.resolve_ref(var.aval, *given)
        for var, *given in zip(eqn.invars[:2], (counter, place), transforms, strict=True)
    )
    shape = (gpu_callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct((1,), jnp.int32))
    where = {"mesh_location": interpreter.mesh_location, "thread": interpreter.thread}
    token, number = io_callback(
        _count, shape, token=token, counter=counter, transforms=counter_transforms, **where
    )
    token, _ = gpu_callbacks.call_swap(
        token=token,
        result_shape_and_dtype=shape[1],
        allocation_key_as_array=place,
        transforms=place_transforms,
        val=number,
        mask=None,
        source_info=eqn.source_info,
        **where,
    )
    return token, []


_LOCK = threading.Lock()


@gpu_callbacks.fail_on_exception
def _count(*, token, mesh_location, thread, counter, transforms):
    memory = gpu_callbacks._get_shared_memory()
    key, access = _access(memory, counter, transforms)
    with _LOCK:
        number, _, _ = memory.get_buffer_content(key, access, thread)
        assert number is not None
        memory.store_buffer_content(key, access, number + 1, thread)
    return token, number


class _Addition(gpu_callbacks.AsyncCopySmemToGmemTask):
    """Adds where a copy would overwrite."""

    def __call__(self, tma_thread_id):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        value, _, _ = memory.get_buffer_content(
            self.src_allocation_key, self.src_access, self.thread
        )
        self.clock.inc(tma_thread_id)
        self.write_clock = self.clock.copy()
        shape = memory.buffer_shape_and_dtype(self.dst_allocation_key).shape
        kept = gpu_callbacks._clip_store_to_shape(self.dst_access, value, tuple(shape))
        if kept is not None:
            access, value = kept
            with _LOCK:
                old, _, _ = memory.get_buffer_content(self.dst_allocation_key, access, self.thread)
                memory.store_buffer_content(
                    self.dst_allocation_key, access, old + value, self.thread
                )
        self.post_write(tma_thread_id, memory)


@gpu_callbacks.fail_on_exception
def _add_smem_to_gmem(
    *,
    token,
    mesh_location,
    thread,
    src_allocation_key_as_array,
    src_transforms,
    dst_allocation_key_as_array,
    dst_transforms,
    predicate,
    source_info,
    commit_group,
):
    assert predicate is None and commit_group
    memory = gpu_callbacks._get_shared_memory()
    clock = memory.incr_clock(thread)
    src_key, src_access = _access(memory, src_allocation_key_as_array, src_transforms)
    dst_key, dst_access = _access(memory, dst_allocation_key_as_array, dst_transforms)
    addition = _Addition(
        mesh_location=mesh_location,
        thread=thread,
        src_allocation_key=src_key,
        src_access=src_access,
        dst_allocation_key=dst_key,
        dst_access=dst_access,
        source_info=source_info,
        clock=clock,
    )
    memory.execute_async_task(addition)
    return token


def _access(memory, key, transforms):
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    return key, memory.access(key, transforms)


def _stores_as_swaps(jaxpr):
    """`jaxpr` with stores into accumulators written as the swaps that the interpreter knows."""

    def rewrite(eqn):
        if eqn.primitive is not primitives.wgmma_accumulator_store_p:
            return eqn
        old = jax_core.Var(eqn.invars[1].aval)
        return eqn.replace(
            primitive=state_primitives.swap_p,
            params={"tree": jax.tree.structure(())},
            outvars=[old],
            effects=jax_core.no_effects,
        )

    if all(eqn.primitive is not primitives.wgmma_accumulator_store_p for eqn in jaxpr.eqns):
        return jaxpr
    return jaxpr.replace(eqns=[rewrite(eqn) for eqn in jaxpr.eqns])
