"""One network on many ranks: batch statistics over the global batch, gradients averaged, and one answer for all.

torch's SyncBatchNorm exists for CUDA alone, and it ends torch.compile's graph at each of its layers (53 times in
ResNet-50). Where either matters the same statistics come from two sums over ranks that autograd and the compiler see.
Everything here is the obvious no-op in a single process.
"""

import contextlib
import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastssl.build import ranks
from fastssl.errors import UserError


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's, followed by its children: the dropout and activation of timm's norms."""

    def forward(self, input: Tensor) -> Tensor:
        return followed(self, super().forward(input))


class SumBatchNorm(_BatchNorm):
    """Batch normalization of (N, C, ...) by statistics of all ranks' rows, on any device, followed by its children."""

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim >= 2, input.shape

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return followed(self, super().forward(input))
        dims = [d for d in range(input.ndim) if d != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input if input.dtype == torch.float64 else input.float()
        rows = x.new_full((1,), x.numel() // x.shape[1])
        count, sum_C = torch.split(ranks.all_sum(torch.cat([rows, x.sum(dims)])), [1, x.shape[1]])
        mean_C: Tensor = sum_C / count
        centered = x - mean_C.view(shape)
        variance_C = ranks.all_sum(centered.square().sum(dims)) / count
        self.remember(mean_C.detach(), variance_C.detach() * count / (count - 1).clamp_min(1))
        y = centered * torch.rsqrt(variance_C + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return followed(self, y.to(input.dtype))

    def remember(self, mean_C: Tensor, variance_C: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        mean, var = self.running_mean, self.running_var
        if self.momentum is None:  # the mean over all batches up to now
            share = 1 / self.num_batches_tracked.to(mean.dtype)
            mean.lerp_(mean_C.to(mean.dtype), share)
            var.lerp_(variance_C.to(var.dtype), share)
        else:
            mean.lerp_(mean_C.to(mean.dtype), self.momentum)
            var.lerp_(variance_C.to(var.dtype), self.momentum)


def followed(norm: nn.Module, y: Tensor) -> Tensor:
    for child in norm.children():
        y = child(y)
    return y


def synchronize_batch_norm(network: nn.Module, device: torch.device, *, compiled: bool = False) -> nn.Module:
    """The network with every batch normalization over all ranks; the same parameters under the same names.

    Args:
        network: changed in place, except for a batch normalization itself.
        device: of the network.
        compiled: the network will be compiled.

    Raises:
        UserError: for a batch normalization that does something of its own besides.
    """
    if ranks.world() == 1:
        return network
    kind = SyncBatchNorm if device.type == "cuda" and not compiled else SumBatchNorm
    for path, parent in list(network.named_modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, like(child, kind, path=f"{path}.{name}".lstrip(".")))
    return network


def like(norm: _BatchNorm, kind: type[SyncBatchNorm] | type[SumBatchNorm], *, path: str) -> _BatchNorm:
    """A synchronized normalization around another one's own parameters, buffers and what follows it."""
    new = kind(
        norm.num_features,
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    ).train(norm.training)
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(new, name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(new, name, buffer)
    for name, child in followers(norm, path).items():
        setattr(new, name, child)
    return new


def followers(norm: _BatchNorm, path: str) -> dict[str, nn.Module]:
    """What a batch normalization calls after it has normalized, in that order.

    Raises:
        UserError: when that is not known.
    """
    children, forward = dict(norm.named_children()), type(norm).forward
    if forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return {}
    if isinstance(norm, SyncBatchNorm | SumBatchNorm):
        return children
    if forward.__module__.startswith("timm.") and children.keys() == {"drop", "act"}:
        return {name: children[name] for name in ("drop", "act")}
    raise UserError(
        f"{path} is a {type(norm).__name__}, a batch normalization with a forward of its own, which several ranks "
        "would lose.",
        "Make it torch's BatchNorm followed by modules of its own, or train on one rank.",
    )


def data_parallel(
    network: nn.Module, device: torch.device, *, compression: str = "none", may_leave_out: bool = False
) -> nn.Module:
    """The network with gradients averaged over ranks during backward; itself in a single process.

    A loss that sums over ranks has W times its share of the gradient on each rank, so the mean is the gradient of the
    global batch. Every rank starts from rank 0's weights.

    Args:
        network: its parameters' gradients are averaged.
        device: of the network.
        compression: "bf16" rounds gradients to bfloat16 on their way between ranks, "none" sends them as they are.
        may_leave_out: a forward may use only some of the parameters, which costs a look at every graph.
    """
    if ranks.world() == 1:
        return network
    is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # since torch 2.14
    sync_buffers = "forward_sync_buffers" if is_new else "broadcast_buffers"
    device_ids = [device] if device.type == "cuda" else None
    each_step: dict[str, Any] = {sync_buffers: False}  # synchronized statistics are already equal
    parallel = DistributedDataParallel(
        network,
        device_ids=device_ids,
        gradient_as_bucket_view=True,
        find_unused_parameters=may_leave_out,
        **each_step,
    )
    if compression == "bf16":
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel


def without_sync(network: Any) -> contextlib.AbstractContextManager[None]:
    """While entered, a backward only accumulates; for all parts of an accumulated step but the last."""
    network = getattr(network, "_orig_mod", network)  # as torch.compile wraps it
    if isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def agree(code: int, device: torch.device) -> int:
    """The largest code of all ranks, on every rank; one small round trip."""
    if ranks.world() == 1:
        return code
    tensor = torch.tensor([code], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
