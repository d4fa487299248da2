"""How a rollout schedules its requests: slots, loops and prefills. The tokens do not depend on it."""

from dataclasses import dataclass

from rljax.sharding import Layout

PREFILLED_SAMPLES = 4  # a prefill is for at least so many requests, that reading the weights may pay
# Slots of a data shard. On CPUs a step's time grows with its slots, so fewer and fuller ones win; an accelerator reads
# the weights at every step, so many share a read.
CPU_SLOTS, ACCELERATOR_SLOTS = 32, 256
SHORTEST_LAP = 96  # columns of a ring whose first half is worth a loop of its own, which reads no more


@dataclass(frozen=True, kw_only=True)
class RefillPlan:
    """How requests are worked off; the tokens do not depend on it."""

    group: int  # consecutive requests that share a prompt
    slots: int  # on each data shard
    loops: int = 2  # each further one has a quarter of the slots, for the last answers
    prefill_chunk: int = 0  # columns of a prompt that are prefilled between two steps; 0: all
    uniform_steps: bool = False  # all data shards take the same number of steps: one scalar is exchanged at each
    ring_attention: str = "xla"  # or pallas: models/ring_kernel.py

    def entries(self, groups: int) -> int:
        """Prompts at hand at once, of ``groups`` in all.

        Twice what full groups would take and the next: an entry stays until the longest answer of its group has ended,
        and slots that wait for one are idle.
        """
        return min(groups, self.slots if self.group == 1 else 2 * -(-self.slots // self.group) + 1)

    def prefilled(self, groups: int) -> int:
        """Prompts that are prefilled together: shared ones one by one, as soon as there is room."""
        return min(self.entries(groups), max(1, PREFILLED_SAMPLES // self.group))


def starts_with_half(layout: Layout, columns: int) -> bool:
    """Whether the ring has only half its columns at first: where one core reads all of it at every token."""
    return layout.on_cpu and columns >= SHORTEST_LAP


def plan_refill(
    layout: Layout,
    rows: int,
    group: int,
    *,
    slots: int = -1,
    loops: int = 2,
    prefill_chunk: int = 0,
    uniform_steps: str = "auto",
    ring_attention: str = "xla",
) -> RefillPlan | None:
    """For ``rows`` requests over all data shards; None for the plain path (``slots`` 0). -1 and auto go by the device.

    A TPU keeps one loop (decoding is bound by reading weights, whatever the slots) and uniform steps: that its hardware
    bears data shards of different length is not proven.
    """
    if slots == 0:
        return None
    requests = rows // layout.data_shards
    slots = (CPU_SLOTS if layout.on_cpu else ACCELERATOR_SLOTS) if slots < 0 else slots
    uniform = layout.on_tpu if uniform_steps == "auto" else uniform_steps == "always"
    return RefillPlan(
        group=group,
        slots=min(slots, requests),
        loops=1 if layout.on_tpu else loops,
        prefill_chunk=prefill_chunk,
        uniform_steps=uniform,
        ring_attention=ring_attention,
    )
