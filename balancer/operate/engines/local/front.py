"""The balancer of a service on this host: its ports and keys, and whether it is one of its own or another service's."""

from collections.abc import Callable, Mapping
from pathlib import Path

from balancer.errors import ConfigError
from balancer.operate.engines.addresses import Addresses, AddressFlags, Listeners, open_listeners
from balancer.operate.engines.balancer_handle import BalancerHandle
from balancer.operate.engines.local.balancer_handle import LocalBalancer
from balancer.operate.engines.local.joined import Host, JoinedBalancer
from balancer.operate.engines.remote_balancers import RemoteBalancers, addresses_of
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state import keys
from balancer.operate.state.service_folder import ServiceFolder


class Front:
    """Keeps what the balancer needs in `folder`; `on_change` is called when the balancer has ended."""

    def __init__(self, folder: ServiceFolder, on_change: Callable[[], None]) -> None:
        # The file with the key that SGLang replicas require.
        self.key_file: Path | None = None
        self._folder = folder
        self._on_change = on_change
        self._ports: tuple[Addresses, Listeners] | None = None
        self._elsewhere: Addresses | None = None  # of balancers that run already
        self._host: Host | None = None  # the service whose balancer serves this one too

    def check_keys(self, recipe: Recipe) -> None:
        """Raises ConfigError if replicas of this recipe could not be asked as those of the first one are."""
        if self.key_file is not None and recipe.launch is not None and keys.brings_its_own(recipe):
            raise ConfigError(
                f"{recipe.spec.name}: its replicas ask for a key of this service, and now `run:` brings one of its "
                "own: take it down and up again"
            )

    def prepare(self, recipe: Recipe, flags: AddressFlags) -> Addresses:
        """Opens the ports, or finds the balancer to join. Raises ConfigError."""
        self.key_file = keys.for_replicas(recipe, self._folder.replica_key_file)
        if flags.balancers:
            self._elsewhere = addresses_of(flags)
            return self._elsewhere
        if flags.join is not None:
            self._host = Host.find(ServiceFolder(self._folder.path.parent, flags.join))
            return Addresses(self._host.endpoint.partition("//")[2], self._host.admin)
        self._ports = open_listeners(flags)
        return self._ports[0]

    def balancer(self, recipe: Recipe) -> BalancerHandle:
        if (where := self._elsewhere) is not None:
            return RemoteBalancers(where.balancers, where, recipe, self.key_file, print)
        if self._host is not None:
            return JoinedBalancer(self._host, self._folder, recipe, self.key_file, print)
        assert self._ports is not None, "prepare comes first"
        return LocalBalancer(self._folder, *self._ports, recipe, self.key_file, self._on_change)

    @property
    def fields(self) -> Mapping[str, str]:
        """The headers that the replicas require in our requests."""
        return keys.bearing(keys.given(self.key_file, keys.KEY_FILE)) if self.key_file is not None else {}

    def key_variable(self, recipe: Recipe) -> dict[str, str]:
        """The variable by which a replica finds its key."""
        if self.key_file is None or recipe.launch is None:
            return {}
        return {keys.KEY_FILE: str(self.key_file)}

    def close(self) -> None:
        """Closes the ports if the balancer has not done so."""
        if self._ports is not None:
            self._ports[1].close()
