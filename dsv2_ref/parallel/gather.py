# SPDX-License-Identifier: MIT
"""What ranks add up, and what they bring together on the first: weights, and what a log tells."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dsv2_ref.block import Traffic
from dsv2_ref.moe.routing import Routing

BUCKET = 1 << 24                         # numbers that are summed in one message


def is_share(name: str) -> bool:
    """Whether a parameter of the model, or what an optimiser remembers of it, is split by experts.

    That is along its first dimension, which has experts, or as many parts of each.
    """
    return ".experts.W_" in name


def sum_over(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Each tensor becomes its sum over the ranks of the group, in place; many in one message."""
    if group.size() == 1:
        return
    bucket: list[Tensor] = []
    for i, t in enumerate(tensors):
        bucket.append(t)
        full = sum(x.numel() for x in bucket) >= BUCKET
        if full or i + 1 == len(tensors) or tensors[i + 1].dtype != t.dtype:
            flat = torch.cat([x.reshape(-1) for x in bucket])
            dist.all_reduce(flat, group=group)
            for x, summed in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.copy_(summed.view_as(x))
            bucket = []


def gather(mesh: DeviceMesh, model: nn.Module) -> dict[str, Tensor] | None:
    """The weights of the whole model by name, on the CPU of the first rank; None on the others.

    mesh: ("pp", "dp", "ep"). One tensor is on its way at a time, to be called by all.
    """
    _, dp, ep = mesh.get_coordinate()
    mine = {name: W.detach() for name, W in model.state_dict().items()
            if dp == 0 and (ep == 0 or mesh["ep"].size() > 1 and is_share(name))}
    rank, size = dist.get_rank(), dist.get_world_size()
    lists: list[list[tuple[str, torch.Size, torch.dtype]]] = [[]] * size
    dist.gather_object([(name, W.shape, W.dtype) for name, W in mine.items()],
                       None if rank else lists)
    if rank:
        for W in mine.values():
            dist.send(W.contiguous(), 0)
        return None
    device = next(iter(mine.values())).device
    parts: dict[str, list[Tensor]] = {}
    for sender, entries in enumerate(lists):
        for name, shape, dtype in entries:
            if sender:
                W = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(W, sender)
            else:
                W = mine[name]
            parts.setdefault(name, []).append(W.cpu())
    return {name: torch.cat(found) if is_share(name) else found[0].clone()
            for name, found in parts.items()}


@torch.no_grad()
def scatter(mesh: DeviceMesh, weights: dict[str, Tensor] | None, model: nn.Module) -> None:
    """The way back: each rank's share of the first one's whole model goes into its own, in place.

    weights: as `gather` gives them, None but on the first rank. To be called by all.
    """
    mine, ep = model.state_dict(), mesh["ep"].size()
    rank, (_, _, place) = dist.get_rank(), mesh.get_coordinate()
    lists: list[tuple[int, list[str]]] = [(0, [])] * dist.get_world_size()
    dist.gather_object((place, list(mine)), None if rank else lists)
    if rank:
        for W in mine.values():
            found = torch.empty_like(W, memory_format=torch.contiguous_format)
            dist.recv(found, 0)
            W.copy_(found)
        return
    for receiver, (its, names) in enumerate(lists):
        for name in names:
            share = weights[name].chunk(ep)[its] if is_share(name) else weights[name]
            if receiver:
                like = next(iter(mine.values()))
                dist.send(share.to(like.device).contiguous(), receiver)
            else:
                mine[name].copy_(share)


def load_of_all(load: list[Traffic], rows: int) -> list[Traffic]:
    """The traffic of each layer, of all rows, on the first rank; the others keep their own.

    `rows`: ranks of a stage, which are neighbours. To be called by all.
    """
    own = [_moved(layer) for layer in load]
    found: list[list[Traffic]] = [[]] * dist.get_world_size()
    dist.gather_object(own, None if dist.get_rank() else found)
    if dist.get_rank():
        return load
    whole = []
    for stage in range(0, len(found), rows):
        for same in zip(*found[stage : stage + rows], strict=True):
            kept = None if same[0].kept is None else torch.cat([x.kept for x in same])
            routing = Routing(*(torch.cat([getattr(x.routing, name) for x in same])
                                for name in ("indices", "gates", "scores")))
            whole.append(Traffic(same[0].layer, sum(x.experts for x in same),
                                 sum(x.devices for x in same), kept, routing))
    return sorted(whole, key=lambda layer: layer.layer)


def _moved(layer: Traffic) -> Traffic:
    """On the CPU."""
    r = layer.routing
    return replace(layer, experts=layer.experts.cpu(), devices=layer.devices.cpu(),
                   kept=None if layer.kept is None else layer.kept.cpu(),
                   routing=Routing(r.indices.cpu(), r.gates.cpu(), r.scores.cpu()))
