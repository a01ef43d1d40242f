"""A function of parameters and its gradients as CUDA graphs."""
from typing import Any, Callable, Iterator, List, Optional, Sequence

import torch
from torch import Tensor

__all__ = ['CudaGraphs']

WARMUP_CALLS = 3  # libraries choose what they run, and take memory, in the first calls


class CudaGraphs:
    """A function of parameters and its gradients as two CUDA graphs, which use the same memory in every replay.

    Like ``torch.cuda.make_graphed_callables``, without the operations that this takes for every single parameter in
    every step: of hundreds of small ones they keep the host longer than the graphs keep the GPU.

    Args:
        function: Function of the parameters.
        parameters: Leaves of autograd, on one GPU.
        memory_format: That of the gradients of the results, which need no conversion then.

    Attributes:
        is_spent: Whether :meth:`backward` must not come before another :meth:`forward`: it writes where that had kept
            what it goes by.
        results: What the function returns, as of the last :meth:`forward`.
        result_gradients: What :meth:`backward` goes by, one for each result: to be written to.
        gradients: Of the parameters, as of the last :meth:`backward`; None for those that have none.
    """

    def __init__(
            self,
            function: Callable[..., Sequence[Tensor]],
            parameters: Sequence[Tensor],
            memory_format: torch.memory_format,
    ) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                results = function(*parameters)
                self.result_gradients = [torch.zeros_like(r, memory_format=memory_format) for r in results]
                if trained:
                    self._differentiate(results, trained)
                del results
        torch.cuda.current_stream().wait_stream(stream)

        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Threads of data loaders go on meanwhile.
        options: Any = dict(stream=stream, capture_error_mode='thread_local')
        with torch.cuda.graph(self._forward, **options):
            results = function(*parameters)
        found: Iterator[Optional[Tensor]] = iter(())
        if trained:
            with torch.cuda.graph(self._backward, pool=self._forward.pool(), **options):
                # dense, so that one launch copies all of them
                found = iter([g if g is None else g.contiguous() for g in self._differentiate(results, trained)])
        self.is_spent = True
        self.results = [result.detach() for result in results]
        self.gradients = [next(found) if parameter.requires_grad else None for parameter in parameters]

    def _differentiate(self, results: Sequence[Tensor], trained: List[Tensor]) -> Sequence[Optional[Tensor]]:
        pairs = [(r, gradient) for r, gradient in zip(results, self.result_gradients) if r.requires_grad]
        differentiable, gradients = zip(*pairs)
        found: Sequence[Optional[Tensor]] = torch.autograd.grad(differentiable, trained, gradients, allow_unused=True)
        return found

    def forward(self) -> None:
        """Compute the results."""
        self._forward.replay()
        self.is_spent = False

    def backward(self) -> None:
        """Compute the gradients, once after each :meth:`forward`."""
        self._backward.replay()
        self.is_spent = True
