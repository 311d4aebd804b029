"""A workload on a number of equal replicas, and how a policy does there."""

import dataclasses
import random
from collections.abc import Sequence

from tests.lab.baselines import Oracle
from tests.lab.model import ModelSettings
from tests.lab.simulator import Result, Simulation
from tests.lab.workloads import Conversation, Writer, unlike


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """A workload on a number of equal replicas."""

    name: str
    replicas: int
    conversations: Sequence[Conversation]
    at_once: int
    settings: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    arrivals: Sequence[float] | None = None  # seconds; None: all may begin at once
    is_warm: bool = False  # are the pools already full of other prompts at the start?
    ranks: int = 1

    def run(self, policy: str, max_pending: int | None = None) -> Result:
        if policy != Oracle.name:
            return self._played(Simulation(policy, self.settings, self.replicas, max_pending, self.ranks))
        found = []
        for copies in ({}, {"copy_price": 0.0}, {"by_popularity": True}):
            simulation = Simulation(policy, self.settings, self.replicas, max_pending, self.ranks)
            simulation.policy = simulation.admission.policy = Oracle(simulation.models_of, **copies)
            found.append(self._played(simulation))
        return max(found, key=lambda one: (round(one.goodput, 2), -one.ttft_mean))

    def _played(self, simulation: Simulation) -> Result:
        pools = self.replicas * self.ranks
        before = unlike(Writer(random.Random(0)), pools, self.settings.max_total_tokens) if self.is_warm else ()
        return simulation.run(self.conversations, self.at_once, self.arrivals, before)

    def warm(self) -> "Scenario":
        """The same with pools that are full of other prompts at the start."""
        return dataclasses.replace(self, name=f"{self.name}, pools full", is_warm=True)
