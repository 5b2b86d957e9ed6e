"""DeepSpeed's process groups."""

from __future__ import annotations

import datetime


def limit_world_clone(timeout: datetime.timedelta) -> None:
    """Make DeepSpeed's clone of the world group before DeepSpeed does, which would leave torch's limit of 30 minutes.

    Raises:
        RuntimeError: this version of DeepSpeed keeps the clone elsewhere.
    """
    import torch.distributed as dist
    from deepspeed.utils import groups

    if not hasattr(groups, "_WORLD_GROUP"):
        raise RuntimeError("DeepSpeed's deepspeed.utils.groups has no attribute '_WORLD_GROUP' any more")
    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = dist.new_group(ranks=list(range(dist.get_world_size())), timeout=timeout)
