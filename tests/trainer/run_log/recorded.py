"""Stand-ins for CUDA graphs on a CPU: operators and launches are recorded and run again on the same memory.

As on a GPU, a replay reads the tensors' present contents and runs no Python: whatever the host decided, read or created
during the capture stays fixed. An operator that reads a number back to the host cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from safelight.kernels.triton.jit import Kernel
from safelight.trainer.step.step import MicroResult

READS_BACK = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class OperatorTape(TorchDispatchMode):
    """Records the operators and kernel launches that run inside the block.

    kept: tensors that persist between steps. calls: for each operator or launch its name, its arguments that are not
    tensors, and for each tensor argument its index in `kept`, or -1.
    """

    def __init__(self, kept: Iterable[Tensor] = ()):
        super().__init__()
        self._kept = {storage_of(x): number for number, x in enumerate(kept)}
        self._again: list[Callable[[], None]] = []
        self.calls: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = []
        self._is_inside = False
        self._launch = Kernel._launch

    def __enter__(self):
        launch = self._launch

        def record_launch(kernel: Kernel, grid: tuple, *arguments, **options) -> None:
            def run() -> None:
                launch(kernel, grid, *arguments, **options)

            # launches inside an operator run again with that operator
            if not self._is_inside:
                self._note(kernel.__name__, (arguments, grid, options))
                self._again.append(run)
            with _disable_current_modes():
                run()

        Kernel._launch = record_launch
        return super().__enter__()

    def __exit__(self, *exception):
        Kernel._launch = self._launch
        return super().__exit__(*exception)

    def _note(self, name: str, arguments: object) -> None:
        leaves = tree_leaves(arguments)
        plain = tuple(str(x) for x in leaves if not isinstance(x, Tensor))
        self.calls.append(
            (name, plain, tuple(self._kept.get(storage_of(x), -1) for x in leaves if isinstance(x, Tensor)))
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS_BACK:
            raise RuntimeError(f"{func} reads a number back to the host")
        self._note(str(func), (args, kwargs))
        self._is_inside = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._is_inside = False
        given = {storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        is_alias = [storage_of(x) in given for x in made]
        if made and all(is_alias) and not func._schema.is_mutable:
            # a view sees changes of its base by itself
            return result

        def again() -> None:
            outputs = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new, alias in zip(made, outputs, is_alias, strict=True):
                if not alias:
                    old.copy_(new)

        self._again.append(again)
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for again in self._again:
            again()


class CpuRecorder:
    """A cuda_graphs.Recorder. state: the tensors a step changes, restored after a capture, which on a CPU also runs."""

    def __init__(self, state: Callable[[], list[Tensor]]):
        self._state = state
        self.num_warm_ups = self.num_forgotten = 0
        self.tapes: list[OperatorTape] = []

    def warm_up(self, run: Callable[[], object]) -> None:
        self.num_warm_ups += 1
        run()

    def free_cached_memory(self) -> None:
        assert not self.tapes or self.num_warm_ups

    def forget(self) -> None:
        self.num_forgotten += 1

    def capture(self, run: Callable[[], object]) -> tuple[Callable[[], None], object]:
        before = [x.detach().clone() for x in self._state()]
        tape = OperatorTape()
        with tape:
            result = run()
        with torch.no_grad():
            for x, old in zip(self._state(), before, strict=True):
                x.copy_(old)
        self.tapes.append(tape)
        return tape.replay, result


class RunsAgain:
    """A Recorder without graphs: a replay calls the function again and copies its results into the captured ones."""

    def __init__(self, optimizer):
        self.optimizer, self.num_captured, self.num_replayed = optimizer, 0, 0

    def warm_up(self, run) -> None:
        run()

    def free_cached_memory(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def capture(self, run):
        self.num_captured += 1
        with self.optimizer.dry_run():
            # only the last micro-step's result has a norm
            result = MicroResult(*(x if x is None else torch.as_tensor(x).clone() for x in run()))

        def replay() -> None:
            self.num_replayed += 1
            for target, value in zip(result, run(), strict=True):
                if target is not None:
                    target.copy_(torch.as_tensor(value))

        return replay, result
