"""`s2ft` with accelerate's FSDP on a CPU: accelerate turns it on for accelerators only, by the kind of the processes."""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_start = AcceleratorState.__init__


def start(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """As accelerate's, which takes the plugin only where it finds accelerators."""
    was_there = "_mixed_precision" in AcceleratorState._shared_state
    _start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if not was_there:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":  # not where pytest imports it to look for examples
    from s2ft.cli.app import main

    AcceleratorState.__init__ = start
    main()
