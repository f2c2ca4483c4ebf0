"""Paged optimizers: unified memory that can be watched, AdamW on top of it, and what bitsandbytes makes of both.

Read the modules in this order: `memory` (pages, a budget, eviction, faults), `adamw` (the update, then the
same with paged states), `managed` (the same on a GPU, where the driver moves the pages), `policies` (which
page to evict: counted on a sequence of touches alone), `runs` (a little training under a budget, with a long
batch), `states8` (states in 8 bits), `thresholds` (what bitsandbytes pages), `spike` (a long batch through
the real model).
"""

from qlora_edu.paging.adamw import PagedAdamW, adamw_
from qlora_edu.paging.managed import ManagedMemory
from qlora_edu.paging.memory import Block, Event, OutOfMemory, UnifiedMemory

__all__ = ["Block", "Event", "ManagedMemory", "OutOfMemory", "PagedAdamW", "UnifiedMemory", "adamw_"]
