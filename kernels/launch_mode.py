"""A dispatch mode that sees our kernels too: torch's dispatcher knows operators alone."""

from __future__ import annotations

import contextlib

from torch.utils._python_dispatch import TorchDispatchMode

from safelight.kernels.jit import Launch, tell_launches


class LaunchMode(TorchDispatchMode):
    """While it is entered, `_launched` is called with every launch on meta tensors, beside `__torch_dispatch__`."""

    def __init__(self):
        super().__init__()
        self._listening = contextlib.ExitStack()

    def __enter__(self):
        self._listening.enter_context(tell_launches(self._launched))
        return super().__enter__()

    def __exit__(self, *error):
        self._listening.close()
        return super().__exit__(*error)

    def _launched(self, launch: Launch) -> None:
        """Called with each launch; every subclass has its own."""
        raise NotImplementedError
